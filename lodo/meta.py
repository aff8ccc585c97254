"""The inner optimizer: what moves theta, the parameters of the preconditioner, along the hypergradient h.

Adam in the authors' form (paper, Algorithm 1 and Appendix; betas 0.9 and 0.999, eps 1e-7):

    M <- b1 M + (1 - b1) h        V <- b2 V + (1 - b2) h^2
    theta <- theta - meta_lr * sqrt(1 - b2^t) / (1 - b1^t) * M / (sqrt(V) + eps)

or plain SGD (the ablation LODO-SGD): theta <- theta - meta_lr * h.

The numbers that one step needs are gathered in a small tensor, the `rates`, so that they stay on the device:
entries are (step_size, 1 - b1, b2, 1 - b2, eps). An inactive step has the rates (0, 0, 1, 0, eps), which leave
theta, M and V as they are, bit for bit.
"""

import functools

import torch
from torch import Tensor

BETA1 = 0.9
BETA2 = 0.999
EPS = 1e-7

Moments = tuple[Tensor, Tensor]
"""(M, V) of the inner Adam, each of theta's shape."""

KINDS = ("adam", "sgd")


def start_moments(kind: str, theta: Tensor) -> Moments | None:
    """Zeros for the inner Adam, nothing for the inner SGD."""
    return (torch.zeros_like(theta), torch.zeros_like(theta)) if kind == "adam" else None


@functools.cache
def _constants(device: torch.device, dtype: torch.dtype, count_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The betas, and the rates of an active step (but for the step size) and of an inactive one."""
    betas = torch.tensor([BETA1, BETA2], dtype=count_dtype, device=device)
    active = torch.tensor([1.0, 1 - BETA1, BETA2, 1 - BETA2, EPS], dtype=dtype, device=device)
    inactive = torch.tensor([0.0, 0.0, 1.0, 0.0, EPS], dtype=dtype, device=device)
    return betas, active, inactive


def next_rates(kind: str, meta_lr: float, count: Tensor, active: Tensor, dtype: torch.dtype) -> Tensor:
    """Advances `count`, the t above, if `active` (0-dim bool), and returns the rates, shape (5,), in `dtype`."""
    betas, when_active, when_inactive = _constants(count.device, dtype, count.dtype)
    count.add_(active)
    rates = torch.where(active, when_active, when_inactive)
    if kind == "sgd":
        rates[0].mul_(meta_lr)
    else:
        first, second = (1 - betas ** count.clamp(min=1)).unbind()  # clamp: an inactive first step divides no 0 by 0
        rates[0].mul_(meta_lr * second.sqrt_().div_(first))
    return rates


def update_(theta: Tensor, h: Tensor, moments: Moments | None, rates: Tensor) -> None:
    """One inner step of `theta` (any slice of it, with the same slice of the moments) in place. Overwrites `h`."""
    step_size, forget1, keep2, forget2, eps = rates.unbind()
    if moments is None:
        theta.sub_(h.mul_(step_size))
        return
    exp_avg, exp_avg_sq = moments
    exp_avg.lerp_(h, forget1)
    exp_avg_sq.mul_(keep2).addcmul_(h.mul_(h), forget2)
    theta.sub_(torch.sqrt(exp_avg_sq, out=h).add_(eps).reciprocal_().mul_(exp_avg).mul_(step_size))
