"""Saved states: refused where the present param groups cannot go on from them, else prepared for torch to load.

Every refusal is a ValueError that says where, what was saved and what is expected, and comes before anything has
changed. A state that a training run can have left must pass, unless it had diverged: `check_numbers` refuses what no
other leaves. What a state holds, and under which names, follows from the slots (`lodo.state.layout`).

torch's `Optimizer.load_state_dict` casts state to the dtype of the parameter, which would round a float32 network to
bfloat16 and ruin indices. Saved tensors therefore travel through it inside `AsSaved`, which it does not look into.
"""

import math
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lodo.declarations import Dtype, Kind, Role, Slot
from lodo.options import OPTIONS, check_options
from lodo.parts import parts_of
from lodo.state.layout import MARKS, Entry, State, StateLayout, slots_of
from lodo.state.sharding import check_saved_like, local, rank_of_fsdp1, signature

COMPUTED = (torch.float32, torch.float64)
DTYPES: dict[Dtype, tuple[torch.dtype, ...]] = {
    Dtype.COMPUTED: COMPUTED,
    Dtype.WIDE: COMPUTED,
    Dtype.MOMENTUM: (*COMPUTED, torch.bfloat16),
    Dtype.MOMENTS: (*COMPUTED, torch.bfloat16),
    Dtype.COUNT: (torch.int64,),
    Dtype.INDEX: (torch.int32,),
    Dtype.FLAG: (torch.uint8,),
}
"""What a slot may have been saved in: by another precision of the parameters, on another device."""


class Prepared(NamedTuple):
    """What torch is to load.

    Attributes:
        state: wrapped, see `AsSaved`.
        has_new_networks: some of it was saved with another number of shards, and starts anew.
        has_lost_networks: some has momentum, which only steps make, next to a network that has taken none.
    """

    state: dict[Any, Any]
    has_new_networks: bool
    has_lost_networks: bool


def prepare_state_dict(
    state_dict: dict[str, Any], groups: list[dict[str, Any]], defaults: Mapping[str, Any]
) -> Prepared | None:
    """Checks a state dict, and makes of it what torch is to load: before anything has changed, for once the state is
    loaded no memory must be asked for. None if the groups are so different that torch refuses them itself.

    Args:
        groups: the optimizer's present param groups.
        defaults: its options.

    Raises:
        ValueError: the groups cannot go on from the state.
    """
    check_layout(state_dict)
    saved_groups = state_dict["param_groups"]
    if [len(group["params"]) for group in groups] != [len(saved["params"]) for saved in saved_groups]:
        return None
    found: dict[Any, Any] = dict(state_dict["state"])
    has_new = has_lost = False
    for index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        check_options({**defaults, **saved})
        where, keys = f"param group {index}", saved["params"]
        _check_fixed(where, saved, group)
        entries = [found.get(key, {}) for key in keys]
        if not any(entries):
            continue
        _check_is_complete(where, entries, group["params"])
        # The saved options will replace the present ones, so the state has to fit them too.
        described = {**group, **saved, "params": group["params"]}
        required = {slot.name for slot in slots_of(described)}
        is_misfit = GroupCheck(where, entries, group, required).run()
        GroupCheck(where, entries, described, required, reads_numbers=False).run()
        has_new |= is_misfit
        has_lost |= not is_misfit and _has_lost_network(entries, group)
        layout = StateLayout(group["params"], described, entries)
        for key, entry in zip(keys, entries, strict=True):
            if is_misfit and "momentum" in entry:
                momentum = entry["momentum"]
                if any(part.changes_gradients for part in parts_of(group)):  # in coordinates and units that are lost
                    momentum = torch.zeros_like(momentum)
                found[key] = {"momentum": momentum, **layout.outlived(entry)}
    ids = {key for saved in saved_groups for key in saved["params"]}
    return Prepared(wrap(found, ids), has_new, has_lost)


