"""What LODO keeps between steps, how it lies in `optimizer.state`, and how saved states are checked and read.

Per parameter: "momentum", shaped like it. On the first parameter of a group, for the whole group: "theta" and,
where it has indices, "permutations" (int32) of the preconditioner; "theta_exp_avg", "theta_exp_avg_sq" and
"meta_step" of the inner Adam; "last_lr"; "steps" taken and "skipped" (left out for bad gradients); "format" of this
layout. Network and momentum are float32, or float64 for groups with float64 parameters; the moments of the inner Adam
and the momentum may be bfloat16 instead.

torch's `Optimizer.load_state_dict` casts state to the dtype of the parameter, which would round a float32 network to
bfloat16 and ruin indices. Saved tensors therefore travel through it inside `AsSaved`, which it does not look into.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lodo import kernels, meta
from lodo.flat import FlatParameters
from lodo.preconditioners import BY_NAME, Preconditioner
from lodo.rounding import kept_dtype
from lodo.scalars import Cell

FORMAT = 2  # 1 had no "steps", and no other moments than those of theta's dtype
READABLE = (1, 2)
GROUP_KEYS = ("format", "theta", "meta_step", "last_lr", "skipped")
MOMENT_KEYS = ("theta_exp_avg", "theta_exp_avg_sq")

State = dict[Any, dict[str, Any]]


@dataclass
class GroupState:
    """The live state of one param group. Its tensors are the ones in `optimizer.state`."""

    flat: FlatParameters
    preconditioner: Preconditioner
    moments: meta.Moments | None
    momentum: Tensor
    momentum_parts: list[Tensor]
    meta_step: Cell
    last_lr: Cell
    skipped: Cell
    steps: Cell
    # Kept between steps to save allocations.
    gradient: Tensor = field(init=False)
    gradient_parts: list[Tensor] = field(init=False)
    lr: Cell = field(init=False)
    has_stepped: bool = field(init=False, default=False)  # so that all that kernels prepare is there

    def __post_init__(self) -> None:
        self.gradient = self.flat.new_vector()
        self.gradient_parts = self.flat.views(self.gradient)
        self.lr = Cell(torch.zeros_like(self.last_lr.tensor))
        pinned = self.flat.device.type == "cuda"
        self._mailbox = torch.empty((), dtype=torch.int64, device="cpu", pin_memory=pinned).copy_(self.skipped.tensor)
        self._skips_before = self._mailbox.numpy().tolist()
        first = self.momentum.data_ptr()
        self._offsets = [part.data_ptr() - first for part in self.momentum_parts]

    def has_new_skips(self) -> bool:
        """Whether steps were skipped since this state was made.

        On CUDA the count comes in by itself, some steps late: the host reads what has arrived and never waits.
        """
        self._mailbox.copy_(self.skipped.tensor, non_blocking=True)
        return bool(self._mailbox.numpy() > self._skips_before)

    def has_moments(self, group: dict[str, Any]) -> bool:
        """Whether there are moments of the dtype that the group asks for."""
        wanted = kept_dtype(group["meta_state_dtype"], self.flat.dtype)
        return self.moments is not None and self.moments[0].dtype == wanted

    def start_moments(self, dtype: torch.dtype) -> None:
        """Gives the inner Adam moments of this dtype: what is there, cast, or new ones."""
        if self.moments is None:
            self.moments = meta.start_moments(self.preconditioner.theta, dtype)
        else:
            self.moments = (self.moments[0].to(dtype), self.moments[1].to(dtype))

    def keep_momentum(self, momentum: Tensor) -> None:
        """Rounds the momentum of a step into the one that is kept, unless they are the same."""
        if momentum is not self.momentum:
            kernels.for_rounding(momentum).round_into_(self.momentum, momentum, self.steps.get())

    def is_bound_to(self, state: State, group: dict[str, Any]) -> bool:
        """Whether `state` still holds these very tensors, in the dtypes that parameters and options ask for."""
        params = group["params"]
        entry = state[params[0]]
        if self.momentum.dtype != kept_dtype(group["momentum_dtype"], self.flat.dtype):
            return False
        if not self.flat.fits(params) or any(entry.get(name) is not value for name, value in self.shared().items()):
            return False
        first = self.momentum.data_ptr()
        return all(
            state[p].get("momentum") is part and part.data_ptr() - first == offset
            for p, part, offset in zip(params, self.momentum_parts, self._offsets, strict=True)
        )

    def shared(self) -> dict[str, Tensor]:
        """The tensors that lie in the state of the group's first parameter, by name."""
        tensors = {
            "theta": self.preconditioner.theta,
            "meta_step": self.meta_step.tensor,
            "last_lr": self.last_lr.tensor,
            "skipped": self.skipped.tensor,
            "steps": self.steps.tensor,
        }
        if self.preconditioner.permutations_stored is not None:
            tensors["permutations"] = self.preconditioner.permutations_stored
        if self.moments is not None:
            tensors.update(zip(MOMENT_KEYS, self.moments, strict=True))
        return tensors

    def publish(self, state: State, params: list[Tensor]) -> None:
        """Puts the tensors into `optimizer.state`."""
        for p, part in zip(params, self.momentum_parts, strict=True):
            state[p]["momentum"] = part
        state[params[0]].update(self.shared(), format=FORMAT)


