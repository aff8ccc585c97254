"""The eigenbasis of each matrix's gradients as a part of G: T = D^1/2 Q^T, `base="soap"` (Vyas et al., "SOAP", 2024).

D is Adam's second moment (`lodo.parts.second_moment`) of the gradients in the coordinates Q^T x; Q the eigenbasis of
Shampoo's factors. Q is orthogonal and acts on each tensor by itself: on a matrix X as Q_L X Q_R^T, where the columns of
Q_L are the eigenvectors of an average of g g^T, those of Q_R of g^T g; on tensors with more dimensions as on (first,
all others). Long sides have the leading eigenvectors only, beside coordinates close to their own (`lodo.parts.bases`,
with the rule that says who has what).

Null spaces. Averages of g g^T are singular at the first steps and wherever a row, a column or a combination of them
has no gradient. What is left of a gradient there is rounding, which 1 / sqrt(v) would make full steps of, so D is 0
where v is no more than rounding leaves, and elements that have had no gradient yet are left out of Q. So are elements
that a bound holds (somebody takes back their steps, and their gradient goes on pushing outwards): the steps of the
others would be made for theirs too (Bertsekas, "Projected Newton methods", 1982).

The optimizer computes in the coordinates Q^T x, in which T is diagonal: a gradient is turned into them as it comes in,
a step is turned back as it goes out, and what is kept in between is turned when Q changes.
"""

from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lodo.context import Cohort, Context
from lodo.declarations import Dtype, Kind, Options, Slot
from lodo.parts.bases import Basis, Member, basis_of, batched, numbers_of, sides_of
from lodo.parts.part import Layout, Undone
from lodo.parts.record import taken_back
from lodo.parts.second_moment import SecondMoment, forget_rate

BASIS_EVERY = 10  # steps between two updates of the eigenbases,
SETTLED = 250  # which doubles with every doubling of the steps from here on: bases change ever more slowly
GOLDEN = (5**0.5 - 1) / 2
FACTORS_EVERY = 2  # steps between two gradients that are taken into the averages of g g^T
UNSEEN, SEEN, HELD_FROM_BELOW, HELD_FROM_ABOVE = range(4)  # what is known of an element
PATIENCE = 10  # steps for which an element is taken to be held

FACTORS = Slot("factors", Kind.PACKED, sizes=numbers_of, powers=(2,))
EIGENBASIS = Slot("eigenbasis", Kind.PACKED, sizes=numbers_of)


class Eigenbasis(SecondMoment):
    """T = D^1/2 Q^T M, where M leaves out the elements that have had no gradient yet, for rotations would spread steps
    over them, and those that a bound holds. Waits for the device, to know whether it is time to update Q."""

    options = {}  # noqa: RUF012  (`base` is declared by SecondMoment)
    waits = True
    mark = "factors"

    @classmethod
    def is_used(cls, options: Options) -> bool:
        return bool(options["base"] == "soap")

    @classmethod
    def slots(cls, options: Options, found: Container[str] = ()) -> tuple[Slot, ...]:
        seen = Slot("seen", dtype=Dtype.FLAG, low=0, high=HELD_FROM_ABOVE)
        return (*super().slots(options, found), FACTORS, EIGENBASIS, seen)

    @classmethod
    def check(cls, options: Mapping[str, Any], is_flattened: bool = False) -> None:
        if options["capturable"]:
            raise ValueError(
                "base must be None or 'adam' with capturable=True, for 'soap' waits for the device; got 'soap'"
            )
        if is_flattened:
            raise ValueError(
                "base must be None or 'adam' for parameters of FullyShardedDataParallel, which it flattens, so that no "
                "matrix is left to have eigenbases; got 'soap'; fully_shard leaves them"
            )

    def __init__(self, layout: Layout, tensors: Mapping[str, Tensor], options: Options) -> None:
        super().__init__(layout, tensors, options)
        self._batches = [_Batch(members, tensors) for members in batched(layout.shapes, layout.room(EIGENBASIS))]

    def _rotated(self) -> set[int]:
        return {place for place, sides in enumerate(sides_of(self.layout.shapes)) if sides}

    def start_(self, missing: Mapping[str, Sequence[int]], x: Sequence[Tensor]) -> None:
        absent = set(missing["eigenbasis"])
        for batch in self._batches:
            if absent & {member.place for member in batch.members}:
                batch.begin_(absent)

    def rotate(self, v: Tensor) -> Tensor:
        """Q^T M v."""
        return self._turn_(v.clone(memory_format=torch.contiguous_format), back=False)

    def rotate_back_(self, v: Tensor) -> Tensor:
        """M Q v."""
        return self._turn_(v.contiguous(), back=True)

    def _turn_(self, v: Tensor, back: bool) -> Tensor:
        with _own_precision(v):
            for batch in self._batches:
                batch.turn_(batch.of(v), back)
        return v

    def update_basis_(self, g: Tensor, rotated: Tensor | None, kept: Sequence[Tensor], at: Context) -> Tensor:
        plans = {place: _Plan.of(cohort) for cohort in at.cohorts if cohort.active for place in cohort.places}
        rotated = self.rotate(g) if rotated is None else rotated
        with _own_precision(g):
            for batch in self._batches:
                own = [plans.get(member.place) for member in batch.members]
                batch.update_(own, batch.of(g), batch.of(rotated), kept)
        return rotated

    def correct_(self, g: Tensor, undone: Undone | None, at: Context) -> None:
        """Takes out of M, and out of the gradient, the elements that a bound holds.

        These are those whose last step was taken back, and whose gradient goes on as that did. They are let in again
        when their gradient turns, when somebody else moves them, and every PATIENCE steps, to see whether they are
        still held.
        """
        if undone is None and not any(batch.held for batch in self._batches):
            return
        # Each by itself, as in a box: of a projection that takes back some of all of them more would differ.
        new = None if undone is None else taken_back(undone, slack=1e-5) & (undone.step * g > 0)
        for batch in self._batches:
            gradients, news = batch.of(g), None if new is None else batch.of(new)
            for one, member in enumerate(batch.members):
                cohort = at.cohort_of(member.place)
                if cohort.active:
                    is_patient = bool(int(cohort.steps) % PATIENCE)
                    batch.hold_(one, gradients[one], None if news is None else news[one], is_patient)


