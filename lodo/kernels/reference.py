"""The block-diagonal x permutation network in plain torch: the ground truth for every faster kernel.

Blocks are stored structure-of-arrays, (N, k_in, k_out, w) for w blocks per layer: B[i, o] of all blocks of a layer
is one contiguous row, so that a product of blocks is k fused multiply-adds over rows. Vectors are in canonical
order (component o of block b at b * k + o); inside a layer they are seen as k rows, (..., k, w).

`permutations` is an integer (N, n~) tensor of indices, or None for the perfect shuffle, which is a transpose.
"""

import torch
from torch import Tensor

from lodo import meta
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


def matvec(theta: Tensor, permutations: Tensor | None, v: Tensor) -> Tensor:
    """E^T U^T U E v for v of shape (n,); n~ is read off theta."""
    padded = v.new_zeros(theta.shape[1] * theta.shape[3])
    padded[: v.numel()] = v
    return transposed(theta, permutations, forward(theta, permutations, padded))[: v.numel()]


def learn_(
    theta: Tensor,
    moments: meta.Moments | None,
    permutations: Tensor | None,
    g: Tensor,
    m: Tensor,
    lr: Number,
    rates: meta.Rates,
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
        slices = None if moments is None else (moments[0][layer], moments[1][layer])
        meta.update_(theta[layer], h, slices, rates, layer * h.numel())