def start(group: dict[str, Any], learned: Preconditioner | None = None) -> GroupState:
    """Fresh state for a group: its options' initial preconditioner, or a copy of a learned one.

    Raises:
        ValueError: if the learned one acts on another number of parameters.
    """
    flat = FlatParameters(group["params"])
    if learned is None:
        preconditioner = BY_NAME[group["preconditioner"]].start(flat.size, group, flat.dtype, flat.device)
    elif learned.size == flat.size:
        preconditioner = learned.to(flat.dtype, flat.device)
    else:
        raise ValueError(
            f"preconditioner was learned for {learned.size} parameters, but its param group holds {flat.size}"
        )
    momentum = flat.new_vector(kept_dtype(group["momentum_dtype"], flat.dtype))
    wide = torch.float32 if flat.device.type == "mps" else torch.float64
    cells = [Cell(momentum.new_zeros((), dtype=dtype)) for dtype in (wide, wide, torch.int64, torch.int64)]
    return GroupState(flat, preconditioner, None, momentum, flat.views(momentum), *cells)


def bind(group: dict[str, Any], state: State) -> GroupState:
    """Live state over what `state` holds for a group, moved and cast where the parameters have been.

    A change between float32 and float64 parameters converts network and momentum accordingly.

    Raises:
        RuntimeError: if the group has other parameters than its state was made for.
    """
    params = group["params"]
    if any("momentum" not in state.get(p, ()) or state[p]["momentum"].shape != p.shape for p in params):
        raise RuntimeError(
            "the parameters of a param group have changed since its first step, and its network acts on those it had; "
            "use add_param_group for new ones"
        )
    flat = FlatParameters(params)
    entry = state[params[0]]
    momentum = flat.new_vector(kept_dtype(group["momentum_dtype"], flat.dtype))
    parts = flat.views(momentum)
    flat.gather([state[p]["momentum"] for p in params], parts)

    def here(name: str, dtype: torch.dtype | None = None) -> Any:
        value = entry.get(name)
        return None if value is None else value.to(flat.device, dtype).contiguous()

    theta = here("theta", flat.dtype)
    preconditioner = BY_NAME[group["preconditioner"]].wrap(theta, here("permutations"), flat.size)
    wanted = kept_dtype(group["meta_state_dtype"], flat.dtype)
    moments = None if MOMENT_KEYS[0] not in entry else (here(MOMENT_KEYS[0], wanted), here(MOMENT_KEYS[1], wanted))
    if "steps" not in entry:  # format 1
        entry["steps"] = torch.zeros_like(entry["skipped"])
    cells = [Cell(here(name)) for name in ("meta_step", "last_lr", "skipped", "steps")]
    return GroupState(flat, preconditioner, moments, momentum, parts, *cells)


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
            is of another format, preconditioner or shape.
    """
    for index, (saved_group, group) in enumerate(zip(saved["param_groups"], groups, strict=True)):
        kind = saved_group.get("preconditioner", group["preconditioner"])
        if kind != group["preconditioner"]:
            raise ValueError(
                f"param group {index}: the saved state is of preconditioner {kind!r}, this optimizer's is "
                f"{group['preconditioner']!r}"
            )
        entries = [saved["state"].get(key, {}) for key in saved_group["params"]]
        if any(entries):
            _check_group(f"param group {index}", entries, group)
            # The saved options will replace the present ones, so they have to describe the saved network too.
            _check_group(f"param group {index}", entries, {**group, **saved_group, "params": group["params"]})


def _check_group(where: str, entries: list[dict[str, Any]], group: dict[str, Any]) -> None:
    first, params = entries[0], group["params"]
    if missing := [name for name in GROUP_KEYS if name not in first]:
        raise ValueError(f"{where}: not a state of LODO, or an incomplete one: {', '.join(missing)} missing")
    if first["format"] not in READABLE:
        raise ValueError(
            f"{where}: the state has format {first['format']!r}, this version of lodo reads formats 1 to {FORMAT}; "
            "load it with the version of lodo that wrote it"
        )
    for number, (entry, p) in enumerate(zip(entries, params, strict=True)):
        _check_tensor(f"{where}, parameter {number}: momentum", entry.get("momentum"), tuple(p.shape))
    size = sum(p.numel() for p in params)
    shape = BY_NAME[group["preconditioner"]].theta_shape(size, group)
    _check_tensor(f"{where}: theta (set by depth, block_size and expansion)", first["theta"], shape)
    if any(name in first for name in MOMENT_KEYS):
        for name in MOMENT_KEYS:
            _check_tensor(f"{where}: {name}", first.get(name), shape)
    for name in ("meta_step", "last_lr"):
        _check_tensor(f"{where}: {name}", first[name], ())
    _check_tensor(f"{where}: skipped", first["skipped"], (), torch.int64)
    if first["format"] > 1:
        _check_tensor(f"{where}: steps", first.get("steps"), (), torch.int64)
    _check_permutations(where, first.get("permutations"), size, group)


def _check_tensor(what: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Refuses what is no tensor of this shape and dtype; None stands for the floating dtypes."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{what} must be a tensor, got {value!r} in the saved state")
    if tuple(value.shape) != shape:
        raise ValueError(f"{what} has shape {tuple(value.shape)} in the saved state, this optimizer expects {shape}")
    if value.dtype != dtype if dtype is not None else not value.is_floating_point():
        raise ValueError(f"{what} has dtype {value.dtype} in the saved state, expected {dtype or 'a floating one'}")


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
    _check_tensor(f"{where}: permutations", value, shape, torch.int32)
    for row in value:
        seen = torch.zeros(shape[1], dtype=torch.bool, device="cpu")
        if not 0 <= row.min() <= row.max() < shape[1] or not seen.index_fill_(0, row.cpu().long(), True).all():
            raise ValueError(f"{where}: each row of permutations must hold 0 to {shape[1] - 1} once in the saved state")