def check_layout(saved: Mapping[str, Any]) -> None:
    """Refuses what is no state dict of a torch optimizer: a dict of dicts, and a list of param groups."""
    state, groups = saved.get("state"), saved.get("param_groups")
    if not isinstance(state, Mapping) or not isinstance(groups, list | tuple):
        raise ValueError(
            "a state dict must hold a dict 'state' and a list 'param_groups', got "
            f"{type(state).__name__} and {type(groups).__name__}"
        )
    keys: list[Any] = []
    for index, group in enumerate(groups):
        params = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(params, list | tuple) or not all(isinstance(key, Hashable) for key in params):
            raise ValueError(f"param group {index}: must be a dict with a list 'params' of keys in the saved state")
        keys += params
    if len(set(keys)) < len(keys):
        raise ValueError(f"the param groups of the saved state name a parameter twice, got {keys}")
    for key in keys:
        if not isinstance(state.get(key, {}), Mapping):
            raise ValueError(f"the saved state of parameter {key!r} must be a dict, got {state[key]!r}")


def is_of_shards(name: Any, known: set[str]) -> bool:
    """Whether an entry is named as `Sharding.key` names one: for any number of shards, since of those that do not fit
    some may be left."""
    base, _, count = str(name).removesuffix("_shards").rpartition("_in_")
    return base in known and count.isdecimal() and str(name).endswith("_shards")


def check_tensor(what: str, value: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuses what is no dense tensor of this shape and one of these dtypes."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{what} must be a tensor, got {value!r} in the saved state")
    if value.layout != torch.strided:
        raise ValueError(f"{what} has layout {value.layout} in the saved state, expected torch.strided")
    if tuple(value.shape) != shape:
        raise ValueError(f"{what} has shape {tuple(value.shape)} in the saved state, this optimizer expects {shape}")
    if value.dtype not in dtypes:
        allowed = " or ".join(map(str, dtypes))
        raise ValueError(f"{what} has dtype {value.dtype} in the saved state, expected {allowed}")


def check_numbers(
    what: str,
    value: Tensor,
    low: float = -math.inf,
    high: float = math.inf,
    whole: bool = False,
    may_be_infinite: bool = False,
) -> None:
    """Refuses NaN, infinity, and numbers below `low` or above `high`.

    Of a DTensor it reads this rank's part. One pass without memory of its own: `aminmax` passes a NaN on.
    """
    part = local(value.detach())
    if part.is_meta or part.numel() == 0:
        return
    least, most = (float(bound) for bound in part.aminmax())
    if math.isnan(least) or not (may_be_infinite or math.isfinite(least + most)):
        raise ValueError(f"{what} holds NaN or infinity in the saved state: it is damaged, or had diverged")
    if least < low or most > high:
        allowed = "whole numbers" if whole else "numbers"
        upper = "" if high == math.inf else f" and <= {high:g}"
        got = least if least < low else most
        raise ValueError(f"{what} must hold {allowed} >= {low:g}{upper} in the saved state, got {got:g}")


class AsSaved:
    """A saved tensor on its way past the cast in `Optimizer.load_state_dict`."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def wrap(state: State, ids: set[int]) -> State:
    """The saved state with the tensors of the parameters `ids` wrapped. Entries that hooks keep under keys of their own
    are left alone."""

    def wrapped(entry: dict[str, Any]) -> dict[str, Any]:
        return {name: AsSaved(value) if isinstance(value, Tensor) else value for name, value in entry.items()}

    return {key: wrapped(entry) if key in ids else entry for key, entry in state.items()}


def unwrap(state: State) -> None:
    """Replaces every `AsSaved` by a copy of its tensor, in its saved dtype, on its parameter's device."""
    for p, entry in state.items():
        if isinstance(p, Tensor):
            for name, value in entry.items():
                if isinstance(value, AsSaved):
                    entry[name] = value.tensor.detach().to(p.device, copy=True)


def _check_is_complete(where: str, entries: list[Any], params: list[Tensor]) -> None:
    """Refuses what another optimizer has saved, before anything is concluded from its names."""
    for place, (entry, p) in enumerate(zip(entries, params, strict=True)):
        if entry and "momentum" not in entry and (p.requires_grad or len(entry) > 1):
            raise _incomplete(f"{where}, parameter {place}", "momentum")


