"""LODO-Diagonal: G = lr * diag(w), w starting at 1 (paper, section 5.3 ablations)."""

from typing import Any, Self

import torch
from torch import Tensor

from lodo import kernels
from lodo.declarations import Options
from lodo.inner_optimizer import Moments, Rates
from lodo.preconditioners.base import Preconditioner, as_theta
from lodo.scalars import Number


class Diagonal(Preconditioner):
    """The operator diag(weight), for `weight` of shape (n,), float32 or float64. Not kept positive.

    Raises:
        ValueError: for shapes and dtypes other than these.
    """

    kind = "diagonal"

    def __init__(self, weight: Tensor) -> None:
        weight = as_theta("weight", weight, dims=1)
        if len(weight) == 0:
            raise ValueError("weight must have at least one element, got shape (0,)")
        super().__init__(weight, None, len(weight))

    @classmethod
    def start(cls, size: int, options: Options, dtype: torch.dtype, device: torch.device) -> Self:
        return cls.wrap(torch.ones(size, dtype=dtype, device=device), None, size)

    @classmethod
    def theta_shape(cls, size: int, options: Options) -> tuple[int, ...]:
        return (size,)

    @property
    def options(self) -> dict[str, Any]:
        return {"preconditioner": self.kind}

    @property
    def weight(self) -> Tensor:
        """A copy of w, shape (n,)."""
        return self.theta.clone()

    def apply(self, v: Tensor) -> Tensor:
        return self.theta * v

    def learn_(self, g: Tensor, m: Tensor, lr: Number, moments: Moments | None, rates: Rates) -> None:
        kernels.for_vectors(self.theta).diagonal_learn_(self.theta, moments, g, m, lr, rates)

    def bound_condition_(self, largest: float) -> None:
        self.theta.clamp_(largest**-0.5, largest**0.5)
