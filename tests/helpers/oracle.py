"""Independent forms to check the library against: the operators in the paper's layout, differentiable by autograd."""

from typing import Any

import torch
from torch import Tensor

import lodo
from lodo.preconditioners import Preconditioner

KINDS = ("block_permutation", "residual", "diagonal", "scalar", "log_diagonal")
"""Those that learn; "identity" has nothing to."""


def learned(g: Preconditioner) -> Tensor:
    """What the preconditioner has learned, in the paper's layout."""
    if isinstance(g, lodo.BlockPermutation):
        return g.blocks
    if isinstance(g, lodo.Residual):
        return g.diagonals
    if isinstance(g, lodo.LogDiagonal):
        return g.log_weight
    assert isinstance(g, lodo.Diagonal | lodo.Scalar)
    return g.weight


def in_paper_layout(g: Preconditioner, theta: Tensor) -> Tensor:
    """A tensor in theta's storage layout (a moment, say) in the paper's layout."""
    return theta.permute(0, 3, 1, 2) if isinstance(g, lodo.BlockPermutation) else theta


def matvec(g: Preconditioner, theta: Tensor, v: Tensor) -> Tensor:
    """The operator times v with `theta` (paper's layout) in place of what it has learned."""
    if isinstance(g, lodo.Diagonal | lodo.Scalar):
        return theta * v
    if isinstance(g, lodo.LogDiagonal):
        return theta.exp() * v
    assert isinstance(g, lodo.BlockPermutation | lodo.Residual)
    is_block = isinstance(g, lodo.BlockPermutation)
    indices = g.permutations
    u = torch.cat([v, v.new_zeros((theta.shape[1] * theta.shape[2] if is_block else theta.shape[1]) - len(v))])
    matrices = theta.transpose(2, 3) if is_block else []
    for layer, index in enumerate(indices):
        u = block_diagonal(matrices[layer], u[index]) if is_block else u + theta[layer] * u[index]
    if not is_block:
        u = theta[-1] * u
    for layer, index in reversed(list(enumerate(indices))):
        back = index.argsort()
        u = block_diagonal(matrices[layer].mT, u)[back] if is_block else u + (theta[layer] * u)[back]
    return u[: len(v)]


def block_diagonal(blocks: Tensor, v: Tensor) -> Tensor:
    """The matrix with these blocks on its diagonal times v. It is made as long as it is small."""
    if len(v) <= 200:
        return torch.block_diag(*blocks) @ v
    return (blocks @ v.view(len(blocks), -1, 1)).flatten()


def fresh(kind: str, size: int, *, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Preconditioner:
    """A preconditioner as an optimizer starts it, away from its start by a random perturbation."""
    x = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
    optimizer = lodo.LODO([x], preconditioner=kind, seed=seed, **options)
    x.grad = torch.ones_like(x)
    optimizer.step()
    g = optimizer.preconditioners[0]
    assert g is not None
    noise = torch.randn(g.theta.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    g.theta.add_(noise, alpha=0.1)
    return g


def quadratic(size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """H and c of 0.5 (x - c)^T H (x - c), H positive definite with eigenvalues from 0.1 to 1."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    h = q @ torch.diag(torch.logspace(-1, 0, size, dtype=torch.float64)) @ q.T
    return h.to(dtype), torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
