"""LODO's network: U = B_N P_N ... B_1 P_1 of block-diagonal and permutation layers (paper, section 3)."""

from collections.abc import Iterator
from contextlib import contextmanager
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
from lodo.preconditioners.singular_values import clamp_
from lodo.scalars import Number

DEFAULT_DEPTH = 16
CHUNK = 2048  # blocks drawn at a time: few enough to stay in the cache


class BlockPermutation(Preconditioner):
    """The operator E^T U^T U E, symmetric positive semi-definite whatever the blocks are.

    E zero-pads R^n to R^n~, and with z = x[permutations[l]] layer l gives y[b, o] = sum_i z[b, i] * blocks[l, b, i, o]
    for z and y seen as (n~ / k, k).

    Args:
        blocks: (N, n~ / k, k, k), float32 or float64.
        permutations: (N, n~), integers; every row a permutation. Rows that are all the perfect shuffle are recognised
            and run without indices.
        size: n, at most n~.

    Raises:
        ValueError: for shapes, dtypes or values other than these.
    """

    kind = "block_permutation"

    def __init__(self, blocks: Tensor, permutations: Tensor, size: int) -> None:
        blocks = as_theta("blocks", blocks, dims=4)
        layers, width, block, columns = blocks.shape
        if block != columns or block == 0 or width == 0:
            raise ValueError(f"blocks must have shape (N, n~ / k, k, k), got {tuple(blocks.shape)}")
        indices = as_permutations(permutations, layers, width * block, blocks.device)
        is_shuffle = torch.equal(indices, shuffle(width * block, block, blocks.device).to(indices).expand(layers, -1))
        theta = blocks.permute(0, 2, 3, 1).contiguous()
        super().__init__(theta, None if is_shuffle else indices, check_size(size, width * block))

    @classmethod
    def start(cls, size: int, options: Options, dtype: torch.dtype, device: torch.device) -> Self:
        """Haar-random orthogonal blocks, so that U^T U = I, and permutations as asked, all from options["seed"]."""
        shape = cls.theta_shape(size, options)
        _, block, _, width = shape
        generator = np.random.default_rng(options["seed"])
        theta = torch.empty(shape, dtype=dtype, device=device)
        for layer in theta:
            for begin in range(0, width, CHUNK):
                chunk = layer[..., begin : begin + CHUNK]
                chunk.copy_(random_orthogonal(block, chunk.shape[-1], generator))
        indices = cls.permutations_shape(size, options)
        permutations = None if indices is None else random_permutations(*indices, generator).to(device)
        return cls.wrap(theta, permutations, size)

    @classmethod
    def theta_shape(cls, size: int, options: Options) -> tuple[int, ...]:
        block = options["block_size"]
        depth = DEFAULT_DEPTH if options["depth"] is None else options["depth"]
        return (depth, block, block, padded_size(size, options["expansion"], block) // block)

    @classmethod
    def permutations_shape(cls, size: int, options: Options) -> tuple[int, int] | None:
        layers, block, _, width = cls.theta_shape(size, options)
        return None if layers == 0 or options["permutation"] == "shuffle" else (layers, block * width)

    @property
    def options(self) -> dict[str, Any]:
        layers, block, _, width = self.theta.shape
        return {
            "preconditioner": self.kind,
            "depth": layers,
            "block_size": block,
            "expansion": block * width / self.size,
            "permutation": "shuffle" if self.permutations_stored is None else "random",
        }

    @property
    def blocks(self) -> Tensor:
        """A copy of the blocks, shape (N, n~ / k, k, k)."""
        return self.theta.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)

    @property
    def permutations(self) -> Tensor:
        """A copy of the permutations, int64 of shape (N, n~)."""
        layers, block, _, width = self.theta.shape
        if self.permutations_stored is None:
            return shuffle(block * width, block, self.theta.device).repeat(layers, 1)
        return self.permutations_stored.to(torch.int64)

    def apply(self, v: Tensor) -> Tensor:
        with self._backend(learning=False) as (backend, kept):
            return backend.matvec(self.theta, self.permutations_stored, v, kept)

    def learn_(self, g: Tensor, m: Tensor, lr: Number, moments: Moments | None, rates: Rates) -> None:
        with self._backend(learning=True) as (backend, kept):
            backend.learn_(self.theta, moments, self.permutations_stored, g, m, lr, rates, kept)

    def bound_condition_(self, largest: float) -> None:
        if layers := len(self.theta):
            # A product of N layers with singular values in [1 / r, r] has its own in [r ** -N, r ** N].
            radius = largest ** (1 / (4 * layers))
            clamp_(self.theta, 1 / radius, radius)

    @contextmanager
    def _backend(self, learning: bool) -> Iterator[tuple[Any, Tensor | None]]:
        """The kernels, and what they keep between calls, taken out while in use: another thread's call gets its own."""
        chosen = kernels.for_network(self.theta, self.permutations_stored, learning, self.__dict__.pop("_kept", None))
        yield chosen
        self._kept = chosen[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}


def shuffle(padded: int, block: int, device: torch.device) -> Tensor:
    """The perfect shuffle as indices, int64 (padded,): (n~/k, k) seen transposed, as in a radix-k butterfly."""
    return torch.arange(padded, device=device).view(-1, block).T.reshape(-1)


def random_orthogonal(block: int, count: int, generator: np.random.Generator) -> Tensor:
    """`count` Haar-distributed orthogonal matrices, float64 of shape (block, block, count), on the CPU.

    Gram-Schmidt on Gaussian matrices gives the Haar measure (it is QR with a positive diagonal). Two projections keep
    the columns orthogonal to rounding; all matrices advance together, which is faster than batched QR for tiny blocks.
    """
    columns = torch.from_numpy(generator.standard_normal((block, block, count)))
    for j, column in enumerate(columns):
        earlier = columns[:j]
        for _ in range(2):
            column.sub_((earlier * (earlier * column).sum(1, keepdim=True)).sum(0))
        column.div_(column.norm(dim=0))
    return columns
