"""What LODO keeps between steps, and how it lies in `optimizer.state`. (`lodo.saved` checks what is loaded into it.)

Per parameter: "momentum", shaped like it. On the first parameter of a group that requires gradients (what there is for
others is lost when torch.distributed.checkpoint loads it), for the whole group: "theta" and, where it has indices,
"permutations" (int32) of the preconditioner; "theta_exp_avg", "theta_exp_avg_sq" and "meta_step" of the inner Adam;
"last_lr" (as `max_step_norm` left it); "trace" (n,) of the momentum; "base_exp_avg_sq" (n,) and "base_factors" of the
base preconditioner; "scale" (3, number of tensors) and "moves" (n,) of the scales per tensor; "momenta" (number of
decays, n) and "mixture" (3, number of decays, number of tensors) of the learned momentum; "scale_levels" of lr (see
`lodo.scale`); "base_seen" (n,), uint8, the elements that have had a gradient; with any of these "written" (n,), the
parameters as the last step left them, "unit" of the gradients (see `lodo.bases`) and "reset_at", the step after which
learning began anew; "steps" taken and "skipped" (left out for bad gradients); "format" of this layout. Network and
momentum are float32, or float64 for groups with float64 parameters; the moments of the inner Adam and the momentum may
be bfloat16 instead. Momentum, trace and momenta are in the coordinates of the base, if that has its own.

On several ranks: the momentum of a parameter that is a DTensor is a DTensor like it, and is resharded with it by
torch.distributed.checkpoint. If the parameters are sharded, each shard has its own network, and all that is kept for
the group lies there under keys such as "theta_in_4_shards", as DTensors that are made of the ranks' own tensors (see
`lodo.sharding`); "shards" is their number and "format" is 3. A state from another number of shards (a plain one counts
as one) is loaded without its networks, which start anew. FSDP1's parameters do not tell which shard they are: there
"fsdp1_rank" holds the rank and the number of ranks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lodo import kernels, meta
from lodo.bases import BASES, AdamBase, next_unit
from lodo.composite import Composite
from lodo.flat import FlatParameters
from lodo.fused import put_together
from lodo.mixture import Mixture
from lodo.options import NETWORK
from lodo.preconditioners import BY_NAME, Operator, Preconditioner
from lodo.rounding import kept_dtype
from lodo.scalars import Cell, Number, choose, energy, is_tensor
from lodo.scale import Scale
from lodo.sharding import Sharding, local, rank_of_fsdp1, shown_as

FORMAT = 2  # 1 had no "steps", and no other moments than those of theta's dtype
SHARDED_FORMAT = 3
MOMENT_KEYS = ("theta_exp_avg", "theta_exp_avg_sq")
COUNT_KEYS = ("meta_step", "last_lr", "skipped", "steps")
SCALE_KEYS = ("scale", "moves", "scale_levels")
MIXTURE_KEYS = ("momenta", "mixture")
RECORD_KEYS = ("written", "unit", "reset_at")
TABLES = ("scale", "scale_levels", "mixture", "unit", "reset_at")
FLAGS = ("base_seen",)
EXTRA_KEYS = ("trace", "base_exp_avg_sq", "base_factors", *FLAGS, *SCALE_KEYS, *MIXTURE_KEYS, *RECORD_KEYS)
OTHER_GROUPS = """the state of a param group is that of other groups, whose networks act on other parameters; \
ZeroRedundancyOptimizer can go on with as many ranks as it was saved with"""

SINCE = "for a param group that has state with it"

State = dict[Any, dict[str, Any]]


@dataclass
class GroupState:
    """The live state of one param group. Its tensors are those in `optimizer.state`, or this rank's parts of them."""

    flat: FlatParameters
    preconditioner: Preconditioner
    moments: meta.Moments | None
    momentum: Tensor
    momentum_parts: list[Tensor]
    extras: dict[str, Tensor]  # what there is of EXTRA_KEYS
    meta_step: Cell
    last_lr: Cell
    skipped: Cell
    steps: Cell
    # Kept between steps to save allocations.
    gradient: Tensor = field(init=False)
    gradient_parts: list[Tensor] = field(init=False)
    operator: Operator = field(init=False)  # G / lr: the preconditioner, with base and scale if there are any
    scale: Scale | None = field(init=False, default=None)
    mixture: Mixture | None = field(init=False, default=None)
    lr: Cell = field(init=False)
    x: Tensor | None = field(init=False, default=None)  # the parameters, where what became of the last step counts
    x_parts: list[Tensor] = field(init=False)  # these four where there is that
    written_parts: list[Tensor] = field(init=False)
    unit_cell: Cell = field(init=False)
    reset_at: Cell = field(init=False)
    sizes: Sequence[Number] = field(init=False, default=())  # sums of squares of each tensor's gradient
    next_unit: Number = field(init=False, default=1.0)
    network_options: dict[str, Any] = field(init=False, default_factory=dict)  # of the group, that the network is of
    has_stepped: bool = field(init=False, default=False)  # so that all that kernels prepare is there
    # What stands in `optimizer.state`: the tensors for the whole group, and each parameter's momentum.
    kept: dict[str, Tensor] = field(init=False, default_factory=dict)
    kept_momentum: list[Tensor] = field(init=False, default_factory=list)
    # The DTensors among them, with the tensors of this rank that they are made of.
    _shown: list[tuple[Tensor, Tensor]] = field(init=False, default_factory=list)
    _places: dict[str, int] = field(init=False, default_factory=dict)  # where the extras lie in memory
    _watched: list[Tensor] | None = field(init=False, default=None)
    _versions: list[int] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.gradient = self.flat.new_vector()
        self.gradient_parts = self.flat.views(self.gradient)
        self.lr = Cell(torch.zeros_like(self.last_lr.tensor))
        pinned = self.flat.device.type == "cuda"
        self._mailbox = torch.empty((), dtype=torch.int64, device="cpu", pin_memory=pinned).copy_(self.skipped.tensor)
        self._skips_before = self._mailbox.numpy().tolist()
        first = self.momentum.data_ptr()
        self._offsets = [part.data_ptr() - first for part in self.momentum_parts]
        self._cuts = kernels.offsets(self.flat.lengths)
        self._is_native = kernels.native.available(self.gradient)

    def measure(self, group: dict[str, Any]) -> Number:
        """The sum of squares of the gradient, in the unit that it calls for, which is `next_unit` then."""
        if "unit" not in self.extras:
            return energy(self.gradient)
        found: Any
        if self._is_native:
            found = kernels.native.energies(self.gradient, self._cuts)
        else:
            found = kernels.energies(self.gradient, self.flat.lengths)
        self.sizes = found.unbind() if is_tensor(found) else found
        total: Number = found.sum() if is_tensor(found) else sum(found)
        if group["base"] is None:
            return total
        self.next_unit = next_unit(self.unit_cell.get(), total**0.5)
        return (total**0.5 / choose(self.next_unit > 0, self.next_unit, 1.0)) ** 2

    def idle(self, group: dict[str, Any], active: Number) -> Sequence[Number] | None:
        """For `lodo.mixture`: whether the gradient of each parameter is zero, if that of one is that has one."""
        if self.mixture is None:
            return None
        pairs = zip(self.sizes, group["params"], strict=True)
        flags = [(size == 0) & (p.grad is not None) & active for size, p in pairs]
        return flags if any(is_tensor(flag) or flag for flag in flags) else None

    def change_unit_(self, active: Number) -> None:
        """Brings the gradient, and what is kept of earlier ones, into the unit that `measure` has found."""
        cell = self.unit_cell
        before, unit = cell.get(), self.next_unit
        if is_tensor(unit):
            unit = torch.where(active, unit, before)
            cell.set(unit)
            self.gradient.div_(choose(unit > 0, unit, 1.0))
            return
        if unit != before:
            if before > 0:
                self.rescale_(unit)
            cell.set(unit)
        if unit > 0 and unit != 1:
            self.gradient.mul_(1 / unit)

    def new_skips(self) -> int:
        """How many steps were skipped since this state was made.

        On CUDA the count comes in by itself, some steps late: the host reads what has arrived and never waits.
        """
        self._mailbox.copy_(self.skipped.tensor, non_blocking=True)
        return int(self._mailbox.numpy()) - int(self._skips_before)

    def count(self) -> Number:
        """The steps taken, to compute with: a tensor is not of integers, whose powers would be of float32."""
        steps = self.steps.get()
        return steps.to(self.last_lr.tensor.dtype) if is_tensor(steps) else steps

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

    def missing_extras(self, group: dict[str, Any]) -> list[str]:
        """Which of EXTRA_KEYS the group's options ask for and are not there."""
        return [name for name in extras_of(group) if name not in self.extras]

    def start_extras(self, group: dict[str, Any]) -> None:
        """Makes what is missing of EXTRA_KEYS as it is before the first step."""
        missing = self.missing_extras(group)
        if not missing:
            return
        wanted, wide = shapes(self.flat.size, group), _wide(self.flat.device)
        for name in missing:
            dtype = torch.uint8 if name in FLAGS else wide if name in TABLES else self.flat.dtype
            self.extras[name] = torch.zeros(wanted[name], dtype=dtype, device=self.flat.device)
        if "trace" in missing:
            self.extras["trace"].copy_(self.momentum)
        if "written" in missing:
            with torch.no_grad():  # a constructor and `state_dict` come here too
                self.flat.gather(self.flat.tensors(group["params"]), self.flat.views(self.extras["written"]))
        if "base_exp_avg_sq" in missing:
            self._base(group).start_()
        if "mixture" in missing:
            self._mixture(group).start_(group["beta"])

    def _base(self, group: dict[str, Any]) -> AdamBase:
        return BASES[group["base"]](self.flat.shapes, self.extras, self.flat.dtypes)

    def _mixture(self, group: dict[str, Any]) -> Mixture:
        return Mixture(self.extras["momenta"], self.extras["mixture"], group["decays"], self.flat.lengths)

    def _put_together(self, group: dict[str, Any]) -> None:
        """Makes `operator` and `scale` of the present tensors, of whose memory they have views."""
        self.network_options = {name: group[name] for name in NETWORK}
        self._places = {name: tensor.data_ptr() for name, tensor in self.extras.items()}
        table = self.extras.get("scale")
        levels = self.extras.get("scale_levels")
        self.scale = None if table is None else Scale(table, self.extras["moves"], self.flat.lengths, levels)
        self.mixture = None if group["decays"] is None else self._mixture(group)
        if "written" in self.extras:
            self.x = self.flat.new_vector() if self.x is None else self.x  # a CUDA graph reads it where it was
            self.x_parts, self.written_parts = self.flat.views(self.x), self.flat.views(self.extras["written"])
            self.unit_cell, self.reset_at = Cell(self.extras["unit"]), Cell(self.extras["reset_at"])
        self.operator = self.preconditioner
        if group["base"] is not None or self.scale is not None:
            base = None if group["base"] is None else self._base(group)
            self.operator = put_together(self.preconditioner, base, self.scale, self.count(), self.flat.lengths)
        self._watched = None
        if self.operator is not self.preconditioner:
            tensors = (self.preconditioner.theta, *self.extras.values())
            self._watched = [tensor for tensor in tensors if not tensor.is_inference()]  # which have no versions
        self._versions = self._present_versions()

    @property
    def unit(self) -> Number:
        """What gradients, and all that is kept of them, are divided by (see `lodo.bases`)."""
        return self.operator.unit if isinstance(self.operator, Composite) else 1.0

    def age(self, steps: Number) -> Number | None:
        """Of so many steps, those since learning began anew; None where nothing beyond the paper learns."""
        return None if self.x is None else steps - self.reset_at.get()

    def reset_(self, group: dict[str, Any]) -> None:
        """Lets what learns ever more slowly begin anew, over the statistics of gradients that there are."""
        if "reset_at" not in self.extras:
            return
        self.reset_at.set(self.count())
        for name in ("scale", "moves", "mixture"):
            if name in self.extras:
                self.extras[name].zero_()
        if self.scale is not None:
            self.scale.levels.zero_()
        if self.mixture is not None:
            self.mixture.start_(group["beta"])
        if self.preconditioner.drift is not None:
            for tensor in (self.preconditioner.theta, *(self.moments or ()), self.meta_step.tensor):
                tensor.zero_()
        self._put_together(group)

    def rescale_(self, unit: float) -> None:
        """Makes this the unit of gradients. A power of two, so that no bit of what is kept is lost."""
        factor = self.unit / unit
        kept = [self.momentum, *(self.extras[name] for name in ("trace", "momenta") if name in self.extras)]
        pairs = [] if self.moments is None else [self.moments]
        if self.scale is not None:
            pairs.append((self.scale.table[1], self.scale.table[2]))
        for tensor in (*kept, *(mean for mean, _ in pairs)):
            tensor.mul_(factor)
        for _, square in pairs:
            square.mul_(factor * factor)
        if self.mixture is not None:  # of products of two
            self.mixture.table[1].mul_(factor**2)
            self.mixture.table[2].mul_(factor**4)
        if isinstance(self.operator, Composite) and self.operator.base is not None:
            self.operator.base.rescale_(factor)
        self.unit_cell.set(unit)

    def keep_momentum(self, momentum: Tensor) -> None:
        """Rounds the momentum of a step into the one that is kept, unless they are the same."""
        if momentum is not self.momentum:
            kernels.for_rounding(momentum).round_into_(self.momentum, momentum, self.steps.get())

    def seal(self) -> None:
        """Ends a step: what somebody else writes into the tensors from here on is seen."""
        self.has_stepped, self._versions = True, self._present_versions()

    def _present_versions(self) -> list[int] | None:
        """How often the tensors were written to that `operator` has computed something from; None if it has not."""
        return None if self._watched is None else [tensor._version for tensor in self._watched]

    def is_bound_to(self, state: State, group: dict[str, Any]) -> bool:
        """Whether `state` still holds these very tensors, in the dtypes that parameters and options ask for, and nobody
        else has written into them since they were bound or a step was taken."""
        if self._versions != self._present_versions():
            return False
        params = group["params"]
        entry = state[_carrier(params)]
        if self.momentum.dtype != kept_dtype(group["momentum_dtype"], self.flat.dtype):
            return False
        if not self.flat.fits(params) or any(entry.get(name) is not value for name, value in self.kept.items()):
            return False
        if any(self.extras[name].data_ptr() != place for name, place in self._places.items()):
            return False
        first = self.momentum.data_ptr()
        return all(
            state[p].get("momentum") is kept and part.data_ptr() - first == offset
            for p, kept, part, offset in zip(
                params, self.kept_momentum, self.momentum_parts, self._offsets, strict=True
            )
        ) and all(local(kept).data_ptr() == own.data_ptr() for kept, own in self._shown)

    def is_replaced(self, state: State, group: dict[str, Any]) -> bool:
        """Whether `state` holds another network and other counts for the group."""
        entry = entry_with_network(group, state)
        return entry is not None and all(entry.get(name) is not value for name, value in self.kept.items())

    def shared(self) -> dict[str, Tensor]:
        """The tensors that are kept for the whole group, by name."""
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
        return {**tensors, **self.extras}

    def publish(self, state: State, group: dict[str, Any]) -> None:
        """Puts the tensors into `optimizer.state`, those of shards as DTensors."""
        params, sharding = group["params"], self.flat.sharding
        self.kept_momentum = [shown_as(p, part) for p, part in zip(params, self.momentum_parts, strict=True)]
        former = entry_with_network(group, state)
        for p, kept in zip(params, self.kept_momentum, strict=True):
            state[p]["momentum"] = kept
        entry = state[_carrier(params)]
        if sharding is None:
            self.kept = self.shared()
            entry.update(self.kept, format=FORMAT)
            if (rank := rank_of_fsdp1(params)) is not None:
                entry["fsdp1_rank"] = torch.tensor(rank, device=self.flat.device)
        else:
            self.kept = sharding.spread(self.shared(), shapes(sharding.largest, group))
            self._work_on(sharding.opened(self.kept, shapes(self.flat.size, group)))
            # A one-dimensional tensor: torch cannot load a number that is not in the state it loads into.
            shards = torch.tensor([sharding.shards], device=self.flat.device)
            entry.update(self.kept, format=SHARDED_FORMAT, shards=shards)
        if former is not None and former is not entry:
            for name in (*self.kept, "format", "shards", "fsdp1_rank"):
                former.pop(name, None)
        own = [*self.shared().values(), *self.momentum_parts]
        pairs = zip([*self.kept.values(), *self.kept_momentum], own, strict=True)
        self._shown = [(kept, tensor) for kept, tensor in pairs if kept is not tensor]
        self._put_together(group)

    def _work_on(self, tensors: dict[str, Tensor]) -> None:
        """Makes these, by the names that `shared` gives, the tensors of the group."""
        self.preconditioner.theta = tensors["theta"]
        self.preconditioner.permutations_stored = tensors.get("permutations")
        if self.moments is not None:
            self.moments = (tensors[MOMENT_KEYS[0]], tensors[MOMENT_KEYS[1]])
        self.meta_step, self.last_lr, self.skipped, self.steps = (Cell(tensors[name]) for name in COUNT_KEYS)
        self.extras = {name: tensors[name] for name in self.extras}


