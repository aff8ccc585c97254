"""LODO-Residuals: U = D A_N ... A_1 with elementwise residual layers A_l z = z + w_l * z[perm_l] (paper, ablations)."""

import math
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from lodo import kernels
from lodo.declarations import Options
from lodo.inner_optimizer import Moments, Rates
from lodo.preconditioners.base import (
    Preconditioner,
    as_permutations,
    as_theta,
    check_size,
    padded_size,
    random_permutations,
)
from lodo.scalars import Number

DEFAULT_DEPTH = 64


class Residual(Preconditioner):
    """The operator E^T A_1^T .. A_N^T D A_N .. A_1 E: symmetric, and positive semi-definite while D >= 0.

    Args:
        diagonals: (N + 1, n~), float32 or float64: w_1 .. w_N, then D.
        permutations: (N, n~), integers; every row a permutation.
        size: n, at most n~.

    Raises:
        ValueError: for shapes, dtypes or values other than these.
    """

    kind = "residual"
    has_bound = False

    def __init__(self, diagonals: Tensor, permutations: Tensor, size: int) -> None:
        diagonals = as_theta("diagonals", diagonals, dims=2)
        rows, padded = diagonals.shape
        if rows == 0 or padded == 0:
            raise ValueError(f"diagonals must have shape (N + 1, n~), got {tuple(diagonals.shape)}")
        indices = as_permutations(permutations, rows - 1, padded, diagonals.device)
        super().__init__(diagonals, indices, check_size(size, padded))

    @classmethod
    def start(cls, size: int, options: Options, dtype: torch.dtype, device: torch.device) -> Self:
        """w_l ~ Normal(0, 1 / sqrt(N)), D = 1, random permutations, all from options["seed"]."""
        rows, padded = cls.theta_shape(size, options)
        generator = np.random.default_rng(options["seed"])
        theta = torch.ones(rows, padded, dtype=dtype, device=device)
        for row in theta[:-1]:
            row.copy_(torch.from_numpy(generator.standard_normal(padded) / math.sqrt(rows - 1)))
        return cls.wrap(theta, random_permutations(rows - 1, padded, generator).to(device), size)

    @classmethod
    def theta_shape(cls, size: int, options: Options) -> tuple[int, ...]:
        depth = DEFAULT_DEPTH if options["depth"] is None else options["depth"]
        return (depth + 1, padded_size(size, options["expansion"], 1))

    @classmethod
    def permutations_shape(cls, size: int, options: Options) -> tuple[int, int] | None:
        rows, padded = cls.theta_shape(size, options)
        return (rows - 1, padded)

    @property
    def options(self) -> dict[str, Any]:
        rows, padded = self.theta.shape
        return {"preconditioner": self.kind, "depth": rows - 1, "expansion": padded / self.size}

    @property
    def diagonals(self) -> Tensor:
        """A copy of w_1 .. w_N and D, shape (N + 1, n~)."""
        return self.theta.clone()

    @property
    def permutations(self) -> Tensor:
        """A copy of the permutations, int64 of shape (N, n~)."""
        return self._indices.to(torch.int64)

    @property
    def _indices(self) -> Tensor:
        indices = self.permutations_stored
        if indices is None:
            raise RuntimeError("a residual preconditioner has lost its permutations")
        return indices

    def apply(self, v: Tensor) -> Tensor:
        return kernels.for_residual(self.theta).residual_matvec(self.theta, self._indices, v)

    def learn_(self, g: Tensor, m: Tensor, lr: Number, moments: Moments | None, rates: Rates) -> None:
        kernels.for_residual(self.theta).residual_learn_(self.theta, moments, self._indices, g, m, lr, rates)
