"""A gain for each coordinate: G = lr * diag(exp(w)), w starting at 0, |w| <= log(1e6): positive whatever is learned."""

import math
from typing import Any, Self

import torch
from torch import Tensor

from lodo import inner_optimizer
from lodo.declarations import Options
from lodo.inner_optimizer import Moments, Rates
from lodo.preconditioners.base import Preconditioner, as_theta
from lodo.scalars import Number


class LogDiagonal(Preconditioner):
    """The operator diag(exp(log_weight)), for `log_weight` of shape (n,), float32 or float64.

    Unlike `Diagonal`, the ablation of the paper, it is positive definite, and the inner Adam changes a gain by a
    factor, not by an amount: gains can come to differ by orders of magnitude. Over a base they correct its D.

    Raises:
        ValueError: for shapes and dtypes other than these.
    """

    kind = "log_diagonal"
    is_elementwise = True
    rate_cap = 30.0  # a meta_lr of 3e-3 is bounded from step 10,000 on, when a base's averages begin to last longer too

    bound = math.log(1e6)  # of |w|: no gain leaves [1e-6, 1e6], whatever it learns from

    def __init__(self, log_weight: Tensor) -> None:
        log_weight = as_theta("log_weight", log_weight, dims=1)
        if len(log_weight) == 0:
            raise ValueError("log_weight must have at least one element, got shape (0,)")
        super().__init__(log_weight, None, len(log_weight))

    @classmethod
    def start(cls, size: int, options: Options, dtype: torch.dtype, device: torch.device) -> Self:
        return cls.wrap(torch.zeros(size, dtype=dtype, device=device), None, size)

    @classmethod
    def theta_shape(cls, size: int, options: Options) -> tuple[int, ...]:
        return (size,)

    @property
    def options(self) -> dict[str, Any]:
        return {"preconditioner": self.kind}

    @property
    def log_weight(self) -> Tensor:
        """A copy of w, shape (n,)."""
        return self.theta.clone()

    def diagonal(self) -> Tensor:
        """The gains, shape (n,)."""
        return torch.exp(self.theta)

    def apply(self, v: Tensor) -> Tensor:
        return self.diagonal().mul_(v)

    def learn_(self, g: Tensor, m: Tensor, lr: Number, moments: Moments | None, rates: Rates) -> None:
        self.learn_logarithms_(self.apply(g), m, lr, moments, rates)

    def learn_logarithms_(self, response: Tensor, m: Tensor, lr: Number, moments: Moments | None, rates: Rates) -> None:
        inner_optimizer.update_(self.theta, response.mul_(m).mul_(-lr), moments, rates)
        self.theta.clamp_(-self.bound, self.bound)

    def bound_condition_(self, largest: float) -> None:
        bound = 0.5 * math.log(largest)
        self.theta.clamp_(-bound, bound)
