"""The network on CUDA: launches the Triton kernels of gpu_kernels.py. reference.py is their ground truth.

Triton comes with torch's CUDA builds; where it is missing the reference does the work. Nothing here waits for the
device or reads from it, so that a step can be captured in a CUDA graph.
"""

import functools
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from lodo import inner_optimizer
from lodo.scalars import Number, is_tensor, stacked

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

MAX_BLOCK = 16  # larger blocks would not fit the registers
MAX_NUMBERS = 2**31 - 2**16  # of theta in one layer, or of two vectors: places within them are 32-bit
NUMBERS_PER_THREAD = 16  # of theta in float32, in a tile: what the registers hold
PAIRED = {2: 8, 4: 16}  # the same for two layers at a time, by block size; the vectors of larger blocks cost little
DTYPES = (torch.float32, torch.float64)
SINGLE_PROGRAM = 1 << 13  # numbers of theta per layer up to which one program does all layers
WARPS, WARPS_SINGLE = 4, 8


@functools.cache
def code() -> ModuleType | None:
    """The Triton kernels, or None where Triton is not installed."""
    try:
        from lodo.kernels import gpu_kernels
    except ImportError:
        return None
    return gpu_kernels


@functools.cache
def can_launch() -> bool:
    """Whether this process can compile and launch the kernels: Triton needs a driver and a C compiler."""
    try:
        import triton

        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # whatever Triton misses
        log.warning("LODO runs its plain torch kernels on CUDA, which are slow, as Triton cannot be used: %s", error)
        return False
    return code() is not None


