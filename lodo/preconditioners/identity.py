"""No network: G = lr * T^T T, what base and scale alone give."""

from typing import Any, Self

import torch
from torch import Tensor

from lodo.declarations import Options
from lodo.inner_optimizer import Moments, Rates
from lodo.preconditioners.base import Preconditioner, check_size
from lodo.scalars import Number


class Identity(Preconditioner):
    """The identity on R^size. It learns nothing and keeps nothing.

    Raises:
        ValueError: if `size` is not an int >= 1.
    """

    kind = "identity"
    is_elementwise = True
    learns = False

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(torch.empty(0, dtype=dtype), None, check_size(size, 2**63 - 1))

    @classmethod
    def start(cls, size: int, options: Options, dtype: torch.dtype, device: torch.device) -> Self:
        return cls.wrap(torch.empty(0, dtype=dtype, device=device), None, size)

    @classmethod
    def theta_shape(cls, size: int, options: Options) -> tuple[int, ...]:
        return (0,)

    @property
    def options(self) -> dict[str, Any]:
        return {"preconditioner": self.kind}

    def apply(self, v: Tensor) -> Tensor:
        return v.clone()

    def learn_(self, g: Tensor, m: Tensor, lr: Number, moments: Moments | None, rates: Rates) -> None:
        pass

    def bound_condition_(self, largest: float) -> None:
        pass
