"""Base preconditioners: what is known about the curvature before anything is learned, from statistics of gradients.

A base is a factor T (n, n) of G = lr * T^T U^T U T. With an untrained U the step is that of a known optimizer, until at
step MEMORY / FORGET its averages begin to last longer:

    "adam"   T = D^1/2        D = 1 / (sqrt(v) + eps), v Adam's second moment (Kingma and Ba, 2015)
    "soap"   T = D^1/2 Q^T    the same in the eigenbasis Q of Shampoo's factors (Vyas et al., "SOAP", 2024)

Q is orthogonal and acts on each tensor by itself: on a matrix X as Q_L X Q_R^T, where the columns of Q_L are the
eigenvectors of an average of g g^T, those of Q_R of g^T g; on tensors with more dimensions as on (first, all others).

Null spaces. Averages of g g^T are singular at the first steps and wherever a row, a column or a combination of them
has no gradient. What is left of a gradient there is rounding, which 1 / sqrt(v) would make full steps of, so D is 0
where v is no more than rounding leaves (`_rounding`), and elements that have had no gradient yet are left out of Q. So
are elements that a bound holds (somebody takes back their steps, and their gradient goes on pushing outwards): the
steps of the others would be made for theirs too (Bertsekas, "Projected Newton methods", 1982).

The size of gradients. v is of g / unit, and so is all that is kept of gradients: a power of two, 1 if the first
gradients are of ordinary size (`next_unit`). And v is raised at once where the momentum outgrows it (`settle_`), as
after a jump of the loss's scale: |m|^2 is at most LONGEST^2 times the sum of v over each tensor.

The optimizer computes in the coordinates Q^T x, in which T is diagonal: a gradient is turned into them as it comes in,
a step is turned back as it goes out, and what is kept in between is turned when Q changes.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lodo import meta
from lodo.scalars import Cell, Number, choose, is_tensor

FORGET = 1e-3  # share of v, and of the averages of g g^T, that a step replaces
MEMORY = 10.0  # but at step t at most MEMORY / t: later these are averages over a tenth of the steps
EPS = 1e-8
BASIS_EVERY = 10  # steps between two updates of the eigenbases,
SETTLED = 500  # which doubles with every doubling of the steps from here on: bases change ever more slowly
FACTORS_EVERY = 2  # steps between two gradients that are taken into the averages of g g^T
SKEWNESS = 2  # a side has an eigenbasis if its square has at most so many times the elements of the tensor
LARGEST_SIDE = 2048
LARGEST_VECTOR = 512  # elements of a group without a matrix whose vectors have full eigenbases
LONGEST = 4.0  # norm of a tensor's momentum, over the root of the sum of its v
ORDINARY = 2.0**8  # norms of gradients between its inverse and itself are taken as they are,
GROWTH = 2.0**20  # and may grow to so many units before the unit does
LARGEST_UNIT = 2.0**96  # and its inverse the smallest
UNSEEN, SEEN, HELD_FROM_BELOW, HELD_FROM_ABOVE = range(4)  # what `SoapBase` knows of an element
PATIENCE = 10  # steps for which an element is taken to be held
SHIFT = 4.0  # roundings of the largest eigenvalue that null spaces are given, so that they keep their coordinates

Shapes = dict[str, tuple[int, ...]]


class AdamBase:
    """T = D^1/2, diagonal. Takes the tensors that `tensor_shapes` names, and advances them in place."""

    kind: ClassVar[str] = "adam"
    names: ClassVar[tuple[str, ...]] = ("base_exp_avg_sq",)

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        tensors: dict[str, Tensor],
        dtypes: Sequence[torch.dtype] | None = None,
    ) -> None:
        self.exp_avg_sq = tensors["base_exp_avg_sq"]
        self._unit = Cell(tensors["unit"]) if "unit" in tensors else None
        self._lengths = [shape.numel() for shape in shapes]
        v = self.exp_avg_sq
        self._counts = torch.tensor(self._lengths, dtype=v.dtype, device=v.device).clamp(min=1)
        own = [self.exp_avg_sq.dtype] * len(shapes) if dtypes is None else dtypes
        kept = self._rotated(shapes)
        shares = [_rounding(d, self.exp_avg_sq.dtype, n) for d, n in zip(own, self._lengths, strict=True)]
        self.shares = [share if place in kept else 0.0 for place, share in enumerate(shares)]
        """Of the sum of v over each tensor: where v is no more than this, it is rounding."""

    @classmethod
    def tensor_shapes(cls, size: int, shapes: Sequence[torch.Size]) -> Shapes:
        """What is kept between steps, by `names`, for parameters of these shapes, `size` elements in all."""
        return {"base_exp_avg_sq": (size,)}

    @staticmethod
    def _rotated(shapes: Sequence[torch.Size]) -> set[int]:
        """The places of the tensors on which Q is not the identity."""
        return set()

    @property
    def unit(self) -> Number:
        """What gradients are divided by before they come in here; 1 before the first."""
        unit = 1.0 if self._unit is None else self._unit.get()
        return choose(unit > 0, unit, 1.0)

    def start_(self) -> None:
        """Makes zeros what is to be before the first gradient."""

    def rescale_(self, factor: float) -> None:
        """Brings what is kept of gradients into another unit, `factor` times as small."""
        self.exp_avg_sq.mul_(factor * factor)

    def rotate(self, v: Tensor) -> Tensor:
        """Q^T v, shape (n,)."""
        return v

    def rotate_back(self, v: Tensor) -> Tensor:
        """Q v, shape (n,)."""
        return v

    def turn_(
        self,
        g: Tensor,
        rotated: Tensor | None,
        kept: Sequence[Tensor],
        active: Number,
        steps: Number,
        age: Number | None = None,
    ) -> Tensor:
        """Takes a gradient into what Q is made of, and brings Q up to date.

        Args:
            g: shape (n,).
            rotated: Q^T g, or None if nobody has computed it.
            kept: shape (..., n), vectors in the coordinates of Q, turned in place into those of the Q that comes out.
            active: whether to, 0 or 1.
            steps: that were taken, this one included.
            age: of them, those since learning began anew; None for all.

        Returns:
            Q^T g of the Q that comes out.
        """
        return self.rotate(g) if rotated is None else rotated

    def take_in_(self, rotated: Tensor, active: Number, steps: Number, age: Number | None = None) -> None:
        """v <- v + weight * ((Q^T g)^2 - v), for Q^T g of shape (n,); arguments as for `turn_`."""
        weight = active * self.numbers(steps, age)[0]
        weight = weight.to(rotated.dtype) if is_tensor(weight) else weight
        self.exp_avg_sq.lerp_(rotated * rotated, weight)

    def hold_(self, g: Tensor, steps: Number, is_held: Tensor | None = None) -> None:
        """Leaves out elements that a bound holds; here they keep nobody else's steps from being their own."""

    def settle_(self, m: Tensor, bias: Number, steps: Number, active: Number = True) -> None:
        """Raises v on every tensor whose |m / bias|^2 is more than LONGEST^2 times the sum of its corrected v."""
        parts = self.exp_avg_sq.split(self._lengths)
        squares = torch.stack(torch._foreach_norm(list(parts), 1.0)) / self.numbers(steps)[1]
        momenta = torch.stack(torch._foreach_norm(list(m.split(self._lengths)))) / bias
        factors = (momenta / LONGEST).square() / squares
        is_due = (factors > 1) & factors.isfinite()
        factors = torch.where(is_due & (active > 0) if is_tensor(active) else is_due, factors, 1.0)
        if factors.device.type != "cpu" or bool((factors > 1).any()):
            torch._foreach_mul_(list(parts), list(factors.unbind()))

    def typical(self, steps: Number) -> list[Tensor]:
        """The root mean square of each tensor's gradients, of which v was made after so many steps."""
        parts = list(self.exp_avg_sq.split(self._lengths))
        means = torch.stack(torch._foreach_norm(parts, 1.0)) / self._counts / self.numbers(steps)[1]
        return list(means.sqrt().unbind())

    def gains(self, steps: Number) -> Tensor:
        """The diagonal of D after so many steps, shape (n,), with v corrected for its start at zero; in units of the
        gradients themselves."""
        gains = torch.sqrt(self.exp_avg_sq / self.numbers(steps)[1]).add_(EPS).mul_(self.unit).reciprocal_()
        gains.masked_fill_(self.exp_avg_sq == 0, 0)
        pairs = zip(self.exp_avg_sq.split(self._lengths), gains.split(self._lengths), self.shares, strict=True)
        for v, part, share in pairs:
            if share > 0:
                part.masked_fill_(v <= share * v.sum(), 0)
        return gains

    @staticmethod
    def numbers(steps: Number, age: Number | None = None) -> tuple[Number, Number]:
        """The weight of the gradient of step number `steps` in v, and what v has to be divided by for its start at zero
        (which no longer counts when MEMORY begins to)."""
        t = steps + (steps < 1)
        return meta.bounded(FORGET, MEMORY, t if age is None else age + (age < 1)), 1 - (1 - FORGET) ** t