def _incomplete(what: str, key: str) -> ValueError:
    return ValueError(f"{what}: not a state of LODO, or an incomplete one: {key} missing")


def _check_fixed(where: str, saved: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """Refuses a state of another preconditioner, base or momentum."""
    for name, option in OPTIONS.items():
        # Sizes of a network tell themselves, by its shape.
        if option.role is Role.FIXED and name not in ("depth", "block_size", "expansion"):
            kind = saved.get(name, group[name])
            if option.plain(kind) != option.plain(group[name]):
                raise ValueError(f"{where}: the saved state is of {name} {kind!r}, this optimizer's is {group[name]!r}")


def _has_lost_network(entries: list[Any], group: Mapping[str, Any]) -> bool:
    """Whether momentum, which only steps make, is next to a network of the whole group that has taken none."""
    layout = StateLayout(group["params"], group, entries)
    slots = {slot.name: slot for slot in layout.slots if slot.kind is Kind.NETWORK}
    if not slots:
        return False
    entry = next((entry for entry in entries if layout.key(slots["network_step"]) in entry), None)
    count = None if entry is None else layout.opened(slots["network_step"], entry)
    if count is not None and bool(count):
        return False
    return any(bool(local(entry["momentum"]).any()) for entry in entries if "momentum" in entry)


class GroupCheck:
    """The checks of what was saved for a param group.

    Args:
        where: what to call the group in errors.
        entries: of its parameters in the saved state.
        group: the present one, with the options that the state is to fit.
        required: names of the slots that the saved options ask for: others can start anew.
        reads_numbers: whether to look at the numbers too, which is a pass over all of the state.
    """

    def __init__(
        self,
        where: str,
        entries: list[Any],
        group: Mapping[str, Any],
        required: set[str],
        reads_numbers: bool = True,
    ) -> None:
        self.where, self.entries, self.required, self.reads_numbers = where, entries, required, reads_numbers
        self.params = group["params"]
        self.layout = StateLayout(self.params, group, entries)

    def run(self) -> bool:
        """Whether the state is of other shards, of which little can go on.

        Raises:
            ValueError: naming the group, what was saved and what this optimizer expects, if the state is not LODO's, or
                of another preconditioner or shape, or holds what only a diverged training leaves, or none.
        """
        self._check_names()
        is_misfit = self._is_misfit()
        for slot in self.layout.slots:
            for place, entry in enumerate(self.entries if slot.kind is not Kind.NETWORK else ()):
                what = f"{self.where}, parameter {place}: {slot.name}"
                if entry and (not is_misfit or slot.name == "momentum"):
                    self._check_slot(slot, entry, place, what)
                elif slot.name in self.layout.outlived(entry):
                    self._check_outlived(slot, entry[slot.name], place, what)
        if not is_misfit:
            self._check_network()
            self._check_fsdp1_rank()
        return is_misfit

    def _check_names(self) -> None:
        """Refuses entries that nothing would read: they may be the spoilt names of some that matter."""
        known = {slot.name for slot in self.layout.slots}
        for place, entry in enumerate(self.entries):
            unknown = [name for name in entry if name not in (*known, *MARKS) and not is_of_shards(name, known)]
            if unknown and "momentum" in entry:
                raise ValueError(
                    f"{self.where}, parameter {place}: {', '.join(map(repr, unknown))} in the saved state is no entry "
                    "that this version of lodo knows; if you have put it there, take it out, and keep it under a key "
                    "of 'state' that is no parameter's"
                )

    def _is_misfit(self) -> bool:
        own = signature(self.params)
        for entry in self.entries:
            if "shards" in entry:
                check_tensor(f"{self.where}: shards", entry["shards"], (2,), (torch.int64,))
        return any(tuple(entry["shards"].tolist()) != own for entry in self.entries if "shards" in entry)

    def _check_slot(self, slot: Slot, entry: Entry, place: int, what: str) -> None:
        key, layout = self.layout.key(slot), self.layout
        value = entry.get(key)
        if value is None:
            # The moments of an inner Adam may come later, but not once it has learned.
            is_needed = slot.dtype is not Dtype.MOMENTS or self._has_learned(entry)
            if slot.name in self.required and is_needed:
                raise _incomplete(f"{self.where}, parameter {place}", key)
            return
        if slot.kind is Kind.ELEMENTS:
            check_tensor(what, value, layout.shape_in_state(slot, place), DTYPES[slot.dtype])
            check_saved_like(what, value, self.params[place], len(slot.shape))
        elif layout.sharding is not None:
            layout.sharding.check_saved(what, value, layout.shape_in_state(slot, place)[0])
        else:
            check_tensor(what, value, layout.shape(slot, place), DTYPES[slot.dtype])
        opened = layout.opened(slot, entry, place)
        assert opened is not None
        if slot.kind is not Kind.ELEMENTS:
            check_tensor(what, opened, layout.shape(slot, place), DTYPES[slot.dtype])
        if self.reads_numbers:
            check_numbers(what, opened, slot.low, slot.high, slot.is_whole, slot.may_be_infinite)
            for row in slot.squares:
                check_numbers(f"{what}, its second moments", opened[row], 0.0)

    def _check_outlived(self, slot: Slot, value: Any, place: int, what: str) -> None:
        """Of what was saved with another number of shards."""
        is_table = slot.kind is Kind.TABLE
        check_tensor(
            what, value, slot.shape if is_table else self.layout.shape_in_state(slot, place), DTYPES[slot.dtype]
        )
        if not is_table:
            check_saved_like(what, value, self.params[place], len(slot.shape))
        if self.reads_numbers:
            check_numbers(what, value, slot.low, slot.high, slot.is_whole, slot.may_be_infinite)

    def _has_learned(self, entry: Entry) -> bool:
        slot = next((slot for slot in self.layout.slots if slot.name == "meta_step"), None)
        count = None if slot is None else self.layout.opened(slot, entry)
        return count is not None and bool(count)

    def _check_network(self) -> None:
        """Of a network that acts on the whole group everything is in the state of one parameter."""
        slots = [slot for slot in self.layout.slots if slot.kind is Kind.NETWORK]
        keys = {self.layout.key(slot) for slot in slots}
        places = [place for place, entry in enumerate(self.entries) if keys & entry.keys()]
        if len(places) > 1:
            raise ValueError(f"{self.where}: the saved state has networks with several parameters, got {places}")
        place = places[0] if places else 0
        for slot in slots:
            what = f"{self.where}: {slot.name}"
            if slot.name == "theta":
                what += " (set by depth, block_size and expansion)"
            self._check_slot(slot, self.entries[place], place, what)
            if slot.name == "permutations" and self.reads_numbers:
                _check_permutations(self.where, self.layout.opened(slot, self.entries[place]))

    def _check_fsdp1_rank(self) -> None:
        """FSDP1's shards have equal sizes, so that the network of one rank would fit another."""
        value = next((entry["fsdp1_rank"] for entry in self.entries if "fsdp1_rank" in entry), None)
        own = rank_of_fsdp1(self.params)
        if value is not None:
            check_tensor(f"{self.where}: fsdp1_rank", value, (2,), (torch.int64,))
        saved = None if value is None else tuple(value.tolist())
        if saved is not None and saved != own:
            here = f"rank {own[0]} of {own[1]}" if own else "no shard of it"
            raise ValueError(
                f"{self.where}: the saved state is of the shard that FullyShardedDataParallel gives to rank {saved[0]} "
                f"of {saved[1]}, this is {here}; save and load optimizer.state_dict() on each rank"
            )


def _check_permutations(where: str, value: Tensor | None) -> None:
    """The kernels trust the indices, so ones that lead out of the vector must not get in."""
    if value is None:
        return
    shape = value.shape
    for row in value:
        seen = torch.zeros(shape[1], dtype=torch.bool, device="cpu")
        if not 0 <= row.min() <= row.max() < shape[1] or not seen.index_fill_(0, row.cpu().long(), True).all():
            raise ValueError(f"{where}: each row of permutations must hold 0 to {shape[1] - 1} once in the saved state")
