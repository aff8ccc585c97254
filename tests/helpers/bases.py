"""What SOAP's bases are, once more, as dense matrices."""

import torch

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
