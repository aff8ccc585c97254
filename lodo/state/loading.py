"""State dicts on their way to the owners of tensors (`lodo.state.owners`), around the checks (`lodo.state.checks`)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from lodo.state.checks import AsSaved, check_layout
from lodo.state.layout import State
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
        ValueError: it is no state dict of a torch optimizer.
    """

    def __init__(
        self, state_dict: Mapping[str, Any], groups: Sequence[dict[str, Any]], owners: Sequence[Owners | None]
    ) -> None:
        check_layout(state_dict)
        state, saved_groups = dict(state_dict["state"]), list(state_dict["param_groups"])
        self.groups = list(groups)
        self._loaded, self._marks, self._fills = (
            state_dict,
            dict[Any, Any](),
            list[tuple[Owners, dict[str, Any], set[str]]](),
        )
        self._loaded_groups = []
        for index, (saved, group, owner) in enumerate(zip(saved_groups, groups, owners, strict=False)):
            saved_groups[index] = here = {**saved, "sharding": group["sharding"]}
            self._loaded_groups.append(here)
            if owner is None or len(saved["params"]) != len(group["params"]):
                continue
            keys = saved["params"]
            entries = [state.pop(key, {}) for key in keys]
            state.update((key, entry) for key, entry in zip(keys, owner.taken(entries), strict=True) if entry)
            self._marks.update({key: {"shards": AsSaved(owner.mark())} for key in keys if any(entries)})
            self._fills.append((owner, {**group, **here}, _names_of(entries)))
            saved_groups[index] = {**here, "params": [*(keys[place] for place in owner.places), f"nothing in {index}"]}
            self.groups[index] = {**group, "params": owner.tensors}
        self.state_dict = {**state_dict, "state": state, "param_groups": saved_groups}

    def checked(self, prepare: Callable[[], T]) -> T:
        """What `prepare` gives, if it is refused on no rank.

        Raises:
            ValueError: it is, here or elsewhere.
        """
        owners = [owner for owner, _, _ in self._fills]
        try:
            found = prepare()
        except Exception:
            for owner in owners:
                owner.agree(is_refused=True)
            raise
        refused = [owner.agree(is_refused=False) for owner in owners]  # all of them: other ranks wait
        if any(refused):
            raise ValueError("the state dict was refused by another rank, which says why")
        return found

    def completed(self, state: State) -> dict[str, Any]:
        """The state dict to load, of checked state: with marks for what other ranks have."""
        for owner, options, names in self._fills:
            owner.fill_(options, names)
        groups = [*self._loaded_groups, *self._loaded["param_groups"][len(self._loaded_groups) :]]
        return {**self._loaded, "param_groups": groups, "state": {**self._marks, **state}}


def _names_of(entries: Sequence[Mapping[str, Any]]) -> set[str]:
    """What is kept for parameters of which these entries were saved; nothing if of other shards, for then it begins
    anew."""
    if any("shards" in entry and tuple(entry["shards"].tolist()) != ONE_PROCESS for entry in entries):
        return set()
    return {name for entry in entries for name in entry}