class _Plan(NamedTuple):
    """What is due for the parameters of a cohort in this step."""

    steps: int
    interval: int  # between two updates of a basis
    takes: bool  # the averages are to take the gradient in
    weight: float  # that it then has

    @staticmethod
    def of(cohort: Cohort) -> "_Plan":
        t, age = int(cohort.steps), int(cohort.age)
        weight = 1 - (1 - float(forget_rate(cohort))) ** FACTORS_EVERY
        return _Plan(t, refresh_interval(age), t % FACTORS_EVERY == 0, weight)

    def is_due(self, phase: float) -> bool:
        """Whether bases with this phase are to be brought up to date."""
        return (self.steps + int(phase * self.interval)) % self.interval == 0


def phase_of(shape: tuple[int, int], axis: int) -> float:
    """The share of an interval, [0, 1), by which the bases of one side of such matrices are renewed earlier: so that no
    step renews all. It hangs on a tensor's shape alone, for its steps must not hang on which others are in its group,
    or on which process it is. The two sides are half an interval apart, shapes by the golden section, which spreads any
    of them."""
    rows, columns = shape
    return (GOLDEN * (rows + 3 * columns) + axis / 2) % 1


class _Batch:
    """Tensors of one shape (rows, columns) that lie at equal distances in the group, and their bases.

    Attributes:
        members: where they are.
        held: those, by their number in the batch, with elements that a bound holds.
    """

    def __init__(self, members: Sequence[Member], tensors: Mapping[str, Tensor]) -> None:
        self.members = members
        self._distance = members[1].start - members[0].start if len(members) > 1 else 0
        self._square, self._seen = self.of(tensors["exp_avg_sq"]), self.of(tensors["seen"])
        self._bases: list[Basis] = []
        self._phases = [phase_of(members[0].shape, side.axis) for side in members[0].sides]
        used = 0
        apart = members[1].packed - members[0].packed if len(members) > 1 else 0
        for side in members[0].sides:
            size = (len(members), side.length, side.rank)
            place = size, (apart, side.rank, 1), members[0].packed + used
            self._bases.append(
                basis_of(side, *(tensors[name].as_strided(*place) for name in ("factors", "eigenbasis")))
            )
            used += side.size
        # Those whose basis is still to come, with their first gradient, and those with elements that M leaves out.
        numbers = range(len(members))
        self._unstarted = {one for one in numbers if not self._seen[one].any()}
        self._masked = {one for one in numbers if bool((self._seen[one] != SEEN).any())}
        self.held = {one for one in numbers if bool((self._seen[one] > SEEN).any())}

    def of(self, vector: Tensor) -> Tensor:
        """The tensors' own of a contiguous vector (n,), as matrices (b, rows, columns) in the same memory."""
        rows, columns = self.members[0].shape
        begin = vector.storage_offset() + self.members[0].start
        return vector.as_strided((len(self.members), rows, columns), (self._distance, columns, 1), begin)

    def begin_(self, places: Container[int]) -> None:
        """Makes the bases of the tensors at some places the identity."""
        ones = [one for one, member in enumerate(self.members) if member.place in places]
        for basis in self._bases:
            basis.begin_(ones)

    def turn_(self, x: Tensor, back: bool = False) -> None:
        """Q^T M x of matrices (b, rows, columns), in place, or M Q x."""
        if self._masked and not back:
            x *= self._seen == SEEN
        found = x
        for basis in self._bases:
            found = basis.back_(found) if back else basis.ahead_(found)
        if found is not x:
            x.copy_(found)
        if self._masked and back:
            x *= self._seen == SEEN

    def update_(self, plans: Sequence[_Plan | None], g: Tensor, rotated: Tensor, kept: Sequence[Tensor]) -> None:
        """Takes the gradients g (b, rows, columns) into the averages, and brings the bases up to date, and with them
        what is kept and the gradients in their coordinates, `rotated`. No plan: such a tensor takes no step."""
        has_changed = self._see_(g) if self._masked else False
        started = self._start_(plans, g) if self._unstarted else set()
        if has_changed or started:
            self.turn_(rotated.copy_(g))
        self._learn_(plans, rotated, started)
        for one, plan in enumerate(plans):
            if plan is None or one in started or one in self._unstarted:
                continue
            for basis, phase in zip(self._bases, self._phases, strict=True):
                if plan.is_due(phase) and basis.is_off(one):
                    basis.refresh_(one, [rotated[one], *(self.of(vector)[one] for vector in kept)], self._square[one])

    def _start_(self, plans: Sequence[_Plan | None], g: Tensor) -> set[int]:
        """Makes the bases of first gradients that are not zero; returns whose."""
        started = set()
        for one in sorted(self._unstarted):
            plan = plans[one]
            if plan is not None and bool(g[one].any()):
                for basis in self._bases:
                    basis.start_(one, g[one], plan.weight)
                started.add(one)
        self._unstarted -= started
        return started

    def _learn_(self, plans: Sequence[_Plan | None], rotated: Tensor, started: Container[int]) -> None:
        if not started and all(plan == plans[0] for plan in plans):
            if plans[0] is not None and plans[0].takes:
                for basis in self._bases:
                    basis.learn_(rotated, plans[0].weight)
            return
        for one, plan in enumerate(plans):
            if plan is not None and plan.takes and one not in started:
                for basis in self._bases:
                    basis.learn_(rotated, plan.weight, one)

    def _see_(self, g: Tensor) -> bool:
        """Takes into M the elements that have a gradient; whether there are new ones."""
        has_changed = False
        for one in sorted(self._masked):
            seen = self._seen[one]
            now = torch.where((seen == UNSEEN) & (g[one] != 0), SEEN, seen)
            if not torch.equal(now, seen):
                has_changed = True
                seen.copy_(now)
                if bool((now == SEEN).all()):
                    self._masked.discard(one)
        return has_changed

    def hold_(self, one: int, g: Tensor, new: Tensor | None, is_patient: bool) -> None:
        """Takes note of the elements of one of the batch that a bound holds, and takes them out of its gradient."""
        seen = self._seen[one]
        if one in self.held:
            pushes = torch.where(seen == HELD_FROM_BELOW, g > 0, g < 0)
            stays = pushes if is_patient else torch.zeros_like(pushes)
            seen.masked_fill_((seen > SEEN) & ~stays, SEEN)
        if new is not None:
            seen.masked_fill_(new & (g > 0), HELD_FROM_BELOW).masked_fill_(new & (g < 0), HELD_FROM_ABOVE)
        is_out = seen > SEEN
        self.held.discard(one)
        if bool(is_out.any()):
            self.held.add(one)
            g.masked_fill_(is_out, 0)
        if bool((seen != SEEN).any()):
            self._masked.add(one)
        else:
            self._masked.discard(one)


def _own_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Where matrices are multiplied in their own precision, though `torch.autocast` be in force around it."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def refresh_interval(steps: int) -> int:
    """How many steps lie between two updates of the eigenbases, when so many were taken."""
    return BASIS_EVERY << max(0, (steps // SETTLED).bit_length() - 1)
