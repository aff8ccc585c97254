"""LODO-Global: G = lr * w * I with one learned scalar w, starting at 1 (paper, section 5.3 ablations)."""

from typing import Any, Self

import torch
from torch import Tensor

from lodo import inner_optimizer
from lodo.declarations import Options
from lodo.inner_optimizer import Moments, Rates
from lodo.preconditioners.base import Preconditioner, as_theta, check_size
from lodo.scalars import Number


class Scalar(Preconditioner):
    """The operator weight * I on R^size, for a 0-dim `weight`, float32 or float64. Not kept positive."""

    kind = "scalar"

    def __init__(self, weight: Tensor, size: int) -> None:
        super().__init__(as_theta("weight", weight, dims=0), None, check_size(size, 2**63 - 1))

    @classmethod
    def start(cls, size: int, options: Options, dtype: torch.dtype, device: torch.device) -> Self:
        return cls.wrap(torch.ones((), dtype=dtype, device=device), None, size)

    @classmethod
    def theta_shape(cls, size: int, options: Options) -> tuple[int, ...]:
        return ()

    @property
    def options(self) -> dict[str, Any]:
        return {"preconditioner": self.kind}

    @property
    def weight(self) -> Tensor:
        """A copy of w, 0-dim."""
        return self.theta.clone()

    def apply(self, v: Tensor) -> Tensor:
        return self.theta * v

    def learn_(self, g: Tensor, m: Tensor, lr: Number, moments: Moments | None, rates: Rates) -> None:
        inner_optimizer.update_(self.theta, torch.dot(g, m).mul_(-lr), moments, rates)

    def bound_condition_(self, largest: float) -> None:
        self.theta.clamp_(largest**-0.5, largest**0.5)
