"""The network on CUDA: launches the Triton kernels of gpu_layers.py. reference.py is their ground truth.

Triton comes with torch's CUDA builds; where it is missing the reference does the work. Nothing here waits for the device
or reads from it, so that a step can be captured in a CUDA graph.
"""

import functools
import logging
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from lodo import meta
from lodo.scalars import Number, is_tensor

log = logging.getLogger(__name__)

MAX_BLOCK = 16  # larger blocks would not fit the registers
MAX_NUMBERS = 2**31 - 2**16  # of theta in one layer, or of two vectors: places within them are 32-bit
NUMBERS_PER_THREAD = 16  # of theta, in a tile
PAIRED = (2, 4)  # block sizes whose layers run two at a time; the vectors of larger blocks cost little
SINGLE_PROGRAM = 1 << 13  # numbers of theta per layer up to which one program does all layers
WARPS, WARPS_SINGLE = 4, 8


@functools.cache
def layers() -> ModuleType | None:
    """The kernels, or None where Triton cannot be had."""
    try:
        from lodo.kernels import gpu_layers
    except ImportError as error:
        log.info("no Triton: LODO runs its plain torch kernels on CUDA: %s", error)
        return None
    return gpu_layers


def available(theta: Tensor) -> bool:
    """Whether the kernels take this network: on CUDA, and within their limits."""
    if theta.device.type != "cuda" or torch.version.cuda is None:
        return False
    return is_supported(theta) and layers() is not None


def is_supported(theta: Tensor) -> bool:
    """Whether a network is within the limits of the kernels."""
    layers, block, _, width = theta.shape
    is_small = max(block, 2) * block * width < MAX_NUMBERS
    return layers > 0 and block <= MAX_BLOCK and is_small and theta.dtype in (torch.float32, torch.float64)


def invert(permutations: Tensor) -> Tensor:
    """The inverse of each row, int32."""
    inverse = torch.empty_like(permutations)
    places = torch.arange(permutations.shape[1], dtype=torch.int32, device=permutations.device)
    for row, permutation in zip(inverse, permutations, strict=True):
        row[permutation] = places
    return inverse