def on_its_device(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Launches go to the device of the first tensor, whichever is the current one."""

    @functools.wraps(function)
    def launched(tensor: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            return function(tensor, *args, **kwargs)

    return launched


def device_code() -> Any:
    """The kernels, for calls that `is_ready` has let through."""
    return code()


def is_ready(tensor: Tensor) -> bool:
    """Whether there are kernels for the device of a tensor. LODO_NATIVE=0 is honoured at every call."""
    return tensor.is_cuda and os.environ.get("LODO_NATIVE") != "0" and can_launch()


def available(theta: Tensor) -> bool:
    """Whether the kernels take this network: CUDA, float32 or float64, blocks that fit a program's registers."""
    if not is_ready(theta) or theta.dtype not in DTYPES:
        return False
    layers, block, _, width = theta.shape
    return 0 < block <= MAX_BLOCK and max(block, 2) * block * width < MAX_NUMBERS and layers > 0


def available_for_vectors(theta: Tensor) -> bool:
    """Whether the kernels take a residual or diagonal preconditioner."""
    return is_ready(theta) and theta.dtype in DTYPES and 2 * theta.shape[-1] < MAX_NUMBERS


def prepare(permutations: Tensor | None, kept: Tensor | None) -> Tensor | None:
    """The inverse of each permutation, int32, so that the way down can gather: scattered stores cost twice as much."""
    if permutations is None or kept is not None:
        return kept
    inverse = torch.empty_like(permutations)
    places = torch.arange(permutations.shape[1], dtype=torch.int32, device=permutations.device)
    for row, permutation in zip(inverse, permutations, strict=True):
        row[permutation] = places
    return inverse


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class Launches:
    """How the kernels are launched for a network.

    A program's tile is so many blocks that their numbers fill its registers. All tiles of a layer, or of a pair of
    layers, are one launch; or one program does the whole network in one.
    """

    def __init__(self, theta: Tensor, permutations: Tensor | None) -> None:
        self.code = device_code()
        self.layers, self.block, _, self.width = theta.shape
        self.dim = self.block * self.width
        self.is_random = permutations is not None
        self.is_single = self.block * self.dim <= SINGLE_PROGRAM
        warps = WARPS_SINGLE if self.is_single else WARPS
        threads = 32 * warps * torch.float32.itemsize // theta.itemsize  # as far as registers go
        side = 1 << (self.block - 1).bit_length()
        self.tile = max(1, threads * NUMBERS_PER_THREAD // side**2)
        self.tiles = ceil_div(self.width, self.tile)
        self.pairs = 0 if self.is_random or self.block not in PAIRED else self.layers // 2
        self.pair_tile = max(1, threads * PAIRED.get(self.block, 0) // self.block**3)
        self.constants = {"K": self.block, "num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
        self.single_constants = {**self.constants, "KP": side, "B": self.tile, "RANDOM": self.is_random}

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
        kernel, constants = self.code.enter, self.single_constants
        kernel[(self.tiles,)](g, m, target, self.width, g.numel(), V=vectors, **constants)

    def leave(self, source: Tensor, inverse: Tensor | None, out: Tensor) -> None:
        kernel, constants = self.code.leave, self.single_constants
        kernel[(self.tiles,)](source, inverse, out, self.width, out.numel(), **constants)

    def up(
        self, theta: Tensor, x: Tensor, y: Tensor, indices: Tensor | None, numbers: Tensor | None, vectors: int
    ) -> None:
        """U, from the lowest slot of x up, or from pair buffer 0 of y on. With `numbers`, every slot is kept."""
        slots = 2 if numbers is None else self.slots
        tiles = ceil_div(ceil_div(self.width, self.block), self.pair_tile)  # of each of the K stretches
        for grid, *stages in self.stages(range(self.pairs), tiles):
            sizes = (self.width, *stages, slots, tiles)
            self.code.up_pairs[grid](theta, x, numbers, *sizes, T=self.pair_tile, V=vectors, **self.constants)
        for grid, *stages in self.stages(self.singles, self.tiles):
            sizes = (self.width, *stages, slots, self.pairs, self.tiles)
            self.code.up_layers[grid](theta, x, y, indices, numbers, *sizes, V=vectors, **self.single_constants)

    def down(self, theta: Tensor, x: Tensor, inverse: Tensor | None) -> None:
        """U^T, from where `up` arrived."""
        for grid, *stages in self.stages(self.singles[::-1], self.tiles):
            sizes = (self.width, *stages, self.layers, self.pairs, self.tiles)
            self.code.down_layers[grid](theta, x, x, inverse, *sizes, **self.single_constants)
        tiles = ceil_div(self.width, self.pair_tile * self.block)
        for grid, *stages in self.stages(range(self.pairs)[::-1], tiles):
            self.code.down_pairs[grid](theta, x, self.width, *stages, tiles, T=self.pair_tile, **self.constants)

    def learn(
        self,
        learned: tuple[Tensor, ...],
        x: Tensor,
        y: Tensor,
        inverse: Tensor | None,
        numbers: Tensor,
        adam: bool,
    ) -> None:
        """The backward pass with the inner update, from where `up` arrived; `learned` is theta, M and V."""
        more = {"EPS": inner_optimizer.EPS, "ADAM": adam}
        for grid, *stages in self.stages(self.singles[::-1], self.tiles):
            sizes = (self.width, *stages, self.layers, self.pairs, self.tiles)
            self.code.learn_layers[grid](*learned, x, y, inverse, numbers, *sizes, **self.single_constants, **more)
        is_narrow = learned[1].dtype == torch.bfloat16  # rounding takes registers
        pair_tile = max(1, self.pair_tile // 2) if is_narrow else self.pair_tile
        tiles = ceil_div(self.width, pair_tile * self.block)
        top = 0 if self.singles else self.pairs
        for grid, *stages in self.stages(range(self.pairs)[::-1], tiles):
            sizes = (self.width, *stages, top, tiles)
            self.code.learn_pairs[grid](*learned, x, numbers, *sizes, T=pair_tile, **self.constants, **more)


@on_its_device
def matvec(theta: Tensor, permutations: Tensor | None, v: Tensor, inverse: Tensor | None) -> Tensor:
    """`reference.matvec`; `inverse` is what `prepare` gave."""
    launches = Launches(theta, permutations)
    x, v = theta.new_empty(2, launches.dim), v.contiguous()
    out = torch.empty_like(v)
    launches.enter(v, v, x, vectors=1)
    launches.up(theta, x, x, permutations, None, vectors=1)
    launches.down(theta, x, inverse)
    launches.leave(x, inverse, out)
    return out


@on_its_device
def learn_(
    theta: Tensor,
    moments: inner_optimizer.Moments | None,
    permutations: Tensor | None,
    g: Tensor,
    m: Tensor,
    lr: Number,
    rates: inner_optimizer.Rates,
    inverse: Tensor | None,
) -> None:
    """`reference.learn_`; `inverse` is what `prepare` gave."""
    launches = Launches(theta, permutations)
    x = theta.new_empty(launches.slots, 2, launches.dim)
    y = theta.new_empty(2, launches.dim, 2) if launches.is_random else x
    numbers = on_device(rates, lr, theta.device)
    launches.enter(g.contiguous(), m.contiguous(), y, vectors=2)
    launches.up(theta, x, y, permutations, numbers, vectors=2)
    launches.learn(learned(theta, moments), x, y, inverse, numbers, adam=moments is not None)


def learned(theta: Tensor, moments: inner_optimizer.Moments | None) -> tuple[Tensor, ...]:
    """Theta, M and V as a kernel takes them; without moments it does not look at the last two."""
    return (theta, *(moments or (theta, theta)))


def on_device(rates: inner_optimizer.Rates, lr: Number, device: torch.device) -> Tensor:
    """The numbers of an inner step in one tensor. Plain ones are sent, but an optimizer's are on the device already."""
    if is_tensor(rates.step_size):
        return stacked((*rates, lr))
    return torch.tensor((*rates, lr), dtype=torch.float64, device=device)


# ---- the preconditioners of the ablations ---------------------------------------------------------------------------

VECTOR_TILE = 1024


def along(size: int) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and constants of a kernel that walks along a vector."""
    constants = {"B": VECTOR_TILE, "num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": True}
    return (ceil_div(size, VECTOR_TILE),), constants


@on_its_device
def diagonal_learn_(
    theta: Tensor,
    moments: inner_optimizer.Moments | None,
    g: Tensor,
    m: Tensor,
    lr: Number,
    rates: inner_optimizer.Rates,
) -> None:
    """`reference.diagonal_learn_` in one pass."""
    grid, constants = along(theta.numel())
    tensors = (*learned(theta, moments), g, m, on_device(rates, lr, theta.device))
    device_code().learn_diagonal[grid](
        *tensors, theta.numel(), EPS=inner_optimizer.EPS, ADAM=moments is not None, **constants
    )


@on_its_device
def residual_matvec(theta: Tensor, indices: Tensor, v: Tensor) -> Tensor:
    """`reference.residual_matvec`, a launch for every layer on either way."""
    code, size = device_code(), theta.shape[1]
    grid, constants = along(size)
    x, y = v.new_zeros(2, size)
    x[: v.numel()] = v
    for weight, index in zip(theta[:-1], indices, strict=True):
        code.up_residual[grid](weight, index, x, y, None, size, V=1, **constants)
        x, y = y, x
    x.mul_(theta[-1])
    for layer in reversed(range(len(indices))):
        code.down_residual[grid](theta[layer], indices[layer], x, y, size, **constants)
        x, y = y, x
    return x[: v.numel()].clone()


@on_its_device
def residual_learn_(
    theta: Tensor,
    moments: inner_optimizer.Moments | None,
    indices: Tensor,
    g: Tensor,
    m: Tensor,
    lr: Number,
    rates: inner_optimizer.Rates,
) -> None:
    """`reference.residual_learn_`, in the same stretches; the two vectors lie side by side."""
    code, (layers, size) = device_code(), indices.shape
    grid, constants = along(size)
    numbers = on_device(rates, lr, theta.device)
    more = {"EPS": inner_optimizer.EPS, "ADAM": moments is not None, **constants}
    stretch = max(1, math.isqrt(layers))
    pair = theta.new_zeros(size, 2)
    pair[: g.numel()] = torch.stack((g, m), dim=1)
    inputs = [pair]  # of the layers 0, stretch, 2 stretch, ..., and the output

    def up(x: Tensor, layer: int) -> Tensor:
        out = torch.empty_like(x)
        code.up_residual[grid](theta[layer], indices[layer], x, out, numbers, size, V=2, **constants)
        return out

    for begin in range(0, layers, stretch):
        for layer in range(begin, min(begin + stretch, layers)):
            pair = up(pair, layer)
        inputs.append(pair)
    back, spare = torch.empty_like(pair), torch.empty_like(pair)
    tensors = learned(theta, moments)
    code.turn_residual[grid](*tensors, inputs.pop(), back, numbers, size, layers * size, **more)
    for begin in reversed(range(0, layers, stretch)):
        within = [inputs.pop()]
        for layer in range(begin, min(begin + stretch, layers) - 1):
            within.append(up(within[-1], layer))
        for layer in reversed(range(begin, begin + len(within))):
            x = within.pop()
            code.learn_residual[grid](*tensors, indices[layer], x, back, spare, numbers, size, layer * size, **more)
            back, spare = spare, back


# ---- what is kept in bfloat16 ---------------------------------------------------------------------------------------


@on_its_device
def round_into_(target: Tensor, values: Tensor, count: Number) -> None:
    """`reference.round_into_` in one pass."""
    grid, constants = along(values.numel())
    if not is_tensor(count):
        count = torch.tensor(count, device=values.device)
    device_code().round_vector[grid](target, values, count, values.numel(), **constants)
