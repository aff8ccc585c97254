"""Checks of a saved state that need no optimizer: how it is laid out, and what its tensors hold.

Every refusal is a ValueError that says where, what was saved and what is expected. A state that a training run can have
left must pass, unless it had diverged: `check_numbers` refuses what no other leaves.
"""

import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from lodo.sharding import local

COMPUTED = (torch.float32, torch.float64)
"""Dtypes of networks and of the numbers that steer a step."""
KEPT = (*COMPUTED, torch.bfloat16)
"""Dtypes of momentum and moments."""


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
