"""The singular values of many small blocks at once: bounds without a decomposition, the extremes, and keeping them
in a range."""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 32_768  # blocks at a time, whose Gram matrices take k times the blocks' memory


def squares_between(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds, each of shape (w,), between which the squared singular values of each of the blocks (k, k, w) lie.

    From the trace and the Frobenius norm of B^T B alone: with their mean and their standard deviation, the eigenvalues
    of a symmetric (k, k) matrix lie within sqrt(k - 1) deviations of the mean (Wolkowicz and Styan, "Bounds for
    eigenvalues using traces", 1980). Tight for blocks near a multiple of an orthogonal one, as they all are at the
    start.
    """
    size = len(blocks)
    gram = (blocks.unsqueeze(2) * blocks.unsqueeze(1)).sum(0)
    diagonal = gram.diagonal(dim1=0, dim2=1)  # (w, k), a view
    mean = diagonal.mean(-1)
    diagonal.sub_(mean.unsqueeze(-1))
    radius = (gram.square_().sum((0, 1)) * ((size - 1) / size)).sqrt_()
    return mean - radius, mean + radius


def extremes(theta: Tensor) -> tuple[float, float]:
    """The smallest and the largest singular value of all blocks, to five digits, for theta of shape (N, k, k, w).

    Only blocks that may have one of them are decomposed. NaN if a block is not finite, or if there is none.
    """
    smallest, largest = torch.inf, -torch.inf
    for blocks in _chunks(theta):
        if not blocks.isfinite().all():
            return torch.nan, torch.nan
        low, high = squares_between(blocks)
        likely = torch.stack([low.argmin(), high.argmax()])
        while len(likely):
            values = torch.linalg.svdvals(blocks[..., likely].movedim(-1, 0))
            smallest, largest = min(smallest, float(values.min())), max(largest, float(values.max()))
            low[likely], high[likely] = torch.inf, -torch.inf
            candidates = (low < smallest**2 * (1 - 1e-5)) | (high > largest**2 * (1 + 1e-5))
            likely = candidates.nonzero().squeeze(-1)
    return (smallest, largest) if largest >= smallest else (torch.nan, torch.nan)


def clamp_(theta: Tensor, low: float, high: float) -> None:
    """Brings the singular values of all blocks of theta (N, k, k, w) into [low, high], in place.

    Blocks that are inside keep their bits. Each other one becomes the nearest block (in the Frobenius norm) that is
    inside by a tenth of the range, in logarithms, so that it does not come back at the next step. Blocks that are not
    finite are left alone.
    """
    slack = (high / low) ** 0.05
    for blocks in _chunks(theta):
        suspects = (~_are_surely_inside(blocks, low, high) & blocks.isfinite().all(0).all(0)).nonzero().squeeze(-1)
        if len(suspects) == 0:
            continue
        before = blocks[..., suspects].movedim(-1, 0)
        left, values, right = torch.linalg.svd(before)
        is_outside = ((values < low) | (values > high)).any(-1)[:, None, None]
        after = (left * values.clamp(low * slack, high / slack).unsqueeze(-2)) @ right
        blocks[..., suspects] = torch.where(is_outside, after, before).movedim(0, -1)


def _are_surely_inside(blocks: Tensor, low: float, high: float) -> Tensor:
    """Whether the singular values of each of the blocks (k, k, w) lie in [low, high], bool (w,); some that do are
    missed.

    They do if the eigenvalues of E = (B^T B - c) / h, for the centre c and the half-width h of [low^2, high^2], are at
    most 1 in size, which |E^16| <= 1 in the Frobenius norm proves. Only eigenvalues within 1 - k^(-1/32) of 1 can be
    missed.
    """
    centre, half = (high * high + low * low) / 2, (high * high - low * low) / 2
    power = (blocks.unsqueeze(2) * blocks.unsqueeze(1)).sum(0)
    power.diagonal(dim1=0, dim2=1).sub_(centre)
    power.div_(half)
    for _ in range(4):
        power = (power.unsqueeze(2) * power.unsqueeze(1)).sum(0)
    return power.square_().sum((0, 1)) <= 1


def _chunks(theta: Tensor) -> Iterator[Tensor]:
    for blocks in theta:
        yield from blocks.split(CHUNK, dim=-1)
