"""The preconditioners' arithmetic in plain torch: the ground truth for every faster kernel.

The block-diagonal x permutation network comes first. Its blocks are stored structure-of-arrays, (N, k_in, k_out, w) for
w blocks per layer: B[i, o] of all blocks of a layer is one contiguous row, so that a product of blocks is k fused
multiply-adds over rows. Vectors are in canonical order (component o of block b at b * k + o); inside a layer they are
seen as k rows, (..., k, w).

`permutations` is an integer (N, n~) tensor of indices, or None for the perfect shuffle, which is a transpose.
"""

import math

import torch
from torch import Tensor

from lodo import inner_optimizer
from lodo.rounding import random_words, to_bfloat16
from lodo.scalars import Number


def permute(x: Tensor, permutations: Tensor | None, layer: int, block: int) -> Tensor:
    """Rows (..., k, w) of P_layer x, for canonical x (..., n~)."""
    if permutations is None:
        x = x.unflatten(-1, (-1, block)).transpose(-1, -2).flatten(-2)
    else:
        x = x[..., permutations[layer]]
    return x.unflatten(-1, (-1, block)).transpose(-1, -2).contiguous()


def unpermute(rows: Tensor, permutations: Tensor | None, layer: int) -> Tensor:
    """Canonical P_layer^T z (..., n~), for the rows (..., k, w) of z: the transpose of `permute`."""
    block = rows.shape[-2]
    z = rows.transpose(-1, -2).flatten(-2)
    if permutations is None:
        return z.unflatten(-1, (block, -1)).transpose(-1, -2).flatten(-2)
    x = torch.empty_like(z)
    x[..., permutations[layer]] = z
    return x


def multiply(blocks: Tensor, rows: Tensor) -> Tensor:
    """y[o] = sum_i B[i, o] z[i] for blocks (k, k, w) and rows (..., k, w)."""
    out = rows[..., 0, None, :] * blocks[0]
    for i in range(1, len(blocks)):
        out.addcmul_(rows[..., i, None, :], blocks[i])
    return out


def canonical(rows: Tensor) -> Tensor:
    return rows.transpose(-1, -2).flatten(-2)


def forward(theta: Tensor, permutations: Tensor | None, x: Tensor) -> Tensor:
    """U x for canonical x (..., n~)."""
    for layer, blocks in enumerate(theta):
        x = canonical(multiply(blocks, permute(x, permutations, layer, theta.shape[1])))
    return x


def transposed(theta: Tensor, permutations: Tensor | None, y: Tensor) -> Tensor:
    """U^T y for canonical y (..., n~)."""
    for layer in reversed(range(len(theta))):
        rows = y.unflatten(-1, (-1, theta.shape[1])).transpose(-1, -2)
        y = unpermute(multiply(theta[layer].transpose(0, 1), rows), permutations, layer)
    return y


def matvec(theta: Tensor, permutations: Tensor | None, v: Tensor, kept: None = None) -> Tensor:
    """E^T U^T U E v for v of shape (n,); n~ is read off theta. Nothing is kept between calls."""
    padded = v.new_zeros(theta.shape[1] * theta.shape[3])
    padded[: v.numel()] = v
    return transposed(theta, permutations, forward(theta, permutations, padded))[: v.numel()]


def learn_(
    theta: Tensor,
    moments: inner_optimizer.Moments | None,
    permutations: Tensor | None,
    g: Tensor,
    m: Tensor,
    lr: Number,
    rates: inner_optimizer.Rates,
    kept: None = None,
) -> None:
    """One inner update of theta along h = -d/dtheta lr <U g, U m>, by backpropagation through the layers (section 3).

    With a, c the inputs of a layer for g and m, and d, e the vectors back-propagated from -lr U m and -lr U g, the
    hypergradient of a block is a d^T + c e^T. A layer is updated as soon as its block's old value has served to carry d
    and e down, so no more than one layer's h exists at a time.
    """
    if len(theta) == 0:
        return
    pair = g.new_zeros(2, theta.shape[1] * theta.shape[3])
    pair[0, : g.numel()] = g
    pair[1, : m.numel()] = m
    inputs = []
    for layer, blocks in enumerate(theta):
        inputs.append(permute(pair, permutations, layer, theta.shape[1]))
        pair = canonical(multiply(blocks, inputs[-1]))
    pair = pair.flip(0).mul_(-lr)  # d starts from U m, e from U g
    for layer in reversed(range(len(theta))):
        d, e = back = pair.unflatten(-1, (-1, theta.shape[1])).transpose(-1, -2).contiguous()
        a, c = inputs.pop()
        h = (a[:, None] * d).addcmul_(c[:, None], e)
        if layer > 0:
            pair = unpermute(multiply(theta[layer].transpose(0, 1), back), permutations, layer)
        _update_row(theta, layer, h, moments, rates)


