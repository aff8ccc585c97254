"""Saved states: refused where the present param groups cannot go on from them, else made ready for torch to load.

Every refusal is a ValueError that says where, what was saved and what is expected, and comes before anything has
changed. A state that a training run can have left must pass, unless it had diverged: `check_numbers` refuses what no
other leaves. What a state holds, and under which names, is told in `lodo.state`.

torch's `Optimizer.load_state_dict` casts state to the dtype of the parameter, which would round a float32 network to
bfloat16 and ruin indices. Saved tensors therefore travel through it inside `AsSaved`, which it does not look into.
"""

import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from lodo.bases import HELD_FROM_ABOVE
from lodo.flat import computed_dtype
from lodo.options import ADDED, check_options
from lodo.preconditioners import BY_NAME
from lodo.sharding import Sharding, check_saved_like, local, rank_of_fsdp1
from lodo.state import (
    COUNT_KEYS,
    EXTRA_KEYS,
    FLAGS,
    FORMAT,
    MOMENT_KEYS,
    SHARDED_FORMAT,
    State,
    entry_of,
    entry_with_network,
    extras_of,
    local_size,
    shapes,
)

READABLE = (1, 2, 3)
GROUP_KEYS = ("format", "theta", "meta_step", "last_lr", "skipped")
ENTRY_KEYS = (
    "momentum",
    "format",
    "shards",
    "fsdp1_rank",
    "theta",
    "permutations",
    *MOMENT_KEYS,
    *COUNT_KEYS,
    *EXTRA_KEYS,
)
COMPUTED = (torch.float32, torch.float64)
"""Dtypes of networks and of the numbers that steer a step."""
KEPT = (*COMPUTED, torch.bfloat16)
"""Dtypes of momentum and moments."""


def made_ready(
    state_dict: dict[str, Any], groups: list[dict[str, Any]], defaults: Mapping[str, Any]
) -> tuple[dict[Any, Any], bool] | None:
    """What torch is to load, and whether that has lost networks (see `has_lost_networks`): found out before, for once
    the state is loaded no memory must be asked for. None if the groups are so different that torch refuses them itself.

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
    for saved in saved_groups:
        check_options({**defaults, **saved})
    check_saved(state_dict, groups)
    ids = {key for saved in saved_groups for key in saved["params"]}
    found = amended(state_dict, groups)
    has_lost = has_lost_networks(saved_groups, found, groups)  # takes lost momentum out of `found`
    return wrap(found, ids), has_lost


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


def check_names(what: str, entry: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Refuses entries that nothing would read: they may be the spoilt names of some that matter."""
    if unknown := [name for name in entry if name not in known and not is_of_shards(name, known)]:
        raise ValueError(
            f"{what}: {', '.join(map(repr, unknown))} in the saved state is no entry that this version of lodo knows; "
            "if you have put it there, take it out, and keep it under a key of 'state' that is no parameter's"
        )


def is_of_shards(name: Any, known: tuple[str, ...]) -> bool:
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


def check_numbers(what: str, value: Tensor, low: float = -math.inf, whole: bool = False) -> None:
    """Refuses NaN, infinity, numbers below `low` and, of one number, a fraction.

    Of a DTensor it reads this rank's part. One pass without memory of its own: `aminmax` passes a NaN on.
    """
    part = local(value.detach())
    if part.is_meta or part.numel() == 0:
        return
    least, most = (float(bound) for bound in part.aminmax())
    if not math.isfinite(least) or not math.isfinite(most):
        raise ValueError(f"{what} holds NaN or infinity in the saved state: it is damaged, or had diverged")
    if least < low or (whole and least != int(least)):
        allowed = "a whole number" if whole else "numbers"
        raise ValueError(f"{what} must hold {allowed} >= {low:g} in the saved state, got {least:g}")


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


