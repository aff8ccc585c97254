"""The inner optimizer: what moves theta, the parameters of the preconditioner, along the hypergradient h.

Adam in the authors' form (paper, Algorithm 1; betas 0.9 and 0.999, eps 1e-7):

    M <- b1 M + (1 - b1) h        V <- b2 V + (1 - b2) h^2
    theta <- theta - meta_lr * sqrt(1 - b2^t) / (1 - b1^t) * M / (sqrt(V) + eps)

or plain SGD (the ablation LODO-SGD): theta <- theta - meta_lr * h.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lodo.scalars import Number, is_tensor

BETA1 = 0.9
BETA2 = 0.999
EPS = 1e-7

KINDS = ("adam", "sgd")

Moments = tuple[Tensor, Tensor]
"""(M, V) of the inner Adam, each of theta's shape."""


class Rates(NamedTuple):
    """The numbers of one inner step: plain, or 0-dim tensors of theta's dtype."""

    step_size: Number
    forget1: Number  # 1 - b1
    keep2: Number  # b2
    forget2: Number  # 1 - b2


def start_moments(theta: Tensor) -> Moments:
    """M and V before the first step."""
    return torch.zeros_like(theta), torch.zeros_like(theta)


def rates(kind: str, meta_lr: float, count: Number, active: Number, dtype: torch.dtype) -> Rates:
    """The rates of inner step number `count`, the t above. Those of an inactive step leave theta, M and V as they are,
    bit for bit."""
    if kind == "sgd":
        step_size = active * meta_lr
    else:
        t = count + (count < 1)  # an inactive first step must not divide 0 by 0
        step_size = active * meta_lr * (1 - BETA2**t) ** 0.5 / (1 - BETA1**t)
    numbers = (step_size, active * (1 - BETA1), 1 - active * (1 - BETA2), active * (1 - BETA2))
    return Rates(*(torch.stack(numbers).to(dtype).unbind() if is_tensor(active) else numbers))


def update_(theta: Tensor, h: Tensor, moments: Moments | None, rates: Rates) -> None:
    """One inner step of `theta` (any slice of it, with the same slice of the moments) in place. Overwrites `h`."""
    if moments is None:
        theta.sub_(h.mul_(rates.step_size))
        return
    exp_avg, exp_avg_sq = moments
    exp_avg.lerp_(h, rates.forget1)
    exp_avg_sq.mul_(rates.keep2).add_(h.mul_(h).mul_(rates.forget2))
    theta.sub_(torch.sqrt(exp_avg_sq, out=h).add_(EPS).reciprocal_().mul_(exp_avg).mul_(rates.step_size))
