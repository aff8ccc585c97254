"""Figures about a learned preconditioner."""

from collections.abc import Callable

import torch
from torch import Tensor

from lodo.preconditioners import Preconditioner


def hessian_error(
    preconditioner: Preconditioner,
    hvp: Callable[[Tensor], Tensor],
    *,
    lr: float = 1.0,
    samples: int = 100,
    generator: torch.Generator | None = None,
) -> float:
    """How far G is from the inverse of the Hessian H: ||I - G H||_F / sqrt(n), G = lr * preconditioner (paper,
    section 5.1).

    Estimated as sqrt(mean ||v - G H v||^2) over random unit vectors v.

    Args:
        preconditioner: acts on R^n.
        hvp: maps v of shape (n,), of the preconditioner's dtype and device, to H v.
        lr: the lr of the optimizer, a factor of G.
        samples: number of random vectors, at least 1.
        generator: source of the vectors, on the preconditioner's device; torch's default one if None.

    Raises:
        ValueError: if `samples` is less than 1.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    theta = preconditioner.theta
    total = 0.0
    for _ in range(samples):
        v = torch.randn(preconditioner.size, dtype=theta.dtype, device=theta.device, generator=generator)
        v /= torch.linalg.vector_norm(v)
        residual = v - lr * preconditioner.matvec(hvp(v).detach())
        total += float(torch.dot(residual, residual))
    return (total / samples) ** 0.5