def check_saved(saved: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Refuses a state dict that these groups cannot go on from, before anything has changed.

    Raises:
        ValueError: naming the group, what was saved and what this optimizer expects, if the state is not LODO's, or
            is of another format, preconditioner or shape, or holds what only a diverged training leaves, or none.
    """
    for index, (saved_group, group) in enumerate(zip(saved["param_groups"], groups, strict=True)):
        for name, former in (("preconditioner", group["preconditioner"]), ("base", None), ("decays", None)):
            kind = saved_group.get(name, former)  # there were no bases and decays once
            own = tuple(group[name]) if isinstance(group[name], list) else group[name]
            if (tuple(kind) if isinstance(kind, list) else kind) != own:
                raise ValueError(
                    f"param group {index}: the saved state is of {name} {kind!r}, this optimizer's is {group[name]!r}"
                )
        entries = [saved["state"].get(key, {}) for key in saved_group["params"]]
        if any(entries):
            _check_group(f"param group {index}", entries, group)
            # The saved options will replace the present ones, so they have to describe the saved network too.
            described = {**group, **saved_group, "params": group["params"]}
            _check_group(f"param group {index}", entries, described)
            _check_values(f"param group {index}", entries, described, {**ADDED, **saved_group})


def amended(saved: dict[str, Any], groups: list[dict[str, Any]]) -> State:
    """The saved state, without the networks that were learned for another number of shards, and with the momentum of
    frozen parameters, which torch.distributed.checkpoint leaves out."""
    found = dict(saved["state"])
    for saved_group, group in zip(saved["param_groups"], groups, strict=True):
        keys = saved_group["params"]
        with_network = next((key for key in keys if "format" in found.get(key, ())), None)
        if with_network is None:
            continue
        entry = found[with_network]
        if _is_misfit(entry, Sharding.of(group["params"])):
            found[with_network] = {name: entry[name] for name in ("momentum", "format")}
        dtype = computed_dtype(group["params"])
        for key, p in zip(keys, group["params"], strict=True):
            if _may_lack_momentum(p, found.get(key, {})):
                found[key] = {**found.get(key, {}), "momentum": torch.zeros_like(p, dtype=dtype)}
    return found


def has_lost_networks(saved_groups: list[dict[str, Any]], found: State, groups: list[dict[str, Any]]) -> bool:
    """Whether saved state has momentum, which only steps make, next to a network that has taken none.

    Where momentum is in the coordinates of a base it is worth nothing then, and becomes zero in `found`.
    """
    has_lost = False
    for saved_group, group in zip(saved_groups, groups, strict=True):
        state = {p: found.get(key, {}) for key, p in zip(saved_group["params"], group["params"], strict=True)}
        if entry_with_network(group, state) is None:
            continue
        entry = entry_of(group, state)
        # A frozen network counts no inner steps, and one of format 1 no steps, but each left the lr of its last one.
        if any(entry.get(name, True) for name in ("steps", "meta_step", "last_lr")):
            continue
        if any(bool(local(kept["momentum"]).any()) for kept in state.values() if "momentum" in kept):
            has_lost = True
            if group["base"] == "soap":
                for key in saved_group["params"]:
                    found[key] = {**found[key], "momentum": torch.zeros_like(found[key]["momentum"])}
    return has_lost


def _may_lack_momentum(p: Tensor, entry: dict[str, Any]) -> bool:
    return not p.requires_grad and "momentum" not in entry


def _is_misfit(entry: dict[str, Any], sharding: Sharding | None) -> bool:
    # "shards" alone does not tell: what a distributed checkpoint lacks is left as it was in the state loaded into.
    found = 1 if entry.get("format") != SHARDED_FORMAT else int(entry["shards"]) if "shards" in entry else 0
    return found != (1 if sharding is None else sharding.shards)


def _first(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The entry with what was saved for the group; the first one if there is none."""
    return next((entry for entry in entries if "format" in entry), entries[0])


def _check_group(where: str, entries: list[dict[str, Any]], group: dict[str, Any]) -> None:
    first, params = _first(entries), group["params"]
    sharding, size = Sharding.of(params), local_size(params)
    _check_kind(where, first)
    is_misfit = "format" in first and _is_misfit(first, sharding)
    if sharding is not None and not is_misfit:
        sharding.check_saved(where, first, shapes(sharding.largest, group))
        formats = {"format": first["format"]} if "format" in first else {}
        first = {**sharding.opened(first, shapes(size, group)), **formats}
    if missing := [name for name in (("format",) if is_misfit else GROUP_KEYS) if name not in first]:
        raise ValueError(f"{where}: not a state of LODO, or an incomplete one: {', '.join(missing)} missing")
    for number, (entry, p) in enumerate(zip(entries, params, strict=True)):
        what = f"{where}, parameter {number}: momentum"
        if _may_lack_momentum(p, entry):
            continue
        check_tensor(what, entry.get("momentum"), tuple(p.shape), KEPT)
        check_saved_like(what, entry["momentum"], p)
    if is_misfit:
        return
    _check_fsdp1_rank(where, first.get("fsdp1_rank"), rank_of_fsdp1(params))
    shape = BY_NAME[group["preconditioner"]].theta_shape(size, group)
    check_tensor(f"{where}: theta (set by depth, block_size and expansion)", first["theta"], shape, COMPUTED)
    if any(name in first for name in MOMENT_KEYS):
        for name in MOMENT_KEYS:
            check_tensor(f"{where}: {name}", first.get(name), shape, KEPT)
    expected = shapes(size, group)
    for name in EXTRA_KEYS:
        if name in first:
            dtypes = (torch.uint8,) if name in FLAGS else COMPUTED
            check_tensor(f"{where}: {name}", first[name], expected.get(name, ()), dtypes)
    for name in ("meta_step", "last_lr"):
        check_tensor(f"{where}: {name}", first[name], (), COMPUTED)
    check_tensor(f"{where}: skipped", first["skipped"], (), (torch.int64,))
    if first["format"] > 1:
        check_tensor(f"{where}: steps", first.get("steps"), (), (torch.int64,))
    _check_permutations(where, first.get("permutations"), size, group)


def _check_fsdp1_rank(where: str, value: Any, own: tuple[int, int] | None) -> None:
    """FSDP1's shards have equal sizes, so that the network of one rank would fit another."""
    saved = None if value is None else tuple(value.tolist())
    if saved is not None and saved != own:
        here = f"rank {own[0]} of {own[1]}" if own else "no shard of it"
        raise ValueError(
            f"{where}: the saved network acts on the shard that FullyShardedDataParallel gives to rank {saved[0]} of "
            f"{saved[1]}, this is {here}; save and load optimizer.state_dict() on each rank"
        )


def _check_kind(where: str, entry: dict[str, Any]) -> None:
    """Refuses another format, and marks of one that are no integers."""
    found = entry.get("format", FORMAT)
    if type(found) is not int or found not in READABLE:
        raise ValueError(
            f"{where}: the state has format {found!r}, this version of lodo reads formats 1 to "
            f"{READABLE[-1]}; load it with the version of lodo that wrote it"
        )
    if "shards" in entry:
        check_tensor(f"{where}: shards", entry["shards"], (1,), (torch.int64,))


def _check_values(
    where: str, entries: list[dict[str, Any]], group: dict[str, Any], saved_options: dict[str, Any]
) -> None:
    """Refuses numbers that only a diverged training leaves, and names that nothing reads, in a state that fits.

    `saved_options` tell what the state must have; options that there were not yet can be asked for now.
    """
    first = _first(entries)
    for number, entry in enumerate(entries):
        what = f"{where}, parameter {number}"
        check_names(what, entry, ENTRY_KEYS if entry is first else ENTRY_KEYS[:1])
        if "momentum" in entry:
            check_numbers(f"{what}: momentum", entry["momentum"])
    params = group["params"]
    sharding = Sharding.of(params)
    if _is_misfit(first, sharding):
        return
    kept = first if sharding is None else sharding.opened(first, shapes(local_size(params), group))
    # Those that must be there have been looked for; a group that never learned has no moments.
    for name in ("theta", *MOMENT_KEYS, "last_lr", *EXTRA_KEYS):
        if name in kept:
            check_numbers(f"{where}: {name}", kept[name], 0 if name.endswith("_sq") else -math.inf)
    for name in ("meta_step", "skipped", "steps", "reset_at"):
        if name in kept:
            check_numbers(f"{where}: {name}", kept[name], 0, whole=True)
    for name in ("scale", "mixture"):
        if name in kept:
            check_numbers(f"{where}: the second moments in {name}", kept[name][-1], 0)
    if "base_seen" in kept and bool((kept["base_seen"] > HELD_FROM_ABOVE).any()):
        raise ValueError(f"{where}: base_seen must hold numbers from 0 to {HELD_FROM_ABOVE} in the saved state")
    for name in ("unit", "scale_levels"):
        if name in kept:
            check_numbers(f"{where}: {name}", kept[name], 0)
    if missing := [name for name in extras_of(saved_options) if name not in kept]:
        raise ValueError(
            f"{where}: {', '.join(missing)} missing in the saved state, which its base, trace, scale_lr or decays need"
        )
    is_adam = group["meta_optimizer"] == "adam" and group["meta_lr"] > 0
    if is_adam and MOMENT_KEYS[0] not in kept and int(kept["meta_step"]) > 0:
        raise ValueError(
            f"{where}: {' and '.join(MOMENT_KEYS)} are missing in the saved state of an inner Adam that has learned"
        )


def _check_permutations(where: str, value: Any, size: int, group: dict[str, Any]) -> None:
    """The kernels trust the indices, so ones that lead out of the vector must not get in."""
    shape = BY_NAME[group["preconditioner"]].permutations_shape(size, group)
    if (value is None) != (shape is None):
        saved = "without indices (the shuffle)" if value is None else "with index permutations"
        raise ValueError(
            f"{where}: the saved network is {saved}, this optimizer has permutation={group['permutation']!r}"
        )
    if shape is None:
        return
    check_tensor(f"{where}: permutations", value, shape, (torch.int32,))
    for row in value:
        seen = torch.zeros(shape[1], dtype=torch.bool, device="cpu")
        if not 0 <= row.min() <= row.max() < shape[1] or not seen.index_fill_(0, row.cpu().long(), True).all():
            raise ValueError(f"{where}: each row of permutations must hold 0 to {shape[1] - 1} once in the saved state")
