"""What is compared at a step: LODO's networks and the peers, each in one setting, on the same parameters."""

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim import Optimizer

import lodo
from benchmarks import report
from lodo import inner_optimizer
from lodo.kernels import reference

MAX_N = 10_000_000  # on a CPU
FLOAT32, FLOAT64 = torch.float32, torch.float64


@dataclass(frozen=True)
class Config:
    """An optimizer in one setting.

    Attributes:
        numbers: estimate of all it needs per parameter, in numbers of the parameter's dtype, to judge what fits.
        cycle: steps after which its cost repeats.
        max_n: largest size at which it runs.
        around: entered around its steps.
        passes: of its copy limit, over arrays of theta's size and dtype; see `step_time`.
        graph: whether its step can be captured in a CUDA graph.
    """

    name: str
    make: Callable[[list[Tensor]], Optimizer]
    numbers: float
    cycle: int = 1
    max_n: float = MAX_N
    matrices_only: bool = False
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    passes: int = 9
    graph: bool = False
    note: str = ""

    def parameters(self, n: int, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Fixed parameters and gradients: of a small MLP in float32, of one vector, as in the paper, in float64."""
        shapes = shapes_of(n) if dtype == FLOAT32 else [(n,)]
        generator = torch.Generator(device).manual_seed(0)
        params = []
        for shape in shapes:
            if len(shape) == 2 or not self.matrices_only:
                draw = functools.partial(torch.randn, shape, dtype=dtype, device=device, generator=generator)
                p = draw().mul_(0.02).requires_grad_()
                p.grad = draw().mul_(0.01)
                params.append(p)
        return params


def shapes_of(n: int) -> list[tuple[int, ...]]:
    """Exactly n parameters: a classifier of MNIST's 784 pixels at the paper's size, else three nearly square linear
    layers with biases; and a vector for the remainder."""
    if n == report.PAPER_SIZE:
        return [(112, 784), (112,), (56, 112), (56,), (10, 56), (10,), (182,)]
    width = max(1, math.isqrt(n // 3))
    last = (n - 2 * width * (width + 1)) // (width + 1)
    rest = n - 2 * width * (width + 1) - last * (width + 1)
    shapes: list[tuple[int, ...]] = [(width, width), (width,), (width, width), (width,), (last, width), (last,)]
    return shapes + [(rest,)] * (rest > 0)


# ---- LODO -----------------------------------------------------------------------------------------------------------


def lodo_config(
    name: str, depth: int, expansion: int, permutation: str, moments: str | None = None, **more: Any
) -> Config:
    """LODO with its learning rates so small that fixed gradients lead nowhere in any number of steps."""
    options: dict[str, Any] = {"depth": depth, "expansion": expansion, "permutation": permutation}
    options |= {"meta_state_dtype": moments, "capturable": more.get("graph", False)}
    make = functools.partial(lodo.LODO, lr=1e-4, meta_lr=1e-6, **options)
    theta, padded = 4 * depth * expansion, expansion
    arrays, passes = (3, 9) if moments is None else (2, 7)  # bfloat16 moments are half as long, in memory and in time
    numbers = arrays * theta + 2 * padded * (depth + 2) + padded * depth * (permutation == "random") + 6
    if more.get("around") is drawn_on_device and permutation == "random":
        numbers += padded * depth  # the kernels for CUDA keep the inverse permutations too
    if more.get("around") in (plain_torch, plain_on_device, compiled):
        numbers += 64  # plain torch needs more
    return Config(name, make, numbers, passes=passes, **more)


def plain_torch() -> AbstractContextManager[Any]:
    return mock.patch.dict(os.environ, LODO_NATIVE="0")


@functools.cache
def compiled_functions() -> dict[str, Any]:
    names = ("learn_", "matvec")
    made = {name: torch.compile(getattr(reference, name), dynamic=False, fullgraph=True) for name in names}

    def learn_(
        theta: Tensor,
        moments: Any,
        indices: Any,
        g: Tensor,
        m: Tensor,
        lr: Any,
        rates: inner_optimizer.Rates,
        kept: Any = None,
    ) -> None:
        # As tensors: a number that changes at every step would be compiled in at every step.
        lr, *numbers = (torch.as_tensor(number, dtype=theta.dtype) for number in (lr, *rates))
        made["learn_"](theta, moments, indices, g, m, lr, inner_optimizer.Rates(*numbers))

    return made | {"learn_": learn_}


@contextmanager
def compiled() -> Iterator[None]:
    with plain_torch(), mock.patch.multiple(reference, **compiled_functions()):
        yield


def drawn_on_device() -> AbstractContextManager[Any]:
    """Networks start from blocks drawn where they will be used.

    LODO draws on the CPU, a microsecond per block, so that a seed gives the same network everywhere: minutes for
    hundreds of millions of parameters. Nothing measured here depends on which orthogonal blocks a network starts from.
    """
    return mock.patch.object(lodo.BlockPermutation, "start", classmethod(_start_on_device))


@contextmanager
def plain_on_device() -> Iterator[None]:
    with plain_torch(), drawn_on_device():
        yield


def _start_on_device(
    cls: type[lodo.BlockPermutation], size: int, options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> lodo.BlockPermutation:
    """In place of `BlockPermutation.start`: every block is a random reflection, I - 2 v v^T / |v|^2."""
    generator = torch.Generator(device).manual_seed(options["seed"])
    theta = torch.empty(cls.theta_shape(size, options), dtype=dtype, device=device)
    _, block, _, width = theta.shape
    for layer in theta:
        v = torch.randn(block, width, dtype=dtype, device=device, generator=generator)
        v.div_(v.norm(dim=0))
        for i, row in enumerate(layer):
            torch.mul(v, v[i].mul(-2), out=row)
            row[i].add_(1)
    indices = cls.permutations_shape(size, options)
    if indices is None:
        return cls.wrap(theta, None, size)
    permutations = torch.empty(indices, dtype=torch.int32, device=device)
    for row in permutations:
        row.copy_(torch.randperm(indices[1], device=device, generator=generator))
    return cls.wrap(theta, permutations, size)


# ---- the optimizers -------------------------------------------------------------------------------------------------


def soap(params: list[Tensor], lr: float = 1e-4) -> Optimizer:
    from pytorch_optimizer import SOAP

    optimizer: Optimizer = SOAP(params, lr=lr, precondition_frequency=10)
    return optimizer


def shampoo(params: list[Tensor]) -> Optimizer:
    from pytorch_optimizer import ScalableShampoo

    # Without shape_interpretation, which would merge the dimensions of small matrices and leave them to plain SGD.
    optimizer: Optimizer = ScalableShampoo(
        params, lr=1e-4, preconditioning_compute_steps=10, shape_interpretation=False
    )
    return optimizer


def configs(compile_too: bool, device: str, every_network: bool) -> list[Config]:
    """What runs on a device; `every_network` as on an accelerator, whatever the device."""
    if every_network:
        return [*networks(), *peers(math.inf)]
    full = [
        lodo_config(report.FULL_SHUFFLE, 16, 2, "shuffle"),
        lodo_config(report.FULL_RANDOM, 16, 2, "random"),
        lodo_config(report.LEAN, 4, 1, "shuffle", note="depth 4, expansion 1, shuffle"),
    ]
    if device == "cpu":
        full.append(lodo_config(report.PLAIN, 16, 2, "random", around=plain_torch, max_n=1_000_000))
    if compile_too:
        more: dict[str, Any] = {"around": compiled, "max_n": report.PAPER_SIZE}
        full.append(lodo_config(report.COMPILED_SHUFFLE, 16, 2, "shuffle", **more))
        full.append(lodo_config(report.COMPILED_RANDOM, 16, 2, "random", **more))
    last = Config(report.SHAMPOO, shampoo, 20, cycle=10, note="ScalableShampoo, preconditioning_compute_steps 10")
    return [*full, *peers(MAX_N), last]


def peers(max_n: float) -> list[Config]:
    adamw = functools.partial(torch.optim.AdamW, lr=1e-4, fused=True)
    if max_n == math.inf:
        adamw = functools.partial(adamw, capturable=True)
    return [
        Config(report.ADAMW, adamw, 6, max_n=max_n, graph=max_n == math.inf),
        Config(report.MUON, functools.partial(torch.optim.Muon, lr=1e-4), 8, max_n=max_n, matrices_only=True),
        Config(report.SOAP, soap, 20, cycle=10, max_n=max_n, note="precondition_frequency 10"),
    ]


def networks() -> list[Config]:
    """Full and lean, with either permutation and either kind of moments; and one without kernels."""
    shapes = {report.FULL: (16, 2), report.LEAN: (4, 1)}
    made = []
    for size, permutation, moments in itertools.product(shapes, ("shuffle", "random"), (None, "bfloat16")):
        name = report.network_name(size, permutation, moments)
        more: dict[str, Any] = {"around": drawn_on_device, "max_n": math.inf, "graph": True}
        made.append(lodo_config(name, *shapes[size], permutation, moments, **more))
    plain = lodo_config(report.PLAIN, 16, 2, "random", around=plain_on_device, max_n=1_000_000, graph=True)
    return [*made, plain]


def chosen(config: Config, n: int, dtype: torch.dtype) -> bool:
    """Whether a configuration is asked about at a size: torch.compile at two only, the peers in float32."""
    if config.around is compiled:
        return (n, dtype) in ((report.PAPER_SIZE, FLOAT32), (100, FLOAT64))
    return dtype == FLOAT32 or config.name not in (report.MUON, report.SOAP, report.SHAMPOO)
