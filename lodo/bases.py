"""Base preconditioners: what is known about the curvature before anything is learned, from statistics of gradients.

A base is a factor T (n, n) of G = lr * T^T U^T U T. With an untrained U the step is that of a known optimizer, until at
step MEMORY / FORGET its averages begin to last longer:

    "adam"   T = D^1/2        D = 1 / (sqrt(v) + eps), v Adam's second moment (Kingma and Ba, 2015)
    "soap"   T = D^1/2 Q^T    the same in the eigenbasis Q of Shampoo's factors (Vyas et al., "SOAP", 2024)

Q is orthogonal and acts on each tensor by itself: on a matrix X as Q_L X Q_R^T, where the columns of Q_L are the
eigenvectors of an average of g g^T, those of Q_R of g^T g; on tensors with more dimensions as on (first, all others).

The optimizer computes in the coordinates Q^T x, in which T is diagonal: a gradient is turned into them as it comes in,
a step is turned back as it goes out, and what is kept in between is turned when Q changes.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lodo import meta
from lodo.scalars import Number, is_tensor

FORGET = 1e-3  # share of v, and of the averages of g g^T, that a step replaces
MEMORY = 10.0  # but at step t at most MEMORY / t: later these are averages over a tenth of the steps
EPS = 1e-8
BASIS_EVERY = 10  # steps between two updates of the eigenbases,
SETTLED = 500  # which doubles with every doubling of the steps from here on: bases change ever more slowly
FACTORS_EVERY = 2  # steps between two gradients that are taken into the averages of g g^T
SKEWNESS = 2  # a side has an eigenbasis if its square has at most so many times the elements of the tensor
LARGEST_SIDE = 2048
LARGEST_VECTOR = 512  # elements of a group without a matrix whose vectors have full eigenbases

Shapes = dict[str, tuple[int, ...]]


class AdamBase:
    """T = D^1/2, diagonal. Takes the tensors that `tensor_shapes` names, and advances them in place."""

    kind: ClassVar[str] = "adam"
    names: ClassVar[tuple[str, ...]] = ("base_exp_avg_sq",)

    def __init__(self, shapes: Sequence[torch.Size], tensors: dict[str, Tensor]) -> None:
        self.exp_avg_sq = tensors["base_exp_avg_sq"]

    @classmethod
    def tensor_shapes(cls, size: int, shapes: Sequence[torch.Size]) -> Shapes:
        """What is kept between steps, by `names`, for parameters of these shapes, `size` elements in all."""
        return {"base_exp_avg_sq": (size,)}

    def start_(self) -> None:
        """Makes zeros what is to be before the first gradient."""

    def rotate(self, v: Tensor) -> Tensor:
        """Q^T v, shape (n,)."""
        return v

    def rotate_back(self, v: Tensor) -> Tensor:
        """Q v, shape (n,)."""
        return v

    def turn_(self, g: Tensor, rotated: Tensor, kept: Sequence[Tensor], active: Number, steps: Number) -> Tensor:
        """Takes a gradient into what Q is made of, and brings Q up to date.

        Args:
            g: shape (n,).
            rotated: Q^T g.
            kept: shape (..., n), vectors in the coordinates of Q, turned in place into those of the Q that comes out.
            active: whether to, 0 or 1.
            steps: that were taken, this one included.

        Returns:
            Q^T g of the Q that comes out.
        """
        return rotated

    def take_in_(self, rotated: Tensor, active: Number, steps: Number) -> None:
        """v <- v + weight * ((Q^T g)^2 - v), for Q^T g of shape (n,); arguments as for `turn_`."""
        weight = active * self.numbers(steps)[0]
        weight = weight.to(rotated.dtype) if is_tensor(weight) else weight
        self.exp_avg_sq.lerp_(rotated * rotated, weight)

    def gains(self, steps: Number) -> Tensor:
        """The diagonal of D after so many steps, shape (n,), with v corrected for its start at zero."""
        return torch.sqrt(self.exp_avg_sq / self.numbers(steps)[1]).add_(EPS).reciprocal_()

    @staticmethod
    def numbers(steps: Number) -> tuple[Number, Number]:
        """The weight of the gradient of step number `steps` in v, and what v has to be divided by for its start at zero
        (which no longer counts when MEMORY begins to)."""
        t = steps + (steps < 1)
        return meta.bounded(FORGET, MEMORY, t), 1 - (1 - FORGET) ** t


class SoapBase(AdamBase):
    """T = D^1/2 Q^T. Waits for the device, to know whether it is time to update Q."""

    kind: ClassVar[str] = "soap"
    names: ClassVar[tuple[str, ...]] = ("base_exp_avg_sq", "base_factors")

    def __init__(self, shapes: Sequence[torch.Size], tensors: dict[str, Tensor]) -> None:
        super().__init__(shapes, tensors)
        self._lengths = [shape.numel() for shape in shapes]
        self._factored: list[_Factored] = []
        packed, used = tensors["base_factors"], 0
        for place, (shape, sides) in enumerate(zip(shapes, _sides(shapes), strict=True)):
            factors = []
            for side, length in sides:
                average, basis = packed[used : used + 2 * length * length].view(2, length, length)
                factors.append(_Factor(side, average, basis))
                used += 2 * length * length
            if factors:
                self._factored.append(_Factored(place, (shape[0], shape.numel() // shape[0]), factors))
        self._others = sorted(set(range(len(shapes))) - {each.place for each in self._factored})

    @classmethod
    def tensor_shapes(cls, size: int, shapes: Sequence[torch.Size]) -> Shapes:
        count = sum(2 * length * length for own in _sides(shapes) for _, length in own)
        return {"base_exp_avg_sq": (size,), "base_factors": (count,)}

    def start_(self) -> None:
        for each in self._factored:
            for factor in each.factors:
                factor.basis.fill_diagonal_(1)

    def rotate(self, v: Tensor) -> Tensor:
        return self._rotated(v, back=False)

    def rotate_back(self, v: Tensor) -> Tensor:
        return self._rotated(v, back=True)

    def _rotated(self, v: Tensor, back: bool) -> Tensor:
        v = v.contiguous()
        turned = torch.empty_like(v)
        before, after = v.split_with_sizes(self._lengths), turned.split_with_sizes(self._lengths)
        if self._others:
            torch._foreach_copy_([after[place] for place in self._others], [before[place] for place in self._others])
        with _own_precision(v):
            for place, shape, (*firsts, last) in self._factored:
                matrix = before[place].view(shape)
                for factor in firsts:
                    matrix = factor.times(matrix, factor.back if back else factor.ahead)
                last.times(matrix, last.back if back else last.ahead, out=after[place].view(shape))
        return turned

    def _matrices(self, vectors: Tensor) -> list[Tensor]:
        """The parts of contiguous vectors (..., n) that have factors, as matrices that share their memory."""
        parts = vectors.split_with_sizes(self._lengths, dim=-1)
        return [parts[place].view(*vectors.shape[:-1], *shape) for place, shape, _ in self._factored]

    def turn_(self, g: Tensor, rotated: Tensor, kept: Sequence[Tensor], active: Number, steps: Number) -> Tensor:
        if not active:
            return rotated
        t = int(steps)
        is_first = t == 1
        is_due = is_first or t % renewal_interval(t) == 0
        if is_first or t % FACTORS_EVERY == 0:
            weight = 1 - (1 - float(self.numbers(t)[0])) ** FACTORS_EVERY
            for each, matrix in zip(self._factored, self._matrices(g), strict=True):
                each.learn_(matrix, weight)
        if is_due:
            matrices = [self._matrices(vectors) for vectors in kept]
            with _own_precision(g):
                for each, *own in zip(self._factored, *matrices, strict=True):
                    each.renew_(own, is_first)
        return self.rotate(g) if is_due else rotated


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
        new = _eigenbasis(self.average) if is_first else _improved(self.average, self.basis)
        turn = new.T @ self.basis
        self.basis.copy_(new)
        return turn if self.side == 0 else turn.T


class _Factored(NamedTuple):
    """A tensor that has factors: its place in the group, and its shape as a matrix."""

    place: int
    shape: tuple[int, int]
    factors: list[_Factor]

    def learn_(self, matrix: Tensor, weight: float) -> None:
        """Takes its gradient into the averages."""
        for factor in self.factors:
            factor.learn_(matrix, weight)

    def renew_(self, kept: Sequence[Tensor], is_first: bool) -> None:
        """Brings the eigenvectors up to date, and matrices into their coordinates."""
        for factor in self.factors:
            turn = factor.renew_(is_first)
            for matrix in kept:
                matrix.copy_(factor.times(matrix, turn))


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


def _eigenbasis(average: Tensor) -> Tensor:
    """Eigenvectors in the columns, the largest eigenvalue first."""
    scale = average.diagonal().mean()
    scaled = average / torch.where(scale > 0, scale, 1)  # squares of tiny gradients are too small to decompose
    return torch.linalg.eigh(scaled)[1].flip(1)


def _improved(average: Tensor, basis: Tensor) -> Tensor:
    """One step of orthogonal iteration. The signs stay, so that coordinates mean the same before and after."""
    scale = average.diagonal().mean()
    q, r = torch.linalg.qr(average @ basis / torch.where(scale > 0, scale, 1))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)


BASES = {base.kind: base for base in (AdamBase, SoapBase)}
