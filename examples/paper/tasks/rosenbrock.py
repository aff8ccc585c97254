"""The Rosenbrock function (section 5.2), without noise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from examples.paper.tasks.base import Task

START = (-0.5, 2.0)
MINIMUM = (1.0, 1.0)


def rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    """f = 0.01 (1 - x)^2 + (y - x^2)^2, elementwise."""
    return 0.01 * (1 - x) ** 2 + (y - x**2) ** 2


class Rosenbrock(Task):
    """f(x, y) from (-0.5, 2) in float64; every sample is the same, so the seed changes nothing here."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.params = [torch.tensor(START, dtype=torch.float64, requires_grad=True)]

    def draw(self) -> None:
        """Nothing to draw: f is exact."""

    def loss(self, params: Sequence[Tensor]) -> Tensor:
        x, y = params[0]
        return rosenbrock(x, y)
