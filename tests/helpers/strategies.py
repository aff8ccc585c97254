"""What the property tests draw, and the profiles they run under.

HYPOTHESIS_PROFILE=thorough runs many more examples, other ones each time; --hypothesis-seed=N fixes them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

import lodo
from lodo.kernels import native
from lodo.preconditioners import BY_NAME, Preconditioner
from tests.helpers.oracle import KINDS

# "quick" draws the same examples every time, on every machine.
settings.register_profile(
    "quick", derandomize=True, deadline=None, print_blob=True, max_examples=50, stateful_step_count=25
)
settings.register_profile(
    "thorough", settings.get_profile("quick"), derandomize=False, max_examples=1000, stateful_step_count=50
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
many = settings(max_examples=4 * settings().max_examples)  # for tests that cost little

LARGEST = 60
KERNELS = ("native", "reference")[native.library() is None :]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = ("plain", "transposed", "strided")
SHAPES = ((), (1,), (0,), (7,), (19,), (0, 3), (3, 5), (4, 1), (2, 3, 2))  # three of these have at most LARGEST numbers

sizes = st.integers(1, LARGEST)
seeds = st.integers(0, 999)
shapes = st.sampled_from(SHAPES)
dtypes = st.sampled_from(DTYPES)
kernels = st.sampled_from(KERNELS)
layouts = st.sampled_from(LAYOUTS)
wide_dtypes = st.sampled_from((torch.float32, torch.float64))


def architectures(kinds: tuple[str, ...] = (*KINDS, "identity")) -> st.SearchStrategy[dict[str, Any]]:
    """The options that describe a network, block sizes beyond the number of parameters and no layers included."""
    return st.fixed_dictionaries(
        {
            "preconditioner": st.sampled_from(kinds),
            "depth": st.none() | st.integers(0, 5),
            "block_size": st.integers(1, 9) | st.just(LARGEST + 4),
            "expansion": st.sampled_from((1, 1.0, 2)) | st.floats(1, 3),
            "permutation": st.sampled_from(("random", "shuffle")),
            "seed": st.integers(0, 9) | st.just(2**63 - 1),
        }
    )


@contextmanager
def running(kernel: str) -> Iterator[None]:
    """Runs the compiled CPU kernels or plain torch."""
    with pytest.MonkeyPatch.context() as patch:
        if kernel == "reference":
            patch.setenv("LODO_NATIVE", "0")
        yield


# Options that may change during training.
RATES: dict[str, st.SearchStrategy[Any]] = {
    "meta_lr": st.sampled_from((0.0, 1e-3, 0.05)),
    "beta": st.sampled_from((0.0, 0.5, 0.9)),
    "weight_decay": st.sampled_from((0.0, 0.1)),
    "meta_optimizer": st.sampled_from(("adam", "sgd")),
    "trace_decay": st.sampled_from((0.0, 0.5, 0.9)),
    "scale_lr": st.sampled_from((0.0, 0.01)),
    "scale_trace_decay": st.sampled_from((0.0, 0.9)),
    "mix_lr": st.sampled_from((0.0, 0.01, 0.3)),
    "average_share": st.sampled_from((None, 0.1, 1, 1e-4)),
    "meta_every": st.sampled_from((1, 2, 3)),
    "meta_state_dtype": st.sampled_from((None, "bfloat16")),
    "momentum_dtype": st.sampled_from((None, "bfloat16")),
    "max_step_norm": st.sampled_from((None, 0.0, 0.01, 1.0)),
    "max_condition": st.sampled_from((None, 1, 1.5, 100.0)),
    "maximize": st.booleans(),
}


DECAYS = (None, None, (0.9,), (0.0, 0.99), (0.5, 0.0, 0.9, 0.999))


def rates() -> st.SearchStrategy[dict[str, Any]]:
    """The options of a param group that have nothing to do with the shape of its network, but for lr."""
    return st.fixed_dictionaries({}, optional=RATES)


def parts(bases: tuple[str | None, ...] = (None, None, "adam", "soap")) -> st.SearchStrategy[dict[str, Any]]:
    """The options that ask for parts that a group with state must keep."""
    return st.fixed_dictionaries({"base": st.sampled_from(bases), "momentum_decays": st.sampled_from(DECAYS)})


def options(bases: tuple[str | None, ...] = (None, None, "adam", "soap")) -> st.SearchStrategy[dict[str, Any]]:
    """All the options of a param group but for lr."""
    every = (architectures(), parts(bases), rates())
    return st.builds(lambda *drawn: possible({**drawn[0], **drawn[1], **drawn[2]}), *every)


def possible(options: dict[str, Any]) -> dict[str, Any]:
    """Without the one that "residual" refuses."""
    is_refused = options["preconditioner"] == "residual"
    return {name: value for name, value in options.items() if not (is_refused and name == "max_condition")}


def learning_rates() -> st.SearchStrategy[Any]:
    """Numbers and one-element tensors, all of which float32 holds exactly."""
    plain = st.sampled_from((0.0, 0.125, 0.5, 1, 2.0))
    kinds = st.sampled_from((torch.float32, torch.float64, torch.bfloat16))
    ones = st.builds(lambda dtype, shape: torch.ones(shape, dtype=dtype), kinds, st.sampled_from(((), (1,))))
    return plain | st.builds(lambda one, value: one * value, ones, plain)


def numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    """Normal random numbers, the same for every dtype but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """A tensor of the same numbers in memory of its own, contiguous or not."""
    if layout == "strided":
        return tensor.new_empty((*tensor.shape, 2))[..., 0].copy_(tensor)
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.mT.clone(memory_format=torch.contiguous_format).mT
    return tensor.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Plan:
    """A parameter that is to be made."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    seed: int

    def make(self) -> torch.nn.Parameter:
        return torch.nn.Parameter(laid_out(numbers(self.shape, self.seed, self.dtype), self.layout))


plans = st.builds(Plan, shapes, dtypes, layouts, seeds)


def network(kind: str, size: int, options: dict[str, Any], seed: int, dtype: torch.dtype) -> Preconditioner:
    """A preconditioner from a user's tensors, with a theta that no training has made."""
    shape = BY_NAME[kind].theta_shape(size, {**options, "preconditioner": kind})
    theta = numbers(shape, seed, dtype)
    generator = torch.Generator().manual_seed(seed)

    def permutations(layers: int, padded: int) -> Tensor:
        rows = [torch.randperm(padded, generator=generator) for _ in range(layers)]
        return torch.stack(rows) if rows else torch.empty(0, padded, dtype=torch.int64)

    if kind == "block_permutation":
        layers, block, _, width = shape
        blocks = theta.permute(0, 3, 1, 2) / block**0.5
        indices = permutations(layers, block * width)
        if options["permutation"] == "shuffle":
            indices = torch.arange(block * width).view(width, block).T.reshape(-1).repeat(layers, 1)
        return lodo.BlockPermutation(blocks, indices, size)
    if kind == "residual":
        theta[:-1] /= max(1, len(theta) - 1) ** 0.5
        return lodo.Residual(theta, permutations(len(theta) - 1, shape[1]), size)
    if kind in ("scalar", "identity"):
        return lodo.Scalar(theta, size) if kind == "scalar" else lodo.Identity(size, dtype)
    return lodo.Diagonal(theta) if kind == "diagonal" else lodo.LogDiagonal(theta)


@st.composite
def networks(draw: st.DrawFn, dtype: torch.dtype | None = None) -> Preconditioner:
    """Preconditioners of all shapes, more of those that have compiled kernels."""
    options = draw(architectures(("block_permutation", "block_permutation", *KINDS)))
    dtype = draw(wide_dtypes) if dtype is None else dtype
    return network(options["preconditioner"], draw(sizes), options, draw(seeds), dtype)