class Launches:
    """How the kernels are launched for a network.

    A program's tile is a number of blocks such that each thread has 16 numbers of theta. Either all tiles of a layer, or of
    a pair of layers, are one launch, or one program does the whole network in one.
    """

    def __init__(self, theta: Tensor, permutations: Tensor | None) -> None:
        self.kernels = layers()
        self.layers, self.block, _, self.width = theta.shape
        self.dim = self.block * self.width
        self.is_random = permutations is not None
        self.is_single = self.block * self.dim <= SINGLE_PROGRAM
        warps = WARPS_SINGLE if self.is_single else WARPS
        side = 1 << (self.block - 1).bit_length()
        self.tile = max(1, 32 * warps * NUMBERS_PER_THREAD // side**2)
        self.tiles = -(-self.width // self.tile)
        self.pairs = 0 if self.is_random or self.block not in PAIRED else self.layers // 2
        self.pair_tile = max(1, self.tile // self.block)
        self.constants = {"K": self.block, "num_warps": warps, "num_stages": 1}
        self.single_constants = {**self.constants, "KP": side, "B": self.tile, "RANDOM": self.is_random}
        self.pair_constants = {**self.constants, "T": self.pair_tile}

    @property
    def singles(self) -> range:
        """The layers that run one at a time, above the pairs."""
        return range(2 * self.pairs, self.layers)

    @property
    def slots(self) -> int:
        """How many vectors a pass keeps: the inputs of pairs and single layers, and under the shuffle the output."""
        return self.pairs + len(self.singles) + (not self.is_random)

    def stages(self, stages: range, tiles: int) -> Iterator[tuple[tuple[int], int, int]]:
        """(grid, begin, end) of the launches that take these stages, in their order."""
        if self.is_single and stages:
            yield (1,), min(stages), max(stages) + 1
        else:
            for stage in stages:
                yield (tiles,), stage, stage + 1

    def enter(self, g: Tensor, m: Tensor, target: Tensor, vectors: int) -> None:
        kernel, constants = self.kernels.enter, self.single_constants
        kernel[(self.tiles,)](g, m, target, self.width, g.numel(), V=vectors, **constants)

    def leave(self, source: Tensor, inverse: Tensor | None, out: Tensor) -> None:
        kernel, constants = self.kernels.leave, self.single_constants
        kernel[(self.tiles,)](source, inverse, out, self.width, out.numel(), **constants)

    def up(self, theta: Tensor, x: Tensor, y: Tensor, indices: Tensor | None, vectors: int, slots: int) -> None:
        """U, from the lowest slot of x up, or from pair buffer 0 of y on."""
        tiles = -(-(-(-self.width // self.block)) // self.pair_tile)  # of each of the K stretches
        for grid, *stages in self.stages(range(self.pairs), tiles):
            self.kernels.up_pairs[grid](theta, x, self.width, *stages, slots, tiles, V=vectors, **self.pair_constants)
        more = {"V": vectors, "KEEP": vectors == 2, **self.single_constants}
        for grid, *stages in self.stages(self.singles, self.tiles):
            self.kernels.up_layers[grid](theta, x, y, indices, self.width, *stages, slots, self.pairs, self.tiles, **more)

    def down(self, theta: Tensor, x: Tensor, inverse: Tensor | None, slots: int) -> None:
        """U^T, from where `up` arrived."""
        for grid, *stages in self.stages(self.singles[::-1], self.tiles):
            sizes = (self.width, *stages, self.layers, slots, self.pairs, self.tiles)
            self.kernels.down_layers[grid](theta, x, x, inverse, *sizes, **self.single_constants)
        tiles = -(-self.width // (self.pair_tile * self.block))
        for grid, *stages in self.stages(range(self.pairs)[::-1], tiles):
            self.kernels.down_pairs[grid](theta, x, self.width, *stages, slots, tiles, **self.pair_constants)

    def learn(
        self, learned: tuple[Tensor, ...], x: Tensor, y: Tensor, inverse: Tensor | None, numbers: list[Tensor], adam: bool
    ) -> None:
        """The backward pass with the inner update, from where `up` arrived; `learned` is theta, M and V."""
        more = {"EPS": meta.EPS, "ADAM": adam}
        for grid, *stages in self.stages(self.singles[::-1], self.tiles):
            sizes = (self.width, *stages, self.layers, self.pairs, self.tiles)
            self.kernels.learn_layers[grid](*learned, x, y, inverse, *numbers, *sizes, **self.single_constants, **more)
        tiles = -(-self.width // (self.pair_tile * self.block))
        top = 0 if self.singles else self.pairs
        for grid, *stages in self.stages(range(self.pairs)[::-1], tiles):
            sizes = (self.width, *stages, top, tiles)
            self.kernels.learn_pairs[grid](*learned, x, *numbers, *sizes, **self.pair_constants, **more)


def matvec(theta: Tensor, permutations: Tensor | None, v: Tensor, inverse: Tensor | None) -> Tensor:
    """`reference.matvec`; `inverse` is what `invert` made of the permutations."""
    launches = Launches(theta, permutations)
    x = theta.new_empty(2, launches.dim)
    launches.enter(v.contiguous(), v, x, vectors=1)
    launches.up(theta, x, x, permutations, vectors=1, slots=2)
    launches.down(theta, x, inverse, slots=2)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    launches.leave(x, inverse, out)
    return out


def learn_(
    theta: Tensor,
    moments: meta.Moments | None,
    permutations: Tensor | None,
    g: Tensor,
    m: Tensor,
    lr: Number,
    rates: meta.Rates,
    inverse: Tensor | None,
) -> None:
    """`reference.learn_`; `inverse` is what `invert` made of the permutations."""
    launches = Launches(theta, permutations)
    x = theta.new_empty(launches.slots, 2, launches.dim)
    y = theta.new_empty(2, launches.dim, 2) if launches.is_random else x
    launches.enter(g.contiguous(), m.contiguous(), y, vectors=2)
    launches.up(theta, x, y, permutations, vectors=2, slots=launches.slots)
    numbers = [number if is_tensor(number) else _on(theta.device, number) for number in (*rates, lr)]
    exp_avg, exp_avg_sq = moments or (theta, theta)
    launches.learn((theta, exp_avg, exp_avg_sq), x, y, inverse, numbers, adam=moments is not None)


def _on(device: torch.device, number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64, device=device)
