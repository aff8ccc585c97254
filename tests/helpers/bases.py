"""What SOAP's bases are, once more, as dense matrices."""

import torch

from lodo.parts.eigenbasis import phase_of
from tests.helpers.parts import SHAPES

SIDES = {  # (0 for rows or 1 for columns, length, and of low ones the rank) of those that have a basis
    (3, 4): [(0, 3), (1, 4)],
    (2, 3, 2): [(0, 2), (1, 6)],
}


def of_sides(shapes=SHAPES):
    return [SIDES.get(tuple(shape), []) for shape in shapes]


def as_matrix(shape):
    rows = shape[0] if shape else 1
    return rows, torch.Size(shape).numel() // max(rows, 1)


def completed(vectors):
    """The orthogonal matrix with `vectors` (d, r) in its first columns: the others are those of the identity, after the
    rotation in the span of both sets of columns that takes the first columns of the identity, turned, to them."""
    d, r = vectors.shape
    e = torch.eye(d, dtype=vectors.dtype)[:, :r]
    q, triangle = torch.linalg.qr(e.T @ vectors)
    start = -e @ torch.where(triangle.diagonal() < 0, -q, q)
    difference = start - vectors
    reflection = torch.eye(d, dtype=vectors.dtype)
    reflection -= difference @ torch.linalg.inv(torch.eye(r, dtype=vectors.dtype) - vectors.T @ start) @ difference.T
    torch.testing.assert_close(reflection @ start, vectors, rtol=0, atol=1e-11)
    return torch.cat([vectors, reflection[:, r:]], dim=1)


def renewed(columns, vectors):
    """The basis after one orthogonal iteration, from A V and V (d, r): null spaces keep their coordinates."""
    scaled = columns / (completed(vectors).T @ columns).abs().max()
    shifts = (1e-6 * scaled.norm(dim=0)).clamp(min=4 * torch.finfo(columns.dtype).eps)
    q, triangle = torch.linalg.qr(scaled + shifts * vectors)
    return torch.where(triangle.diagonal() < 0, -q, q)


def factors_in(entry, sides):
    """What the state keeps for each tensor: {side: (average, vectors)}."""
    packed, found, first = torch.stack([entry["factors"], entry["eigenbasis"]]), [], 0
    for own in sides:
        found.append({})
        for side, length, *rank in own:
            r = rank[0] if rank else length
            found[-1][side] = packed[:, first : first + length * r].view(2, length, r)
            first += length * r
    assert packed.shape == (2, first)
    return found


def dense_basis(shapes, factors):
    """Q (n, n): on a matrix X, Q_L X Q_R^T."""
    blocks = []
    for shape, own in zip(shapes, factors, strict=True):
        sides = [
            completed(own[axis][1]) if axis in own else torch.eye(d, dtype=torch.float64)
            for axis, d in enumerate(as_matrix(shape))
        ]
        blocks.append(torch.kron(*(side.contiguous() for side in sides)))
    return torch.block_diag(*(block for block in blocks if block.numel()))


def eye(d):
    return torch.eye(d, dtype=torch.float64)


class DenseSoap:
    """SOAP (Vyas et al., 2024) with factors of each tensor, and dense matrices for all of R^n. Of two gradients one
    goes into the factors, with the weight of both, so that these forget as fast as they would by taking every one. The
    basis begins with the first gradient that is not zero, each is renewed at steps of its own, and v is carried over
    into a new one."""

    def __init__(self, shapes, sides, x):
        self.shapes, self.sides, self.x = shapes, sides, x.clone()
        self.factors = [{axis: [torch.zeros(d, r).double(), eye(d)[:, :r]] for axis, d, r in own} for own in sides]
        self.m, self.v = torch.zeros_like(x), torch.zeros_like(x)
        self.has_begun = False

    def step(self, g, lr, t, found):
        """`found`: the factors of the optimizer, of which the first basis is taken, for eigenvectors are not unique."""
        is_first, self.has_begun = bool(g.any()) and not self.has_begun, self.has_begun or bool(g.any())
        parts, carried = g.split([torch.Size(shape).numel() for shape in self.shapes]), []
        for shape, part, own, theirs in zip(self.shapes, parts, self.factors, found, strict=True):
            matrix = part.view(as_matrix(shape))
            turns = [eye(d) for d in matrix.shape]
            for axis, factor in own.items():
                square = matrix @ matrix.T if axis == 0 else matrix.T @ matrix
                if is_first:
                    factor[1] = theirs[axis][1].clone()
                    check_first(square, factor[1])
                is_low = len(factor[0].T) < len(factor[0])
                if is_first or t % 2 == 0:
                    factor[0] = 0.999**2 * factor[0] + (1 - 0.999**2) * (square @ factor[1] if is_low else square)
                if not is_first and (t + int(10 * phase_of(matrix.shape, axis))) % 10 == 0 and self.has_begun:
                    turns[axis] = renew(factor)
            carried.append(torch.kron(*turns))
        self.v = torch.block_diag(*(each for each in carried if each.numel())) @ self.v
        q = dense_basis(self.shapes, self.factors)
        self.v = 0.999 * self.v + 0.001 * (q.T @ g) ** 2
        self.m = 0.9 * self.m + 0.1 * g
        d = 1 / ((self.v / (1 - 0.999**t)).sqrt() + 1e-8)
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        for v, part, own in zip(self.v.split(sizes), d.split(sizes), self.factors, strict=True):
            part[v <= (1e-14**2 * v.sum() if own else 0)] = 0  # rounding takes no step
        self.g = q @ d.diag() @ q.T
        self.x -= lr / (1 - 0.9**t) * self.g @ self.m


def check_first(square, vectors):
    """Of the first gradient they are the leading eigenvectors, the largest first; of low rank about these."""
    values, is_low = torch.linalg.eigvalsh(square).flip(0), len(vectors.T) < len(vectors)
    turned = vectors.T @ square @ vectors
    torch.testing.assert_close(turned, turned.diagonal().diag(), rtol=0, atol=1e-11)
    torch.testing.assert_close(turned.diagonal(), values[: len(turned)], rtol=0.02 if is_low else 1e-9, atol=1e-11)


def renew(factor):
    """Renews a basis; returns the shares of the old coordinates' v in the new ones', (d, d)."""
    average, vectors = factor
    d, r = vectors.shape
    factor[1] = renewed(average @ vectors if r == d else average, vectors)
    turn = factor[1].T @ vectors
    if r == d:
        return turn**2
    factor[0] = average @ turn.T
    shares = eye(d)
    shares[:r] = (1 - (turn**2).sum(1))[:, None] / (d - r)
    shares[:r, :r] = turn**2
    return shares