# ---- LODO-Residuals: theta is w_1 .. w_N and D, (N + 1, n~), and every layer has indices (N, n~) --------------------


def residual_matvec(theta: Tensor, indices: Tensor, v: Tensor) -> Tensor:
    """E^T A_1^T .. A_N^T D A_N .. A_1 E v for v of shape (n,), with A_l z = z + w_l * z[perm_l]."""
    x = v.new_zeros(theta.shape[1])
    x[: v.numel()] = v
    for weight, index in zip(theta[:-1], indices, strict=True):
        x.addcmul_(weight, x[index])
    x.mul_(theta[-1])
    for layer in reversed(range(len(indices))):
        x.index_add_(0, indices[layer], theta[layer] * x)
    return x[: v.numel()]


def residual_learn_(
    theta: Tensor,
    moments: inner_optimizer.Moments | None,
    indices: Tensor,
    g: Tensor,
    m: Tensor,
    lr: Number,
    rates: inner_optimizer.Rates,
) -> None:
    """One inner update of w and D.

    Back-propagation in stretches of about sqrt(N) layers, each run forward again from its kept first input, so that the
    inputs of all N layers (twice theta's size) never exist together.
    """
    layers = len(indices)
    stretch = max(1, math.isqrt(layers))
    pair = g.new_zeros(2, theta.shape[1])
    pair[0, : g.numel()] = g
    pair[1, : m.numel()] = m
    kept = []
    for layer in range(layers):
        if layer % stretch == 0:
            kept.append(pair.clone())
        pair.addcmul_(theta[layer], pair[:, indices[layer]])
    h = (pair[0] * pair[1]).mul_(-lr)
    back = pair.flip(0).mul_(theta[-1]).mul_(-lr)  # the vectors that meet g's side and m's side
    _update_row(theta, layers, h, moments, rates)
    for begin in reversed(range(0, layers, stretch)):
        pair = kept.pop()
        gathered = []
        for layer in range(begin, min(begin + stretch, layers)):
            gathered.append(pair[:, indices[layer]])
            pair.addcmul_(theta[layer], gathered[-1])
        for layer in reversed(range(begin, min(begin + stretch, layers))):
            h = gathered.pop().mul_(back).sum(0)
            back.index_add_(1, indices[layer], theta[layer] * back)
            _update_row(theta, layer, h, moments, rates)


def _update_row(
    theta: Tensor, row: int, h: Tensor, moments: inner_optimizer.Moments | None, rates: inner_optimizer.Rates
) -> None:
    slices = None if moments is None else (moments[0][row], moments[1][row])
    inner_optimizer.update_(theta[row], h, slices, rates, row * h.numel())


# ---- LODO-Diagonal --------------------------------------------------------------------------------------------------


def diagonal_learn_(
    theta: Tensor,
    moments: inner_optimizer.Moments | None,
    g: Tensor,
    m: Tensor,
    lr: Number,
    rates: inner_optimizer.Rates,
) -> None:
    """One inner update of diag(theta)."""
    inner_optimizer.update_(theta, (g * m).mul_(-lr), moments, rates)


# ---- what is kept in bfloat16 ---------------------------------------------------------------------------------------


def round_into_(target: Tensor, values: Tensor, count: Number) -> None:
    """Rounds a float vector into a bfloat16 one. Minus the count, so that no element shares its bits with theta's."""
    target.copy_(to_bfloat16(values, random_words(0, values.numel(), -count, values.device)))
