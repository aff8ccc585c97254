"""Orthogonal bases Q for one side of tensors, taken as matrices X (rows, columns): whole or of low rank.

A side of length d has an average A of g g^T (rows) or g^T g (columns). `Whole` bases are all eigenvectors of A. Their
products are cubic in d, so longer sides have `LowRank` ones: the first r columns of Q are the leading eigenvectors V,
(d, r), and the others leave all else in coordinates that are close to its own. With P the first r rows of V, R the
others, the decomposition P = O U (O orthogonal, U triangular with a positive diagonal), and S = (I + U^T)^-1,

    Q = [ P   -N R^T      ]
        [ R   I - R S R^T ],    N = (P + O) S

is orthogonal: (I - W S W^T) diag(-O, I) with W = [P + O; R], whose first factor takes [-O; 0] to V; and S is never
near singular. Of A, only A V is kept.

Both kinds are updated by orthogonal iteration, V <- qr(A V), in the coordinates of the basis that there is; of A what
is known after that is A V V^T, where the basis is of low rank. A V is kept as B = Q^T A V, for then a gradient that has
been turned is taken in by one product, B tells how far V are from eigenvectors, and what is kept in these coordinates
is turned by qr(B). Tensors of one shape are worked on together, as batches (b, rows, columns).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lodo.scalars import wide

WORK = 256  # products with each element of a tensor, that turning it on one side, ahead and back, may take
NUMBERS = 2  # for each element of a tensor, that the basis of one side of it may have, and its average as many,
SMALL = 4096  # or so many in all
SHIFT = 4.0  # roundings of the largest eigenvalue that null spaces are given, so that they keep their coordinates,
OWN_SHIFT = 1e-6  # and no less than this share of a column's norm
SKETCHES = 2  # power iterations for the first basis of low rank
TOLERANCE = 0.01  # residual of an eigenvector, in relation to its eigenvalue, that is left as it is
LARGEST_VECTOR = 512  # elements of a group without a matrix whose vectors have full eigenbases


class Side(NamedTuple):
    """A side that has a basis: 0 for rows or 1 for columns, its length, and the rank of the basis."""

    axis: int
    length: int
    rank: int

    @property
    def is_whole(self) -> bool:
        return self.rank == self.length

    @property
    def size(self) -> int:
        """Numbers in the basis, and in the average."""
        return self.length * self.rank


def sides_of(shapes: Sequence[torch.Size]) -> list[list[Side]]:
    """The sides of each tensor that have a basis.

    Those of all tensors with two dimensions and more, taken as (first, all others), that are longer than 1. Of the
    vectors only those of a small group of nothing but vectors: all biases and norms of a model are no such group.
    """
    has_full = vectors_have_bases(shapes)
    found: list[list[Side]] = []
    for shape in shapes:
        size, own = shape.numel(), []
        if len(shape) > 1 and size > 0:
            lengths = (shape[0], size // shape[0])
            own = [Side(axis, d, rank_of(d, size // d)) for axis, d in enumerate(lengths) if d > 1]
        elif len(shape) == 1 and has_full and size > 1:
            own = [Side(0, size, size)]
        found.append(own)
    return found


def vectors_have_bases(shapes: Sequence[torch.Size]) -> bool:
    """Whether a group is a small one of nothing but vectors, which then have full bases."""
    return all(len(shape) < 2 for shape in shapes) and sum(shape.numel() for shape in shapes) <= LARGEST_VECTOR


def numbers_of(shapes: Sequence[torch.Size]) -> list[int]:
    """How many numbers the bases of each parameter have."""
    return [sum(side.size for side in own) for own in sides_of(shapes)]


class Member(NamedTuple):
    """A tensor that has bases: its place in the group, its shape as a matrix, its sides that have one; where its
    elements begin in a vector of the group, and its numbers in packed tensors."""

    place: int
    shape: tuple[int, int]
    sides: tuple[Side, ...]
    start: int
    packed: int


def batched(shapes: Sequence[torch.Size], room: Sequence[int] | None = None) -> list[list[Member]]:
    """The tensors that have bases, those of one shape together that lie at equal distances, as in a model of equal
    blocks: so that one view of a vector shows them all.

    Args:
        shapes: of all parameters of a group.
        room: how many numbers each has in packed tensors; None for as many as it needs.
    """
    room = numbers_of(shapes) if room is None else room
    found: list[list[Member]] = []
    start = packed = 0
    for place, (shape, sides) in enumerate(zip(shapes, sides_of(shapes), strict=True)):
        if sides:
            member = Member(place, (shape[0], shape.numel() // shape[0]), tuple(sides), start, packed)
            batch = next((batch for batch in found if _continues(batch, member)), None)
            if batch is None:
                found.append([member])
            else:
                batch.append(member)
        start += shape.numel()
        packed += room[place]
    return found


def _continues(batch: Sequence[Member], member: Member) -> bool:
    if (batch[0].shape, batch[0].sides) != (member.shape, member.sides):
        return False
    if len(batch) == 1:
        return True
    first, second, last = batch[0], batch[1], batch[-1]
    distances = second.start - first.start, second.packed - first.packed
    return (member.start - last.start, member.packed - last.packed) == distances


def rank_of(length: int, other: int) -> int:
    """The rank of the basis of a side, by the length of the other one: all of it where WORK and NUMBERS allow that.

    A whole basis takes 2 * length products for each element, ahead and back, one of low rank 4 * rank.
    """
    if 2 * length <= WORK and length * length <= max(NUMBERS * length * other, SMALL):
        return length
    return max(1, min(WORK // 4, other, length // 2))


class Basis:
    """The bases of one side of the tensors of a batch; what belongs to one of them lies in the memory of the state.

    Args:
        side: which one.
        average: Q^T A V (b, d, r): of an average A, what is known of it, in the coordinates of the basis. Its first r
            rows are diagonal and the others zero where V are eigenvectors of A.
        vectors: V (b, d, r), the eigenvectors in the columns, the largest eigenvalue first.
    """

    def __init__(self, side: Side, average: Tensor, vectors: Tensor) -> None:
        self.side, self.average, self.vectors = side, average, vectors

    def ahead_(self, x: Tensor, one: int | None = None) -> Tensor:
        """Q^T on this side of matrices x: those of the batch (b, rows, columns), or any (k, rows, columns) with the
        basis of `one` of the batch. Returns the result, in the memory of x or in new one; x is used up."""
        raise NotImplementedError

    def back_(self, x: Tensor, one: int | None = None) -> Tensor:
        """The same with Q."""
        raise NotImplementedError

    def begin_(self, ones: Sequence[int]) -> None:
        """Makes the Q of some of the batch the identity."""
        for one in ones:
            self.vectors[one].fill_diagonal_(1)

    def learn_(self, turned: Tensor, weight: float, one: int | None = None) -> None:
        """Takes gradients (b, rows, columns) into the averages, or into that of `one` of the batch alone.

        Args:
            turned: in the coordinates of this basis on this side, and in any on the other, which g g^T knows nothing
                of. Its first r coordinates here are V^T g.
            weight: of the gradient in the average.
            one: which; None for all.
        """
        own = slice(None) if one is None else slice(one, one + 1)
        x = self._as_rows(turned[own])
        self.average[own].baddbmm_(x, x[:, : self.side.rank].mT, beta=1 - weight, alpha=weight)

    def start_(self, one: int, g: Tensor, weight: float) -> None:
        """Makes the basis of one of the batch of its first gradient that is not zero, (rows, columns)."""
        raise NotImplementedError

    def is_off(self, one: int) -> bool:
        """Whether some vector of one of the batch is no longer close to an eigenvector of the average: by the residual
        A v - lambda v in relation to lambda, each by its own, for what is small in a gradient is large in a step."""
        average = self.average[one] / self.average[one].abs().amax().clamp(min=torch.finfo(self.average.dtype).tiny)
        values = average.diagonal()
        residuals = (average.square().sum(0) - values.square()).clamp_(min=0).sqrt_()
        allowed = TOLERANCE * values + SHIFT * torch.finfo(average.dtype).eps * values.max()
        return not bool((residuals <= allowed).all())

    def refresh_(self, one: int, kept: Sequence[Tensor], square: Tensor) -> None:
        """Brings the basis of one of the batch up to date by orthogonal iteration, and takes what is in its coordinates
        along.

        Args:
            one: which.
            kept: matrices (rows, columns), brought into the new coordinates in place.
            square: second moments (rows, columns), of which those of the eigenvectors go along as if gradients were
                uncorrelated in the old coordinates: what stayed behind would not fit the momenta, least of all in a
                null space.
        """
        average = self.average[one]
        turn = orthonormal(average)
        for x, new in zip(kept, self._turn_(one, turn, torch.stack(list(kept))), strict=True):
            x.copy_(new)
        self._turn_squares_(self._as_rows(square), turn[: self.side.rank].mT.square())

    def _turn_(self, one: int, turn: Tensor, x: Tensor) -> Tensor:
        """Makes V = Q `turn` (d, r), with the old Q; returns matrices x (k, rows, columns) in the new coordinates, and
        uses them up."""
        raise NotImplementedError

    def _turn_squares_(self, square: Tensor, shares: Tensor) -> None:
        """The same for second moments, this side first: those of the eigenvectors by their shares (r, r); what comes to
        them of the rest comes as its mean. The rest, whose coordinates hardly turn, keeps its own."""
        first, rest = square.split([self.side.rank, self.side.length - self.side.rank])
        turned = shares @ first
        if len(rest):
            turned += (1 - shares.sum(1)).clamp_(min=0)[:, None] * rest.mean(0)
        first.copy_(turned)

    def _as_rows(self, x: Tensor) -> Tensor:
        """This side first."""
        return x if self.side.axis == 0 else x.mT


class Whole(Basis):
    """All eigenvectors."""

    def ahead_(self, x: Tensor, one: int | None = None) -> Tensor:
        return self._times(self._of(one).mT, x)

    def back_(self, x: Tensor, one: int | None = None) -> Tensor:
        return self._times(self._of(one), x)

    def _of(self, one: int | None) -> Tensor:
        return self.vectors if one is None else self.vectors[one]

    def _times(self, matrix: Tensor, x: Tensor) -> Tensor:
        """A matrix applied to this side of x."""
        return matrix @ x if self.side.axis == 0 else x @ matrix.mT

    def start_(self, one: int, g: Tensor, weight: float) -> None:
        g = self._as_rows(g).to(wide(g.device))
        average = g @ g.mT
        same = torch.eye(len(g), dtype=g.dtype, device=g.device)
        found = known(eigenvectors(average, same), g, torch.finfo(self.vectors.dtype).eps)
        self.vectors[one] = vectors = with_random_others(found)
        self.average[one] = weight * (vectors.mT @ average @ vectors)

    def _turn_(self, one: int, turn: Tensor, x: Tensor) -> Tensor:
        self.average[one] = turn.mT @ (self.average[one] @ turn)
        self.vectors[one] = straightened(self.vectors[one] @ turn)
        return self._times(turn.mT, x)


class LowRank(Basis):
    """The leading eigenvectors, and all else in coordinates close to its own."""

    def __init__(self, side: Side, average: Tensor, vectors: Tensor) -> None:
        super().__init__(side, average, vectors)
        self._n, self._s = vectors.new_zeros(2, len(vectors), side.rank, side.rank)
        for one in range(len(vectors)):
            self._complete_(one)

    def begin_(self, ones: Sequence[int]) -> None:
        super().begin_(ones)
        for one in ones:
            self._complete_(one)

    def _complete_(self, one: int) -> None:
        """Computes N and S of the vectors of one of the batch."""
        p = self.vectors[one, : self.side.rank]
        o, u = torch.linalg.qr(p)
        signs = torch.where(u.diagonal() < 0, -1.0, 1.0).to(p.dtype)
        same = torch.eye(len(p), dtype=p.dtype, device=p.device)
        self._s[one] = torch.linalg.solve_triangular(same + (signs[:, None] * u).mT, same, upper=False)
        torch.mm(p + o * signs, self._s[one], out=self._n[one])

    def _blocks(self, one: int | None, count: int) -> list[Tensor]:
        """V, P, N and S, of the batch or of one of it, which is to be applied to `count` matrices."""
        found = [self.vectors, self.vectors[:, : self.side.rank], self._n, self._s]
        return found if one is None else [block[one].expand(count, -1, -1) for block in found]

    # R is applied as V is, whose rows are in the way of nothing: what comes to the first r coordinates is written anew.

    def ahead_(self, x: Tensor, one: int | None = None) -> Tensor:
        return self._ahead_(x, one, self.side.axis)

    def back_(self, x: Tensor, one: int | None = None) -> Tensor:
        return self._back_(x, one, self.side.axis)

    def _ahead_(self, x: Tensor, one: int | None, axis: int) -> Tensor:
        v, p, n, s = self._blocks(one, len(x))
        first = self._first(x, axis)
        found = _product(v.mT, x, axis)
        inside = _added(found, p.mT, first, axis, alpha=-1)
        pushed = _added_(_product(n.mT, first, axis), s.mT, inside, axis)
        _added_(x, v, pushed, axis, alpha=-1)
        first.copy_(found)
        return x

    def _back_(self, x: Tensor, one: int | None, axis: int) -> Tensor:
        v, p, n, s = self._blocks(one, len(x))
        first = self._first(x, axis)
        plain = _product(p, first, axis)
        inside = _added_(_product(v.mT, x, axis), p.mT, first, axis, alpha=-1)
        pushed = _added(first, s, inside, axis, alpha=-1)
        _added_(x, v, pushed, axis)
        torch.sub(plain, _product(n, inside, axis), out=first)
        return x

    def _first(self, x: Tensor, axis: int) -> Tensor:
        """The first r coordinates on a side."""
        return x.narrow(axis - 2, 0, self.side.rank)

    def start_(self, one: int, g: Tensor, weight: float) -> None:
        g, vectors = self._as_rows(g), self.vectors[one]
        vectors.copy_(with_own_others(known(leading(g, self.side.rank), g, torch.finfo(g.dtype).eps), self.side.rank))
        self._complete_(one)
        self.average[one] = self._ahead_(weight * (g @ (g.mT @ vectors))[None], one, axis=0)[0]

    def _turn_(self, one: int, turn: Tensor, x: Tensor) -> Tensor:
        # A V V^T V' is what is known of A V'.
        new, average = self._back_(torch.stack([turn, self.average[one] @ turn[: self.side.rank]]), one, axis=0)
        plain = self.back_(x, one)
        self.vectors[one] = straightened(new)
        self._complete_(one)
        self.average[one] = self._ahead_(average[None], one, axis=0)[0]
        return self.ahead_(plain, one)


def _product(matrix: Tensor, x: Tensor, axis: int) -> Tensor:
    """Matrices (b, i, j) applied to a side of x (b, rows, columns)."""
    return torch.bmm(matrix, x) if axis == 0 else torch.bmm(x, matrix.mT)


def _added(to: Tensor, matrix: Tensor, x: Tensor, axis: int, alpha: float = 1.0) -> Tensor:
    """to + alpha * matrix x."""
    one, other = (matrix, x) if axis == 0 else (x, matrix.mT)
    return torch.baddbmm(to, one, other, alpha=alpha)


def _added_(to: Tensor, matrix: Tensor, x: Tensor, axis: int, alpha: float = 1.0) -> Tensor:
    """The same, in the memory of `to`."""
    one, other = (matrix, x) if axis == 0 else (x, matrix.mT)
    return to.baddbmm_(one, other, alpha=alpha)


def basis_of(side: Side, average: Tensor, vectors: Tensor) -> Basis:
    """Of either kind."""
    return Whole(side, average, vectors) if side.is_whole else LowRank(side, average, vectors)


def straightened(vectors: Tensor) -> Tensor:
    """Vectors (d, r) that are orthonormal but for rounding, without that: a Newton-Schulz step towards the polar
    factor. So that rounding does not add up over renewals."""
    return torch.addmm(vectors, vectors, vectors.mT @ vectors, beta=1.5, alpha=-0.5)


def orthonormal(average: Tensor) -> Tensor:
    """An orthonormal basis of the columns (d, r) by QR, with signs such that it is close to the first columns of the
    identity if they are: coordinates go on meaning the same. That also fills a null space, and is the answer where the
    average is not finite."""
    same = torch.eye(*average.shape, dtype=average.dtype, device=average.device)
    scaled = average / average.abs().amax().clamp(min=torch.finfo(average.dtype).tiny)
    # What is left of a column when others have been taken out of it may be rounding, that would turn null spaces about.
    shifts = (OWN_SHIFT * scaled.norm(dim=0)).clamp_(min=SHIFT * torch.finfo(average.dtype).eps)
    q, r = torch.linalg.qr(scaled + shifts * same)
    if not math.isfinite(float(q.sum())):
        return same
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)


def leading(g: Tensor, rank: int) -> Tensor:
    """About the leading left singular vectors of g (d, n), in the columns, the largest first (Halko, Martinsson and
    Tropp 2011, with power iterations). Products with g are in its own dtype, all else in float64."""
    float64 = wide(g.device)
    width = min(2 * rank, *g.shape)
    generator = torch.Generator("cpu").manual_seed(0)
    projected = torch.randn(g.shape[1], width, generator=generator, dtype=torch.float64, device="cpu").to(g)
    for _ in range(1 + SKETCHES):
        q = torch.linalg.qr((g @ projected).to(float64))[0]
        projected = g.mT @ q.to(g.dtype)
    inside = projected.mT.to(float64) @ projected.to(float64)
    return (q @ eigenvectors(inside, torch.eye(width, dtype=float64, device=g.device)))[:, :rank]


def known(vectors: Tensor, g: Tensor, eps: float) -> Tensor:
    """Those of the singular vectors of a gradient g (d, n), in the columns (d, r), that are not but rounding.

    Bases start with these, and with others that are smooth functions of g: a decomposition would have others of each
    rounding, and a training would hang on them.

    Args:
        vectors: in float64, the largest first.
        g: the gradient.
        eps: its rounding.
    """
    values = (g.mT @ vectors.to(g.dtype)).to(vectors.dtype).square().sum(0)
    rounding = max((8 * eps) ** 2, torch.finfo(vectors.dtype).eps) * len(vectors)
    return vectors[:, : max(1, int((values > rounding * values.max()).sum()))]


def with_own_others(vectors: Tensor, rank: int) -> Tensor:
    """Orthonormal vectors (d, k) and others, (d, rank) in all, that leave what is orthogonal to them in coordinates
    close to its own."""
    d, k = vectors.shape
    if k == rank:
        return vectors
    basis = LowRank(Side(0, d, k), torch.zeros_like(vectors)[None], vectors[None].contiguous())
    return basis.back_(torch.eye(d, rank, dtype=vectors.dtype, device=vectors.device)[None])[0]


def with_random_others(vectors: Tensor) -> Tensor:
    """Orthonormal vectors (d, k) and others in random directions, always the same ones, (d, d) in all.

    Where a gradient of low rank is followed by others, each of these coordinates has a share of what is new.
    """
    d, k = vectors.shape
    generator = torch.Generator("cpu").manual_seed(0)
    others = torch.randn(d, d - k, generator=generator, dtype=torch.float64, device="cpu").to(vectors)
    for _ in range(2):  # the second time for what rounding has left
        others = torch.linalg.qr(others - vectors @ (vectors.mT @ others))[0]
    return torch.cat([vectors, others], dim=1)


def eigenvectors(average: Tensor, fallback: Tensor) -> Tensor:
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


def _is_orthogonal(q: Tensor) -> bool:
    """Whether it is, to a thousandth: what is not finite is not."""
    return bool((q.T @ q - torch.eye(len(q), dtype=q.dtype, device=q.device)).abs().amax() < 1e-3)