def shapes(size: int, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of all that a group of `size` parameters may keep, by name."""
    kind = BY_NAME[group["preconditioner"]]
    theta, permutations = kind.theta_shape(size, group), kind.permutations_shape(size, group)
    indices = {} if permutations is None else {"permutations": permutations}
    extras = {
        "trace": (size,),
        "scale": (meta.ROWS, len(group["params"])),
        "moves": (size,),
        "scale_levels": (1 + len(group["params"]),),
        "written": (size,),
        "unit": (),
        "reset_at": (),
        **mixture_shapes(size, group),
        **base_shapes(size, group),
    }
    return {"theta": theta, **dict.fromkeys(MOMENT_KEYS, theta), **dict.fromkeys(COUNT_KEYS, ()), **indices, **extras}


def mixture_shapes(size: int, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of what a mixture of momenta keeps."""
    if group["decays"] is None:
        return {}
    count = len(group["decays"])
    return {"momenta": (count, size), "mixture": (meta.ROWS, count, len(group["params"]))}


def base_shapes(size: int, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of what the base preconditioner keeps."""
    if group["base"] is None:
        return {}
    return BASES[group["base"]].tensor_shapes(size, [local(p).shape for p in group["params"]])


def check_base(group: dict[str, Any]) -> None:
    """Refuses a base preconditioner that cannot be kept for shards: of factors their sizes would differ by rank.

    Raises:
        ValueError: for "soap" on sharded parameters.
    """
    params = group["params"]
    is_sharded = Sharding.of(params) is not None or (params and rank_of_fsdp1(params) is not None)
    if group["base"] == "soap" and is_sharded:
        raise ValueError(
            "base must be None or 'adam' for sharded parameters, whose shards have no factors of their own; got 'soap'"
        )


def check_kept_parts(group: dict[str, Any], kept: Iterable[str]) -> None:
    """Refuses to go on with another base than that of which these tensors are kept, and in whose coordinates and units
    momenta are, or without the mixture that they are of.

    Raises:
        ValueError: if the group's options ask for that.
    """
    found = next((kind for kind in reversed(BASES) if set(BASES[kind].names) <= set(kept)), None)
    if found != group["base"]:
        raise ValueError(f"base must stay {found!r} {SINCE}, got {group['base']!r}")
    if "momenta" in kept and group["decays"] is None:
        raise ValueError(f"decays must stay {SINCE}, got None")


def extras_of(group: dict[str, Any]) -> tuple[str, ...]:
    """Which of EXTRA_KEYS the options of a group ask for."""
    trace = ("trace",) if group["trace"] > 0 else ()
    base = () if group["base"] is None else BASES[group["base"]].names
    mixture = () if group["decays"] is None else MIXTURE_KEYS
    learned = (*base, *(SCALE_KEYS if group["scale_lr"] > 0 else ()), *mixture)
    return (*trace, *learned, *(RECORD_KEYS if learned else ()))


def uses_moments(group: dict[str, Any]) -> bool:
    return bool(group["meta_lr"] > 0 and group["meta_optimizer"] == "adam")


def needed(group: dict[str, Any]) -> tuple[str, ...]:
    """The names of what the group's options ask for beyond what every group has."""
    moments = MOMENT_KEYS if uses_moments(group) else ()
    return (*moments, *extras_of(group))


def has_all(group: dict[str, Any], live: GroupState) -> bool:
    """Whether there is all that the group's options ask for.

    Raises:
        ValueError: if they ask for another network or base, or for other decays, than is kept.
    """
    for name, old in live.network_options.items():
        if group[name] != old:
            raise ValueError(f"{name} must stay {old!r} {SINCE}, got {group[name]!r}")
    check_kept_parts(group, live.extras)
    if live.mixture is not None and live.mixture.decays_of != tuple(group["decays"]):
        raise ValueError(f"decays must stay {live.mixture.decays_of} {SINCE}, got {group['decays']!r}")
    return (not uses_moments(group) or live.has_moments(group)) and not live.missing_extras(group)


def _carrier(params: list[Tensor]) -> Tensor:
    """The parameter in whose state all that is kept for its group lies."""
    return next((p for p in params if p.requires_grad), params[0])


def entry_with_network(group: dict[str, Any], state: State) -> dict[str, Any] | None:
    """The state of the parameter that has what is kept for the group; None if there is none."""
    return next((state[p] for p in group["params"] if "format" in state.get(p, ())), None)


def entry_of(group: dict[str, Any], state: State) -> dict[str, Any]:
    """What is kept for a whole group, under the names that `GroupState.shared` gives; of a sharded one this rank's."""
    params = group["params"]
    sharding = Sharding.of(params)
    entry = entry_with_network(group, state)
    assert entry is not None
    return entry if sharding is None else sharding.opened(entry, shapes(local_size(params), group))


def is_bare(group: dict[str, Any], state: State) -> bool:
    """Whether `lodo.saved.amended` has left out the group's network."""
    return "theta" not in entry_of(group, state)


def lacks(names: tuple[str, ...], group: dict[str, Any], state: State) -> bool:
    """Whether there is state for a group, but not all of these."""
    return entry_with_network(group, state) is not None and not entry_of(group, state).keys() >= set(names)


def local_size(params: list[Tensor]) -> int:
    return sum(local(p).numel() for p in params)


def start(group: dict[str, Any], learned: Preconditioner | None = None) -> GroupState:
    """Fresh state for a group: its options' initial preconditioner, or a copy of a learned one.

    Raises:
        ValueError: if the learned one acts on another number of parameters, or if these are sharded.
    """
    if learned is not None and sum(p.numel() for p in group["params"]) == 0:
        raise ValueError(f"preconditioner was learned for {learned.size} parameters, but its param group holds 0")
    flat = FlatParameters(group["params"])
    if learned is not None and flat.sharding is not None:
        raise ValueError(
            f"preconditioner must be one of {', '.join(map(repr, BY_NAME))} for sharded parameters, got {learned!r}; "
            "load a state dict to go on from learned networks"
        )
    if learned is None:
        preconditioner = BY_NAME[group["preconditioner"]].start(flat.size, group, flat.dtype, flat.device)
    elif learned.size == flat.size:
        preconditioner = learned.to(flat.dtype, flat.device)
    else:
        raise ValueError(
            f"preconditioner was learned for {learned.size} parameters, but its param group holds {flat.size}"
        )
    momentum = flat.new_vector(kept_dtype(group["momentum_dtype"], flat.dtype))
    wide = _wide(flat.device)
    cells = [Cell(momentum.new_zeros((), dtype=dtype)) for dtype in (wide, wide, torch.int64, torch.int64)]
    return GroupState(flat, preconditioner, None, momentum, flat.views(momentum), {}, *cells)


def _wide(device: torch.device) -> torch.dtype:
    """The dtype of tables and counts: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def bind(group: dict[str, Any], state: State) -> GroupState:
    """Live state over what `state` holds for a group, moved and cast where the parameters have been.

    A change between float32 and float64 parameters converts network and momentum accordingly. If there is no network,
    because the saved one did not fit, a new one starts.

    Raises:
        RuntimeError: if the group has other parameters or options than its state was made for.
        ValueError: if it has another base, or no mixture any more.
    """
    params = group["params"]
    _check_bound(group, state)
    flat = FlatParameters(params)
    momentum = flat.new_vector(kept_dtype(group["momentum_dtype"], flat.dtype))
    parts = flat.views(momentum)
    flat.gather([local(state[p]["momentum"]) for p in params], parts)
    entry = entry_of(group, state)
    if "theta" not in entry:
        if group["base"] is not None:  # its unit and its coordinates are lost
            momentum.zero_()
        return replace(start(group), momentum=momentum, momentum_parts=parts)

    def here(name: str, dtype: torch.dtype | None = None) -> Any:
        value = entry.get(name)
        return None if value is None else value.to(flat.device, dtype).contiguous()

    theta = here("theta", flat.dtype)
    preconditioner = BY_NAME[group["preconditioner"]].wrap(theta, here("permutations"), flat.size)
    # Of the dtype they are of: whether they are to be cast is decided where they are used, here as without a reload.
    moments = None if MOMENT_KEYS[0] not in entry else (here(MOMENT_KEYS[0]), here(MOMENT_KEYS[1]))
    if "steps" not in entry:  # format 1
        entry["steps"] = torch.zeros_like(entry["skipped"])
    cells = [Cell(here(name)) for name in COUNT_KEYS]
    # The kernels take the tables for float64, whatever device the state comes from.
    dtypes = {**dict.fromkeys(TABLES, _wide(flat.device)), **dict.fromkeys(FLAGS, torch.uint8)}
    extras = {name: here(name, dtypes.get(name, flat.dtype)) for name in EXTRA_KEYS if name in entry}
    return GroupState(flat, preconditioner, moments, momentum, parts, extras, *cells)


def has_state(group: dict[str, Any], state: State) -> bool:
    """Whether there is state for a group.

    Raises:
        RuntimeError: if there is some for its parameters, but of other groups.
    """
    if entry_with_network(group, state) is not None:
        return True
    if any("momentum" in state.get(p, ()) for p in group["params"]):
        raise RuntimeError(OTHER_GROUPS)
    return False


def _check_bound(group: dict[str, Any], state: State) -> None:
    """Refuses state that was put into `optimizer.state` past `load_state_dict`, or that parameters or options were
    slipped under: kernels trust the shapes.

    Raises:
        RuntimeError: if it is not of a group of these parameters, with these options.
        ValueError: if the options ask for another base, or for no mixture.
    """
    params = group["params"]
    if any("momentum" not in state.get(p, ()) or state[p]["momentum"].shape != p.shape for p in params):
        raise RuntimeError(
            "the parameters of a param group have changed since its first step, and its network acts on those it had; "
            "use add_param_group for new ones"
        )
    entry, expected = entry_of(group, state), shapes(local_size(params), group)
    if "theta" in entry:
        check_kept_parts(group, entry)
    misfits = [name for name in expected if name in entry and tuple(entry[name].shape) != expected[name]]
    if "theta" in misfits or sum("format" in state[p] for p in params) > 1:
        raise RuntimeError(OTHER_GROUPS)
    for name in misfits:
        found = tuple(entry[name].shape)
        raise RuntimeError(
            f"{name} in the state of a param group has shape {found}, its options ask for {expected[name]}"
        )
