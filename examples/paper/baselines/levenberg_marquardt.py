"""Levenberg-Marquardt with the gradient as the residual."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from examples.paper.baselines.quasi_newton import FlatOptimizer


class LevenbergMarquardt(FlatOptimizer):
    """Levenberg-Marquardt (Marquardt 1963) for the equations grad f = 0, whose Jacobian is the Hessian H of the sample.

    x <- x - (H^2 + damping * diag(H^2))^-1 H g. Without damping this is Newton's method.

    Args:
        damping: weight of the diagonal.

    Raises:
        ValueError: damping below 0; for params as `FlatOptimizer`.
    """

    def __init__(self, params: ParamsT, damping: float = 1.0) -> None:
        if not damping >= 0:
            raise ValueError(f"damping must be at least 0, got {damping!r}")
        super().__init__(params, {"damping": damping})

    def step(self, loss_fn: Callable[[], Tensor]) -> float:  # type: ignore[override]
        """Takes one step and returns the loss before it.

        Args:
            loss_fn: returns the loss of the current sample at the parameters, 0-dim, twice differentiable in them.

        Raises:
            torch.linalg.LinAlgError: if the matrix is singular; the parameters have not moved then.
        """
        loss = loss_fn()
        gradient, hessian = gradient_and_hessian(loss, self._params)
        normal = hessian @ hessian
        normal.diagonal().mul_(1 + self.param_groups[0]["damping"])
        self.move(torch.linalg.solve(normal, hessian @ gradient).neg_())
        self._own["step"] = self._own.get("step", 0) + 1
        return float(loss.detach())


def gradient_and_hessian(loss: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradient (n,) and Hessian (n, n) of `loss` in `params`, detached, by autograd."""
    gradient = _flatten(torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True))
    unit = torch.eye(len(gradient), dtype=gradient.dtype, device=gradient.device)

    def row(vector: Tensor) -> Tensor:
        return _flatten(torch.autograd.grad(gradient, params, vector, retain_graph=True, materialize_grads=True))

    try:
        hessian = torch.func.vmap(row)(unit)  # six times as fast as is_grads_batched where it multiplies by a matrix
    except RuntimeError:  # an operation that vmap does not know; an error of the loss itself comes again
        hessian = torch.stack([row(vector) for vector in unit])
    return gradient.detach(), hessian


def _flatten(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])