class SoapBase(AdamBase):
    """T = D^1/2 Q^T M, where M leaves out the elements that have had no gradient yet, for rotations would spread steps
    over them, and those that a bound holds. Waits for the device, to know whether it is time to update Q."""

    kind: ClassVar[str] = "soap"
    names: ClassVar[tuple[str, ...]] = ("base_exp_avg_sq", "base_factors", "base_seen")

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        tensors: dict[str, Tensor],
        dtypes: Sequence[torch.dtype] | None = None,
    ) -> None:
        super().__init__(shapes, tensors, dtypes)
        self._factored: list[_Factored] = []
        packed, used = tensors["base_factors"], 0
        seen = tensors["base_seen"].split_with_sizes(self._lengths)
        squares = self.exp_avg_sq.split_with_sizes(self._lengths)
        for place, (shape, sides) in enumerate(zip(shapes, _sides(shapes), strict=True)):
            factors = []
            for side, length in sides:
                average, basis = packed[used : used + 2 * length * length].view(2, length, length)
                factors.append(_Factor(side, average, basis))
                used += 2 * length * length
            if factors:
                matrix = (shape[0], shape.numel() // shape[0])
                self._factored.append(
                    _Factored(place, matrix, factors, squares[place].view(matrix), seen[place].view(matrix))
                )
        self._others = sorted(set(range(len(shapes))) - {each.place for each in self._factored})
        # Those whose basis is still to come, with their first gradient, and those with elements that M leaves out.
        self._unstarted = {each.place for each in self._factored if not each.seen.any()}
        self._masked = {each.place for each in self._factored if bool((each.seen != SEEN).any())}
        self._held = {each.place for each in self._factored if bool((each.seen > SEEN).any())}

    @staticmethod
    def _rotated(shapes: Sequence[torch.Size]) -> set[int]:
        return {place for place, sides in enumerate(_sides(shapes)) if sides}

    @classmethod
    def tensor_shapes(cls, size: int, shapes: Sequence[torch.Size]) -> Shapes:
        count = sum(2 * length * length for own in _sides(shapes) for _, length in own)
        return {"base_exp_avg_sq": (size,), "base_factors": (count,), "base_seen": (size,)}

    def start_(self) -> None:
        for each in self._factored:
            for factor in each.factors:
                factor.basis.fill_diagonal_(1)

    def rescale_(self, factor: float) -> None:
        super().rescale_(factor)
        for each in self._factored:
            for own in each.factors:
                own.average.mul_(factor * factor)

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

    def turn_(
        self,
        g: Tensor,
        rotated: Tensor | None,
        kept: Sequence[Tensor],
        active: Number,
        steps: Number,
        age: Number | None = None,
    ) -> Tensor:
        if not active:
            return self.rotate(g) if rotated is None else rotated
        t = int(steps)
        is_due = t % renewal_interval(t if age is None else int(age)) == 0
        if not (is_due or t % FACTORS_EVERY == 0 or self._unstarted or self._masked):
            return self.rotate(g) if rotated is None else rotated
        weight = 1 - (1 - float(self.numbers(t, age)[0])) ** FACTORS_EVERY
        gradients = self._matrices(g)
        has_changed = self._see(gradients) if self._masked else False
        matrices = [self._matrices(vectors) for vectors in kept] if is_due else []
        for index, (each, gradient) in enumerate(zip(self._factored, gradients, strict=True)):
            is_first = each.place in self._unstarted and bool(gradient.any())
            if is_first or t % FACTORS_EVERY == 0:
                each.learn_(gradient, weight)
            if is_first or (is_due and each.place not in self._unstarted):
                with _own_precision(g):
                    each.renew_([own[index] for own in matrices], is_first)
                has_changed = True
            if is_first:
                self._unstarted.discard(each.place)
        return self.rotate(g) if has_changed or rotated is None else rotated

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

    def hold_(self, g: Tensor, steps: Number, is_held: Tensor | None = None) -> None:
        """Takes out of M, and out of the gradient, the elements that a bound holds.

        They are let in again when their gradient turns, when somebody else moves them, and every PATIENCE steps, to see
        whether they are still held.

        Args:
            g: gradient, shape (n,); it becomes zero where elements are held.
            steps: that were taken, the one that is being made included.
            is_held: elements whose last step was taken back, and whose gradient goes on as that did, shape (n,); None
                for none.
        """
        if is_held is None and not self._held:
            return
        gradients = self._matrices(g)
        news = [None] * len(gradients) if is_held is None else self._matrices(is_held)
        for each, gradient, new in zip(self._factored, gradients, news, strict=True):
            if each.place in self._held:
                pushes = torch.where(each.seen == HELD_FROM_BELOW, gradient > 0, gradient < 0)
                stays = pushes if int(steps) % PATIENCE else torch.zeros_like(pushes)
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

    def renew_(self, is_first: bool) -> Tensor:
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

    def renew_(self, kept: Sequence[Tensor], is_first: bool) -> None:
        """Brings the eigenvectors up to date, and turns matrices along.

        v goes along as if gradients were uncorrelated in the old ones: what stayed behind would not fit the momenta,
        least of all in a null space.
        """
        for factor in self.factors:
            turn = factor.renew_(is_first)
            for matrix in kept:
                matrix.copy_(factor.times(matrix, turn))
            self.square.copy_(factor.times(self.square, turn * turn))


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


def renewal_interval(steps: int) -> int:
    """How many steps lie between two updates of the eigenbases, when so many were taken."""
    return BASIS_EVERY << max(0, (steps // SETTLED).bit_length() - 1)


def next_unit(unit: Number, size: Number) -> Number:
    """The unit for gradients whose norm is `size`, given the last one, or 0 before the first.

    1, or else the power of two below the first norm that is not zero, if that is out of the ordinary; and if one that
    the host can read grows to GROWTH units, the power of two below that.
    """
    if is_tensor(unit):
        first = torch.exp2(torch.log2(size).floor()).clamp(1 / LARGEST_UNIT, LARGEST_UNIT)
        first = torch.where((size >= 1 / ORDINARY) & (size <= ORDINARY), 1.0, first)
        return torch.where((unit == 0) & (size > 0) & size.isfinite(), first, unit)
    if not 0 < size < math.inf or (unit > 0 and size <= unit * GROWTH):
        return unit
    if unit == 0 and 1 / ORDINARY <= size <= ORDINARY:
        return 1.0
    return min(max(2.0 ** math.floor(math.log2(size)), 1 / LARGEST_UNIT), LARGEST_UNIT)


def _rounding(own: torch.dtype, computed: torch.dtype, size: int) -> float:
    """The share of the sum of v over a tensor of `size` elements below which a coordinate's v is rounding.

    Of a product of matrices by the dtype that it is computed in: some roundings of the norm of the gradient; of the
    gradients' own dtype: the rounding of each element, at random, and its fluctuation.
    """
    return (4 * torch.finfo(computed).eps) ** 2 + torch.finfo(own).eps ** 2 / max(size, 1)


def _eigenbasis(average: Tensor, fallback: Tensor) -> Tensor:
    """Eigenvectors in the columns, the largest eigenvalue first; of singular averages some.

    In float64, for decompositions of singular float32 matrices fail or return NaN; with a little of the identity if
    that does too, and `fallback` if nothing helps.
    """
    wide = _wide(average.device)
    scaled = average.to(wide)
    scaled = scaled / scaled.diagonal().mean().clamp(min=torch.finfo(wide).tiny)
    for shift in (0.0, 1e-12, 1e-6):
        try:
            found = torch.linalg.eigh(scaled + shift * torch.eye(len(scaled), dtype=wide, device=scaled.device))[1]
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


def _wide(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _is_orthogonal(q: Tensor) -> bool:
    """Whether it is, to a thousandth: what is not finite is not."""
    return bool((q.T @ q - torch.eye(len(q), dtype=q.dtype, device=q.device)).abs().amax() < 1e-3)


BASES = {base.kind: base for base in (AdamBase, SoapBase)}
