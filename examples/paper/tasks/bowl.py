"""The noisy quadratic bowl (section 5.1): track the minimum of a quadratic whose centre walks at random."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.paper.tasks.base import Task

SMALLEST_EIGENVALUE = 1e-3
CHUNK = 1024  # steps of the centre that are drawn at once: one call to the generator is slow next to one evaluation


class NoisyBowl(Task):
    """f(x) = (x - c)^T H (x - c) / 2 in float64, where c takes a step Normal(0, noise^2 I) before every evaluation.

    H = Q diag(eigenvalues) Q^T with Q a random orthogonal matrix and eigenvalues log-spaced from 1e-3 to 1. x and c
    start at 0.

    Args:
        seed: of Q and of the centre's walk.
        size: n, the dimension.
        noise: standard deviation of the centre's steps; 1 in the paper.
        walk_seed: of the centre's walk alone, for a second walk over the same H; None: follows from `seed`.

    Raises:
        ValueError: size < 1 or noise <= 0.
    """

    def __init__(self, seed: int = 0, *, size: int = 100, noise: float = 1.0, walk_seed: int | None = None) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if not noise > 0:
            raise ValueError(f"noise must be above 0, got {noise}")
        self.seed, self.noise = seed, noise
        self.generator = torch.Generator().manual_seed(seed if walk_seed is None else walk_seed)
        self.eigenvalues = torch.logspace(math.log10(SMALLEST_EIGENVALUE), 0, size, dtype=torch.float64)
        basis = torch.from_numpy(np.linalg.qr(np.random.default_rng([seed, size]).standard_normal((size, size)))[0])
        self.h = basis @ torch.diag(self.eigenvalues) @ basis.T
        self.params = [torch.zeros(size, dtype=torch.float64, requires_grad=True)]
        self.center = torch.zeros(size, dtype=torch.float64)
        self._walk = torch.empty(0, size, dtype=torch.float64)
        self._at = 0

    def sibling(self, seed: int) -> "NoisyBowl":
        return NoisyBowl(self.seed, size=len(self.center), noise=self.noise, walk_seed=seed)

    @property
    def floor(self) -> float:
        """The mean loss of Newton's method with the true Hessian, which always stands where the centre was last."""
        return float(0.5 * self.noise**2 * self.eigenvalues.sum())

    def draw(self) -> None:
        if self._at == len(self._walk):
            steps = torch.randn(CHUNK, len(self.center), dtype=torch.float64, generator=self.generator)
            self._walk, self._at = self.noise * steps, 0
        self.center += self._walk[self._at]
        self._at += 1

    def loss(self, params: Sequence[Tensor]) -> Tensor:
        offset = params[0] - self.center
        return 0.5 * (offset @ (self.h @ offset))

    def backward(self) -> float:
        """As in the base class, in closed form: the gradient is H (x - c)."""
        (x,) = self.params
        offset = x.detach() - self.center
        gradient = self.h @ offset
        x.grad = gradient
        return 0.5 * float(offset @ gradient)

    def state_dict(self) -> dict[str, Any]:
        walk = {"center": self.center.clone(), "walk": self._walk[self._at :].clone()}
        return super().state_dict() | walk

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.center.copy_(state["center"])
        self._walk, self._at = state["walk"].clone(), 0
