"""State dicts on their way to the owners of tensors (`lodo.state.owners`), around the checks (`lodo.state.checks`)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from lodo.options import OPTIONS
from lodo.state.checks import AsSaved, check_layout
from lodo.state.layout import State, slots_of
from lodo.state.owners import ONE_PROCESS, Owners

T = TypeVar("T")


class Loaded:
    """A state dict that is being loaded, and the param groups that it is for, as this rank has them.

    All ranks must load together. Where tensors have owners each has what belongs to its own, and `sharding` stays as it
    is here: where a training runs is none of what it has learned.

    Args:
        state_dict: as saved, of any number of ranks.
        groups: the optimizer's.
        owners: of each of them, None for those that have none.

    Raises:
        ValueError: it is no state dict of a torch optimizer, or has a `sharding` that there is not.
    """

    def __init__(
        self, state_dict: Mapping[str, Any], groups: Sequence[dict[str, Any]], owners: Sequence[Owners | None]
    ) -> None:
        check_layout(state_dict)
        state, saved_groups = dict(state_dict["state"]), list(state_dict["param_groups"])
        self.groups, self._loaded, self._loaded_groups = list(groups), state_dict, list(saved_groups)
        self._owners: list[Owners] = []
        self._marks: dict[Any, dict[str, Any]] = {}
        for index, (saved, group, owner) in enumerate(zip(list(saved_groups), groups, owners, strict=False)):
            OPTIONS["sharding"].check("sharding", saved.get("sharding", group["sharding"]))
            here = {**saved, "sharding": group["sharding"]}
            self._loaded_groups[index] = saved_groups[index] = here
            if owner is None or len(saved["params"]) != len(group["params"]):
                continue
            self._owners.append(owner)
            keys = saved["params"]
            entries = [state.pop(key, {}) for key in keys]
            state.update((key, entry) for key, entry in zip(keys, owner.taken(entries), strict=True) if entry)
            if any(entries):
                names = _names_of(entries, {**group, **here})
                for key, rank in zip(keys, owner.owners, strict=True):
                    marks = owner.marks(set() if rank == owner.exchange.rank else names)
                    self._marks[key] = {name: AsSaved(mark) for name, mark in marks.items()}
            nothing = [f"nothing in {index}, {number}" for number in range(len(owner.empties))]
            saved_groups[index] = {**here, "params": [*(keys[place] for place in owner.places), *nothing]}
            self.groups[index] = {**group, "params": owner.tensors}
        self.state_dict = {**state_dict, "state": state, "param_groups": saved_groups}

    def checked(self, prepare: Callable[[], T]) -> T:
        """What `prepare` gives, if it is refused on no rank.

        Raises:
            ValueError: it is, here or elsewhere.
        """
        try:
            found = prepare()
        except Exception:
            self.anywhere(True)
            raise
        if self.anywhere(False):
            raise ValueError("the state dict was refused by another rank, which says why")
        return found

    def anywhere(self, flag: bool) -> bool:
        """Whether something is so on any rank."""
        return any([flag, *(owner.agree(flag) for owner in self._owners)])

    def completed(self, state: State) -> dict[str, Any]:
        """The state dict to load, of checked state: with marks for what other ranks have."""
        for owner in self._owners:
            owner.forget()
        return {**self._loaded, "param_groups": self._loaded_groups, "state": {**self._marks, **state}}


def _names_of(entries: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> set[str]:
    """What goes on for parameters of which these entries were saved."""
    names = {name for entry in entries for name in entry}
    marks = [entry["shards"] for entry in entries if isinstance(entry.get("shards"), Tensor)]
    if all(tuple(mark.flatten().tolist()) == ONE_PROCESS for mark in marks):
        return names
    known = {str(name).partition("_in_")[0] for name in names}  # of other shards
    return {slot.name for slot in slots_of(options, known) if slot.outlives_shards} & names
