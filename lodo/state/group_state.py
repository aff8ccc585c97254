"""The live state of one param group: its tensors in `optimizer.state`, and what is made of them to take steps."""

from collections.abc import Mapping, Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from lodo import inner_optimizer, scalars
from lodo.context import Context
from lodo.declarations import Kind
from lodo.parts import Average, Momentum, Part, Record, parts_of
from lodo.preconditioners import BY_NAME, Composite, Operator, Preconditioner
from lodo.scalars import Number, energy, is_tensor, stacked
from lodo.state.counts import Counts
from lodo.state.flat import FlatParameters
from lodo.state.layout import Entry, State, StateLayout, allocate, carrier, dtype_of, views
from lodo.state.sharding import is_dtensor, local, rank_of_fsdp1, signature
from lodo.update import Plain, update_for

OTHER_GROUPS = """the state of a param group is that of several groups, whose networks act on other parameters; \
ZeroRedundancyOptimizer can go on with as many ranks as it was saved with"""

NETWORK_COUNTS = ("meta_step", "last_lr", "network_step")

_pointer, _version = Tensor.data_ptr, attrgetter("_version")


class Together(Protocol):
    """What is known of a group whose tensors have owners on several ranks (`lodo.state.owners`).

    Attributes:
        energy: the sum of squares of the gradients of all.
        size: the number of elements of all.
        ranks: what groups have in common that are stepped on by the same ranks.
    """

    energy: float
    size: int
    ranks: Any

    def norm(self, vector: Tensor) -> Number:
        """The length of the vectors of all ranks together."""


