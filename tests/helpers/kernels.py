"""What the tests of kernels share: their inputs, and how close results must be."""

import pytest
import torch

import lodo
from lodo import inner_optimizer
from lodo.kernels import native

RATES = inner_optimizer.Rates(step_size=0.01, forget1=0.1, keep2=0.9, forget2=0.1, count=3)
needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")


def tensors(size, layers, block, expansion, permutation, dtype, moments_dtype=None):
    shape = lodo.BlockPermutation.theta_shape(
        size, {"depth": layers, "block_size": block, "expansion": expansion, "permutation": permutation}
    )
    theta = torch.randn(shape, dtype=dtype) / block**0.5
    padded = block * shape[3]
    indices = torch.stack([torch.randperm(padded) for _ in range(layers)]).int() if permutation == "random" else None
    moments = tuple(0.1 * draw(shape, dtype=dtype).to(moments_dtype or dtype) for draw in (torch.randn, torch.rand))
    return theta, moments, indices, torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype)


def residual_tensors(size, layers, padded, dtype, moments_dtype=None):
    theta = torch.randn(layers + 1, padded, dtype=dtype) / max(1, layers) ** 0.5
    indices = torch.empty(layers, padded, dtype=torch.int32)
    for row in indices:
        row.copy_(torch.randperm(padded))
    moments = tuple(
        0.1 * draw(theta.shape, dtype=dtype).to(moments_dtype or dtype) for draw in (torch.randn, torch.rand)
    )
    return theta, moments, indices, torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype)


def close(found, expected):
    """Equal to a few roundings of the largest number."""
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    tolerance = 200 * torch.finfo(expected.dtype).eps * scale
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def neighbours(values):
    """Integers in the order of the bfloat16 numbers `values`, adjacent for adjacent numbers."""
    bits = values.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
