"""The eigenbasis of each matrix's gradients as a part of G: T = D^1/2 Q^T, `base="soap"` (Vyas et al., "SOAP", 2024).

D is Adam's second moment (`lodo.parts.second_moment`) of the gradients in the coordinates Q^T x; Q the eigenbasis of
Shampoo's factors. Q is orthogonal and acts on each tensor by itself: on a matrix X as Q_L X Q_R^T, where the columns of
Q_L are the eigenvectors of an average of g g^T, those of Q_R of g^T g; on tensors with more dimensions as on (first,
all others).

Null spaces. Averages of g g^T are singular at the first steps and wherever a row, a column or a combination of them
has no gradient. What is left of a gradient there is rounding, which 1 / sqrt(v) would make full steps of, so D is 0
where v is no more than rounding leaves, and elements that have had no gradient yet are left out of Q. So are elements
that a bound holds (somebody takes back their steps, and their gradient goes on pushing outwards): the steps of the
others would be made for theirs too (Bertsekas, "Projected Newton methods", 1982).

The optimizer computes in the coordinates Q^T x, in which T is diagonal: a gradient is turned into them as it comes in,
a step is turned back as it goes out, and what is kept in between is turned when Q changes.
"""

import math
from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lodo.context import Cohort, Context
from lodo.declarations import Dtype, Kind, Options, Slot
from lodo.parts.part import Layout, Undone
from lodo.parts.record import taken_back
from lodo.parts.second_moment import SecondMoment, forget_rate
from lodo.scalars import wide