class GroupState:
    """The live state of one param group.

    It is made of what `optimizer.state` holds for the group's parameters; what is not there starts anew, parameter by
    parameter. Its tensors then are in `optimizer.state`, or are this rank's parts of what is there.

    Args:
        group: with its options.
        state: `optimizer.state`.
        learned: a network to start with a copy of.
        together: with whom, if the group is that of the tensors which this rank owns.

    Raises:
        ValueError, RuntimeError: if the state does not fit parameters or options; nothing has changed then.

    Attributes:
        tensors: by the names of the slots, each for all parameters of the group.
        network, parts, momentum, record: what steps are made with; no record without parts beyond the paper.
        average: of the iterates, if they are asked for.
        operator: G / lr.
        update: what executes steps.
        gradient, x: of the present step, shape (n,).
    """

    def __init__(
        self,
        group: dict[str, Any],
        state: State,
        learned: Preconditioner | None = None,
        together: Together | None = None,
    ) -> None:
        params, self.together = group["params"], together
        if learned is not None and sum(p.numel() for p in params) == 0:
            raise ValueError(f"preconditioner was learned for {learned.size} parameters, but its param group holds 0")
        self.flat = FlatParameters(params)
        entries = [state.get(p, {}) for p in params]
        self.layout = StateLayout(params, group, entries)
        self.options = {name: value for name, value in group.items() if name != "params"}
        network_entry = entry_with_network(params, state, self.layout)
        self.names = {slot.name for slot in self.layout.slots}
        self.has_lost_network = (
            learned is None
            and network_entry is None
            and not BY_NAME[group["preconditioner"]].is_elementwise
            and any(int(entry["step"]) > 0 for entry in entries if self.layout.has_taken_steps(entry))
        )
        self._check_shapes(entries, network_entry)
        if learned is not None:
            self._check_learned(learned)
        self.parts: list[Part] = []
        self.tensors, missing = self._gather(entries)
        self.network = self._start_network(group, network_entry, learned)
        self.moments = self._start_moments(network_entry)
        self._network_counts(network_entry)
        self._share_unit(missing)
        self._make_parts(group, missing)
        self._publish(params, state)
        self._make_update()

    # ---- from optimizer.state, and into it ------------------------------------------------------------------------

    def _gather(self, entries: Sequence[Entry]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
        """The tensors of all slots that belong to parameters, and the places where each was missing."""
        tensors: dict[str, Tensor] = {}
        missing: dict[str, list[int]] = {}
        for slot in self.layout.slots:
            if slot.kind is Kind.NETWORK:
                continue
            tensors[slot.name] = allocate(slot, self.options, self.flat.layout)
            missing[slot.name] = []
            for place, view in enumerate(views(slot, tensors[slot.name], self.flat.layout)):
                entry = entries[place]
                is_wanted = self.layout.has_taken_steps(entry) or slot.name == "momentum" or slot.outlives_shards
                found = self.layout.opened(slot, entry, place) if is_wanted else None
                if found is None:
                    missing[slot.name].append(place)
                else:
                    view.copy_(found)
        return tensors, missing

    def _start_network(
        self, group: dict[str, Any], entry: Entry | None, learned: Preconditioner | None
    ) -> Preconditioner:
        kind, flat = BY_NAME[group["preconditioner"]], self.flat
        if kind.is_elementwise:
            if learned is not None and learned.learns:
                self.tensors["theta"].copy_(learned.theta)
            theta = self.tensors.get("theta", torch.empty(0, dtype=flat.dtype, device=flat.device))
            return kind.wrap(theta, None, flat.size)
        slots = {slot.name: slot for slot in self.layout.slots}
        if learned is not None:
            return learned.to(flat.dtype, flat.device)
        if entry is None:
            return kind.start(flat.size, group, flat.dtype, flat.device)
        kept = self.layout.opened(slots["theta"], entry)
        assert kept is not None
        indices = None if "permutations" not in slots else self.layout.opened(slots["permutations"], entry)
        indices = None if indices is None else indices.to(flat.device, torch.int32).contiguous()
        return kind.wrap(kept.to(flat.device, flat.dtype).contiguous(), indices, flat.size)

    def _start_moments(self, entry: Entry | None) -> inner_optimizer.Moments | None:
        slots = [slot for slot in self.layout.slots if slot.name in ("theta_exp_avg", "theta_exp_avg_sq")]
        if not slots:
            return None
        if self.network.is_elementwise:
            return self.tensors[slots[0].name], self.tensors[slots[1].name]
        found = []
        for slot in slots:
            kept = None if entry is None else self.layout.opened(slot, entry)
            dtype = dtype_of(slot, self.options, self.flat.layout)
            if kept is None:
                found.append(torch.zeros_like(self.network.theta, dtype=dtype))
            else:
                found.append(kept.to(self.flat.device, dtype).contiguous())
        return found[0], found[1]

    def _network_counts(self, entry: Entry | None) -> None:
        """What a network that acts on the whole group counts for it."""
        for slot in self.layout.slots:
            if slot.kind is Kind.NETWORK and slot.name in NETWORK_COUNTS:
                kept = None if entry is None else self.layout.opened(slot, entry)
                dtype = dtype_of(slot, self.options, self.flat.layout)
                zero = torch.zeros((), dtype=dtype, device=self.flat.device)
                self.tensors[slot.name] = zero if kept is None else kept.to(self.flat.device, dtype)

    def _network_tensors(self) -> dict[str, Tensor]:
        """All tensors of a network that acts on the whole group."""
        if self.network.is_elementwise:
            return {}
        found = {name: self.tensors[name] for name in NETWORK_COUNTS}
        found["theta"] = self.network.theta
        if self.network.permutations_stored is not None:
            found["permutations"] = self.network.permutations_stored
        if self.moments is not None:
            found["theta_exp_avg"], found["theta_exp_avg_sq"] = self.moments
        return found

    def _share_unit(self, missing: Mapping[str, list[int]]) -> None:
        """Brings parameters that come from elsewhere into the unit of the others; new ones have nothing in any yet."""
        units = self.tensors.get("unit")
        if units is None:
            return
        known = [(place, unit) for place, unit in enumerate(units.tolist()) if place not in missing["unit"]]
        unit = next((unit for _, unit in known if unit > 0), 0.0)
        for place, own in known:
            if own not in (0.0, unit):
                self._rescale_(own / unit, [place])
        units.fill_(unit)

    def _make_parts(self, group: dict[str, Any], missing: Mapping[str, list[int]]) -> None:
        x = self.flat.tensors(group["params"])
        for kind in parts_of(group, self.layout.found):
            own = {slot.name: self.tensors[slot.name] for slot in kind.slots(group, self.layout.found)}
            part = kind(self.flat.layout, own, self.options)
            part.start_(missing, x)
            self.parts.append(part)
        self.momentum = next(part for part in self.parts if isinstance(part, Momentum))
        self.record = next((part for part in self.parts if isinstance(part, Record)), None)
        self.average = next((part for part in self.parts if isinstance(part, Average)), None)
        self._unit_part = next((part for part in self.parts if part.changes_gradients), None)
        self.waits = scalars.is_readable(self.tensors["step"]) or any(part.waits for part in self.parts)

    def _publish(self, params: Sequence[Tensor], state: State) -> None:
        """Puts the tensors into `optimizer.state`, those of shards as DTensors."""
        former = entry_with_network(params, state, self.layout)
        with_slots = [slot for slot in self.layout.slots if slot.kind is not Kind.NETWORK]
        self._kept: list[tuple[Tensor, Any, tuple[Any, ...]]] = []
        shown: list[list[Tensor]] = [[] for _ in params]
        for slot in with_slots:
            for place, own in enumerate(views(slot, self.tensors[slot.name], self.flat.layout)):
                shown[place].append(self.layout.shown(slot, own, place))
        keys = [self.layout.key(slot) for slot in with_slots]
        # Of its own memory: distributed checkpoints load in place, and one rank's over all of what is plain.
        self._to_read = [(self.tensors[slot.name].clone(), self.tensors[slot.name]) for slot in self.layout.read_slots]
        for place, (p, tensors) in enumerate(zip(params, shown, strict=True)):
            state[p].update(zip(keys, tensors, strict=True))
            for slot, (copies, _) in zip(self.layout.read_slots, self._to_read, strict=True):
                state[p][slot.name] = copies[place]
            self._kept.append((p, itemgetter(*keys), tuple(tensors)))
        self._views = [tensor for tensors in shown for tensor in tensors if not is_dtensor(tensor)]
        self._publish_network(params, state, former)
        tensors_by_id = {id(tensor): tensor for tensor in (*self.tensors.values(), *self._network_tensors().values())}
        buffers = list(tensors_by_id.values())
        dtensors = [local(tensor) for tensors in shown for tensor in tensors if is_dtensor(tensor)]
        self._owned = [*self._views, *buffers]
        self._pointers = list(map(_pointer, self._owned))
        self._watched = [tensor for tensor in (*buffers, *dtensors) if not tensor.is_inference()]  # these have versions

    def _publish_network(self, params: Sequence[Tensor], state: State, former: dict[str, Any] | None) -> None:
        self._carrier = carrier(params)
        entry = state[self._carrier]
        slots = {slot.name: slot for slot in self.layout.slots if slot.kind is Kind.NETWORK}
        if former is not None and former is not entry:
            for name in map(self.layout.key, slots.values()):
                former.pop(name, None)
        shards = signature(params)
        for p in params:
            state[p].pop("fsdp1_rank", None)
            # With each of them: they may be in other groups where this is loaded. A one-dimensional tensor: torch
            # cannot load a number that is not in the state it loads into.
            state[p]["shards"] = torch.tensor(shards, device=self.flat.device)
        own = self._network_tensors()
        shown = {self.layout.key(slots[name]): self.layout.shown(slots[name], own[name]) for name in own}
        entry.update(shown)
        if self.layout.sharding is not None and own:
            self._work_on({name: self.layout.opened(slots[name], entry) for name in own})
        if (rank := rank_of_fsdp1(params)) is not None:
            entry["fsdp1_rank"] = torch.tensor(rank, device=self.flat.device)
        if shown:
            self._kept.append((self._carrier, itemgetter(*shown), tuple(shown.values())))

    def _work_on(self, tensors: Mapping[str, Any]) -> None:
        """Makes these the tensors of the network."""
        self.network.theta = tensors["theta"]
        self.network.permutations_stored = tensors.get("permutations")
        if self.moments is not None:
            self.moments = (tensors["theta_exp_avg"], tensors["theta_exp_avg_sq"])
        for name in NETWORK_COUNTS:
            self.tensors[name] = tensors[name]

    def _make_update(self) -> None:
        """Makes operator and update of the present tensors, of whose memory they have views."""
        corrects = any(part.corrects_momentum for part in self.parts) and not self.momentum.is_corrected
        self.counts = Counts(self.tensors, self.flat.lengths, self.network.is_elementwise, corrects)
        factors = [part for part in self.parts if part.is_factor]
        self.operator: Operator = Composite(self.network, factors) if factors else self.network
        self.update: Plain = update_for(
            self.operator, self.network, self.moments, self.momentum, self.parts, self.flat.lengths
        )
        self.gradient = self.flat.new_vector()
        self.gradient_views = self.flat.views(self.gradient)
        self.x: Tensor | None = None
        if self.record is not None:
            self.x = self.flat.new_vector()
            self.x_views, self.written_views = self.flat.views(self.x), self.flat.views(self.record.written)
        self.sizes: Sequence[Number] = ()
        self.has_stepped = False  # so that all that kernels prepare is there
        with torch.no_grad():
            self.update.refresh_(self.resting())
        self.record_versions()

    def record_versions(self) -> None:
        """What somebody else writes into the tensors from here on is seen."""
        self._versions = list(map(_version, self._watched))
        for copies, table in self._to_read:
            copies.copy_(table)

    def is_bound_to(self, state: State, params: Sequence[Tensor]) -> bool:
        """Whether `state` still holds these very tensors for these parameters, and nobody else has written into them
        since they were bound or a step was taken."""
        if not self.flat.fits(params) or len(self._kept) < len(params):
            return False
        if carrier(params) is not self._carrier:
            return False
        if any(p is not own for p, (own, _, _) in zip(params, self._kept, strict=False)):
            return False
        try:
            for own, of_entry, tensors in self._kept:
                if not all(map(is_, of_entry(state[own]), tensors)):
                    return False
        except KeyError:
            return False
        return self._pointers == list(map(_pointer, self._owned)) and self._versions == list(
            map(_version, self._watched)
        )

    def is_replaced(self, state: State) -> bool:
        """Whether `state` holds other tensors for all parameters."""
        for p, of_entry, tensors in self._kept:
            try:
                found = of_entry(state[p]) if p in state else None
            except KeyError:
                return False
            if found is None or any(map(is_, found, tensors)):
                return False
        return True

    # ---- checks ---------------------------------------------------------------------------------------------------

    def _check_shapes(self, entries: Sequence[Entry], network_entry: Entry | None) -> None:
        """Refuses state that was put into `optimizer.state` past `load_state_dict`: kernels trust the shapes."""
        for slot in self.layout.slots:
            if slot.kind is Kind.NETWORK:
                pairs = [] if network_entry is None else [(0, network_entry)]
            else:
                pairs = [(place, entry) for place, entry in enumerate(entries) if self.layout.has_taken_steps(entry)]
            for place, entry in pairs:
                value = self.layout.opened(slot, entry, place)
                expected = self.layout.shape(slot, place)
                if value is None or tuple(value.shape) == expected:
                    continue
                if slot.name == "theta" and slot.kind is Kind.NETWORK:
                    raise RuntimeError(
                        f"the network of a param group has theta of shape {tuple(value.shape)}, as it was made for "
                        f"other parameters; for the {self.layout.size} elements that the group has now it would be "
                        f"{expected}; use add_param_group for new parameters, and ZeroRedundancyOptimizer with as many "
                        "ranks as the state was saved with"
                    )
                raise RuntimeError(
                    f"{slot.name} in the state of parameter {place} of a param group has shape "
                    f"{tuple(value.shape)}, its shape and options ask for {expected}"
                )

    def _check_learned(self, learned: Preconditioner) -> None:
        if self.flat.sharding is not None:
            raise ValueError(
                f"preconditioner must be one of {', '.join(map(repr, BY_NAME))} for sharded parameters, got "
                f"{learned!r}; load a state dict to go on from learned networks"
            )
        if learned.size != self.flat.size:
            raise ValueError(
                f"preconditioner was learned for {learned.size} parameters, but its param group holds {self.flat.size}"
            )

    # ---- a step ---------------------------------------------------------------------------------------------------

    def parameters(self, params: Sequence[Tensor]) -> Tensor:
        """The parameters as they are, shape (n,), in new memory."""
        x = self.flat.new_vector()
        self.flat.gather(self.flat.tensors(params), self.flat.views(x))
        return x

    def measure(self) -> Number:
        """The sum of squares of the gradient, in the unit that it calls for."""
        if self.record is not None:
            self.sizes = self.update.energies(self.gradient)
        total = self._energy()
        for part in self.parts if self.record is not None else ():
            total = part.normalize(total)
        return total

    def _energy(self) -> Number:
        """The sum of squares of the gradient, on all ranks that own a part of the group."""
        if self.together is not None:
            step = self.tensors["step"]
            of_all = self.together.energy
            return of_all if scalars.is_readable(step) else step.new_tensor(of_all, dtype=scalars.wide(step.device))
        if self.record is None:
            return energy(self.gradient)
        return stacked(self.sizes).sum() if any(map(is_tensor, self.sizes)) else sum(self.sizes)

    def begin(self, group: Mapping[str, Any], active: Number) -> Context:
        """Counts the step that is to be taken on the gradient that `measure` was called for."""
        has_gradient = [p.grad is not None for p in group["params"]]
        at = self.counts.begin(group, active, has_gradient)
        if not self.momentum.coasts:
            return at
        idle = [(size == 0) & has & active for size, has in zip(self.sizes, has_gradient, strict=True)]  # type: ignore[operator]
        return at._replace(idle=idle) if any(is_tensor(flag) or flag for flag in idle) else at

    def resting(self) -> Context:
        """What is known between two steps."""
        return self.counts.resting(self.options)._replace(unit=self.unit)

    @property
    def unit(self) -> Number:
        """What gradients, and all that is kept of them, are divided by."""
        return 1.0 if self._unit_part is None else self._unit_part.unit

    def change_unit_(self, active: Number) -> Number:
        """Brings the gradient, and what is kept of earlier ones, into the unit that `measure` has found: that."""
        for part in self.parts:
            factor = part.change_unit_(self.gradient, active)
            if factor != 1:
                self._rescale_(factor)
        return self.unit

    def _rescale_(self, factor: float, places: Sequence[int] | None = None) -> None:
        """Multiplies all that is kept of gradients, at these places (None: all), by a power of two: no bit is lost."""
        for slot in self.layout.slots:
            if not any(slot.powers) or (slot.kind is Kind.NETWORK and places is not None):
                continue
            if slot.kind is Kind.NETWORK:
                tensors = [self._network_tensors()[slot.name]]
            else:
                tensors = views(slot, self.tensors[slot.name], self.flat.layout)
                tensors = tensors if places is None else [tensors[place] for place in places]
            for tensor in tensors:
                if len(slot.powers) == 1:
                    tensor.mul_(factor ** slot.powers[0])
                else:
                    for row, power in zip(tensor.unbind(), slot.powers, strict=True):
                        row.mul_(factor**power)
        if self.parts:
            self.momentum.load_()

    def reset_(self) -> None:
        """Lets what learns ever more slowly begin anew, over the statistics of gradients that there are."""
        for part in self.parts:
            part.reset_()
        if self.record is None:
            return
        if self.network.rate_cap is not None:
            for tensor in (self.network.theta, *(self.moments or ()), self.tensors["meta_step"]):
                tensor.zero_()
        self.counts.reset_()
        self._make_update()


def entry_with_network(params: Sequence[Tensor], state: State, layout: StateLayout) -> dict[str, Any] | None:
    """The state of the parameter that has the network of a group that acts on all of it; None if there is none.

    Raises:
        RuntimeError: if there are several.
    """
    slot = next((slot for slot in layout.slots if slot.name == "theta" and slot.kind is Kind.NETWORK), None)
    if slot is None:
        return None
    found = [state[p] for p in params if layout.key(slot) in state.get(p, ())]
    if len(found) > 1:
        raise RuntimeError(OTHER_GROUPS)
    return found[0] if found else None


def has_state(params: Sequence[Tensor], state: State) -> bool:
    """Whether there is state of LODO's for any of these parameters."""
    return any("momentum" in state.get(p, ()) for p in params)