BASIS_EVERY = 10  # steps between two updates of the eigenbases,
SETTLED = 500  # which doubles with every doubling of the steps from here on: bases change ever more slowly
FACTORS_EVERY = 2  # steps between two gradients that are taken into the averages of g g^T
SKEWNESS = 2  # a side has an eigenbasis if its square has at most so many times the elements of the tensor
LARGEST_SIDE = 2048
LARGEST_VECTOR = 512  # elements of a group without a matrix whose vectors have full eigenbases
UNSEEN, SEEN, HELD_FROM_BELOW, HELD_FROM_ABOVE = range(4)  # what is known of an element
PATIENCE = 10  # steps for which an element is taken to be held
SHIFT = 4.0  # roundings of the largest eigenvalue that null spaces are given, so that they keep their coordinates


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
        factors = Slot("factors", Kind.PACKED, sizes=_factor_sizes, powers=(2,))
        eigenbasis = Slot("eigenbasis", Kind.PACKED, sizes=_factor_sizes)
        seen = Slot("seen", dtype=Dtype.FLAG, low=0, high=HELD_FROM_ABOVE)
        return (*super().slots(options, found), factors, eigenbasis, seen)

    @classmethod
    def check(cls, options: Mapping[str, Any], is_sharded: bool = False) -> None:
        if options["capturable"]:
            raise ValueError(
                "base must be None or 'adam' with capturable=True, for 'soap' waits for the device; got 'soap'"
            )
        if is_sharded:
            raise ValueError(
                "base must be None or 'adam' for sharded parameters, whose shards have no factors of their own; got "
                "'soap'"
            )

    def __init__(self, layout: Layout, tensors: Mapping[str, Tensor], options: Options) -> None:
        super().__init__(layout, tensors, options)
        self._factored: list[_Factored] = []
        averages, bases, used = tensors["factors"], tensors["eigenbasis"], 0
        seen = tensors["seen"].split_with_sizes(self._lengths)
        squares = self.exp_avg_sq.split_with_sizes(self._lengths)
        for place, (shape, sides) in enumerate(zip(layout.shapes, _sides(layout.shapes), strict=True)):
            factors = []
            for side, length in sides:
                own = slice(used, used + length * length)
                square = (length, length)
                factors.append(_Factor(side, averages[own].view(square), bases[own].view(square)))
                used += length * length
            if factors:
                matrix = (shape[0], shape.numel() // shape[0])
                self._factored.append(
                    _Factored(place, matrix, factors, squares[place].view(matrix), seen[place].view(matrix))
                )
        self._others = sorted(set(range(len(layout.shapes))) - {each.place for each in self._factored})
        # Those whose basis is still to come, with their first gradient, and those with elements that M leaves out.
        self._unstarted = {each.place for each in self._factored if not each.seen.any()}
        self._masked = {each.place for each in self._factored if bool((each.seen != SEEN).any())}
        self._held = {each.place for each in self._factored if bool((each.seen > SEEN).any())}

    def _rotated(self) -> set[int]:
        return {place for place, sides in enumerate(_sides(self.layout.shapes)) if sides}

    def start_(self, missing: Mapping[str, Sequence[int]], x: Sequence[Tensor]) -> None:
        for each in self._factored:
            if each.place in missing["eigenbasis"]:
                for factor in each.factors:
                    factor.basis.fill_diagonal_(1)

    def rotate(self, v: Tensor) -> Tensor:
        """Q^T M v."""
        return self._turned(v, back=False)

    def rotate_back(self, v: Tensor) -> Tensor:
        """M Q v."""
        return self._turned(v, back=True)

    def _turned(self, v: Tensor, back: bool) -> Tensor:
        v = v.contiguous()
        turned = torch.empty_like(v)
        before, after = v.split_with_sizes(self._lengths), turned.split_with_sizes(self._lengths)
        if self._others:
            torch._foreach_copy_([after[place] for place in self._others], [before[place] for place in self._others])
        with _own_precision(v):
            for place, shape, (*firsts, last), _, seen in self._factored:
                matrix, found = before[place].view(shape), after[place].view(shape)
                is_masked = place in self._masked
                if is_masked and not back:
                    matrix = matrix * (seen == SEEN)
                for factor in firsts:
                    matrix = factor.times(matrix, factor.back if back else factor.ahead)
                last.times(matrix, last.back if back else last.ahead, out=found)
                if is_masked and back:
                    found.mul_(seen == SEEN)
        return turned

    def _matrices(self, vectors: Tensor) -> list[Tensor]:
        """The parts of contiguous vectors (..., n) that have factors, as matrices that share their memory."""
        parts = vectors.split_with_sizes(self._lengths, dim=-1)
        return [parts[each.place].view(*vectors.shape[:-1], *each.shape) for each in self._factored]

    def update_basis_(self, g: Tensor, rotated: Tensor | None, kept: Sequence[Tensor], at: Context) -> Tensor | None:
        plans = [_Plan.of(cohort) for cohort in at.cohorts if cohort.active]
        is_due, takes = any(plan.is_due for plan in plans), any(plan.takes for plan in plans)
        if not (is_due or takes or self._unstarted or self._masked):
            return rotated
        gradients = self._matrices(g)
        has_changed = self._see(gradients) if self._masked else False
        matrices = [self._matrices(vectors) for vectors in kept] if is_due else []
        by_place = {place: plan for plan in plans for place in plan.places}
        for index, (each, gradient) in enumerate(zip(self._factored, gradients, strict=True)):
            plan = by_place.get(each.place)
            if plan is None:
                continue
            is_first = each.place in self._unstarted and bool(gradient.any())
            if is_first or plan.takes:
                each.learn_(gradient, plan.weight)
            if is_first or (plan.is_due and each.place not in self._unstarted):
                with _own_precision(g):
                    each.refresh_([own[index] for own in matrices], is_first)
                has_changed = True
            if is_first:
                self._unstarted.discard(each.place)
        return None if has_changed else rotated

    def _see(self, gradients: Sequence[Tensor]) -> bool:
        """Takes into M the elements that have a gradient; whether there are new ones."""
        has_changed = False
        for each, gradient in zip(self._factored, gradients, strict=True):
            if each.place in self._masked:
                seen = torch.where((each.seen == UNSEEN) & (gradient != 0), SEEN, each.seen)
                if not torch.equal(seen, each.seen):
                    has_changed = True
                    each.seen.copy_(seen)
                    if bool((seen == SEEN).all()):
                        self._masked.discard(each.place)
        return has_changed

    def correct_(self, g: Tensor, undone: Undone | None, at: Context) -> None:
        """Takes out of M, and out of the gradient, the elements that a bound holds.

        These are those whose last step was taken back, and whose gradient goes on as that did. They are let in again
        when their gradient turns, when somebody else moves them, and every PATIENCE steps, to see whether they are
        still held.
        """
        if undone is None and not self._held:
            return
        gradients = self._matrices(g)
        news: list[Tensor | None] = [None] * len(gradients)
        if undone is not None:
            # Each by itself, as in a box: of a projection that takes back some of all of them more would differ.
            news = list(self._matrices(taken_back(undone, slack=1e-5) & (undone.step * g > 0)))
        for each, gradient, new in zip(self._factored, gradients, news, strict=True):
            if not at.cohort_of(each.place).active:
                continue
            if each.place in self._held:
                pushes = torch.where(each.seen == HELD_FROM_BELOW, gradient > 0, gradient < 0)
                is_patient = int(at.cohort_of(each.place).steps) % PATIENCE
                stays = pushes if is_patient else torch.zeros_like(pushes)
                each.seen.masked_fill_((each.seen > SEEN) & ~stays, SEEN)
            if new is not None:
                each.seen.masked_fill_(new & (gradient > 0), HELD_FROM_BELOW).masked_fill_(
                    new & (gradient < 0), HELD_FROM_ABOVE
                )
            is_out = each.seen > SEEN
            self._held.discard(each.place)
            if bool(is_out.any()):
                self._held.add(each.place)
                gradient.masked_fill_(is_out, 0)
            if bool((each.seen != SEEN).any()):
                self._masked.add(each.place)
            else:
                self._masked.discard(each.place)


class _Plan(NamedTuple):
    """What is due for the parameters of a cohort in this step."""

    places: Sequence[int]
    is_due: bool  # the eigenbases are to be refreshed
    takes: bool  # the averages are to take the gradient in
    weight: float  # that it then has

    @staticmethod
    def of(cohort: Cohort) -> "_Plan":
        t, age = int(cohort.steps), int(cohort.age)
        weight = 1 - (1 - float(forget_rate(cohort))) ** FACTORS_EVERY
        return _Plan(cohort.places, t % refresh_interval(age) == 0, t % FACTORS_EVERY == 0, weight)


class _Factor:
    """Of one side of a tensor: 0 for rows or 1 for columns.

    Attributes:
        average: of g g^T or g^T g.
        basis: its eigenvectors, in the columns.
        ahead, back: what `times` turns a matrix with into their coordinates, and back.
    """

    def __init__(self, side: int, average: Tensor, basis: Tensor) -> None:
        self.side, self.average, self.basis = side, average, basis
        self.ahead, self.back = (basis.T, basis) if side == 0 else (basis, basis.T)

    def times(self, matrix: Tensor, operand: Tensor, out: Tensor | None = None) -> Tensor:
        """A matrix, or several, multiplied on this side."""
        return torch.matmul(*((operand, matrix) if self.side == 0 else (matrix, operand)), out=out)

    def learn_(self, matrix: Tensor, weight: float) -> None:
        """Takes a gradient into the average."""
        one, other = (matrix, matrix.T) if self.side == 0 else (matrix.T, matrix)
        self.average.addmm_(one, other, beta=1 - weight, alpha=weight)

    def refresh_(self, is_first: bool) -> Tensor:
        """Brings the eigenvectors up to date; returns what `times` turns matrices in the old ones' coordinates into
        theirs with."""
        new = _eigenbasis(self.average, self.basis) if is_first else _improved(self.average, self.basis)
        turn = new.T @ self.basis
        self.basis.copy_(new)
        return turn if self.side == 0 else turn.T


class _Factored(NamedTuple):
    """A tensor that has factors: its place in the group, its shape as a matrix, its v in the coordinates of the
    factors, and which of its elements have had a gradient (uint8)."""

    place: int
    shape: tuple[int, int]
    factors: list[_Factor]
    square: Tensor
    seen: Tensor

    def learn_(self, matrix: Tensor, weight: float) -> None:
        """Takes its gradient into the averages."""
        for factor in self.factors:
            factor.learn_(matrix, weight)

    def refresh_(self, kept: Sequence[Tensor], is_first: bool) -> None:
        """Brings the eigenvectors up to date, and turns matrices along.

        v goes along as if gradients were uncorrelated in the old ones: what stayed behind would not fit the momenta,
        least of all in a null space.
        """
        for factor in self.factors:
            turn = factor.refresh_(is_first)
            for matrix in kept:
                matrix.copy_(factor.times(matrix, turn))
            self.square.copy_(factor.times(self.square, turn * turn))


def _factor_sizes(shapes: Sequence[torch.Size]) -> list[int]:
    """How many numbers the factors of each parameter have: a square matrix for each side."""
    return [sum(length * length for _, length in own) for own in _sides(shapes)]


def _own_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Where matrices are multiplied in their own precision, though `torch.autocast` be in force around it."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _sides(shapes: Sequence[torch.Size]) -> list[list[tuple[int, int]]]:
    """The sides of each tensor that have an eigenbasis, as (0 for rows or 1 for columns, length).

    Bounded by the tensor's own size, so that what is kept is at most 2 * 2 * SKEWNESS numbers for an element. Only a
    small group of nothing but vectors has full bases; all biases and norms of a model are no such group.
    """
    has_full = all(len(shape) < 2 for shape in shapes) and sum(shape.numel() for shape in shapes) <= LARGEST_VECTOR
    found: list[list[tuple[int, int]]] = []
    for shape in shapes:
        size, own = shape.numel(), []
        if len(shape) > 1 and size > 0:
            lengths = (shape[0], size // shape[0])
            own = [(side, d) for side, d in enumerate(lengths) if 1 < d <= LARGEST_SIDE and d * d <= SKEWNESS * size]
        elif len(shape) == 1 and has_full and size > 1:
            own = [(0, size)]
        found.append(own)
    return found


def refresh_interval(steps: int) -> int:
    """How many steps lie between two updates of the eigenbases, when so many were taken."""
    return BASIS_EVERY << max(0, (steps // SETTLED).bit_length() - 1)


def _eigenbasis(average: Tensor, fallback: Tensor) -> Tensor:
    """Eigenvectors in the columns, the largest eigenvalue first; of singular averages some.

    In float64, for decompositions of singular float32 matrices fail or return NaN; with a little of the identity if
    that does too, and `fallback` if nothing helps.
    """
    float64 = wide(average.device)
    scaled = average.to(float64)
    scaled = scaled / scaled.diagonal().mean().clamp(min=torch.finfo(float64).tiny)
    for shift in (0.0, 1e-12, 1e-6):
        try:
            found = torch.linalg.eigh(scaled + shift * torch.eye(len(scaled), dtype=float64, device=scaled.device))[1]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # torch.linalg.LinAlgError is one
            continue
        if _is_orthogonal(found):
            return found.flip(1).to(fallback.dtype)
    return fallback.clone()


def _improved(average: Tensor, basis: Tensor) -> Tensor:
    """One step of orthogonal iteration. The signs stay, so that coordinates mean the same before and after.

    `basis` if the decomposition fails.
    """
    scaled = average / average.diagonal().sum().clamp(min=torch.finfo(average.dtype).tiny)
    q, r = torch.linalg.qr(torch.addmm(basis, scaled, basis, beta=SHIFT * torch.finfo(basis.dtype).eps))
    if not math.isfinite(float(q.sum())):
        return basis.clone()
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)


def _is_orthogonal(q: Tensor) -> bool:
    """Whether it is, to a thousandth: what is not finite is not."""
    return bool((q.T @ q - torch.eye(len(q), dtype=q.dtype, device=q.device)).abs().amax() < 1e-3)
