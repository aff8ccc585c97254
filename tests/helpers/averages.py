"""Walks of an optimizer that averages its iterates, and what the averages must be."""

import pytest
import torch
from torch import nn

import lodo

CALLS = {
    "auto": lodo.RECOMMENDED,
    "with decay and a bound": {**lodo.RECOMMENDED, "weight_decay": 0.1, "max_step_norm": 0.1},
    "the paper's": {"lr": 0.1, "depth": 2},
    "diagonal": {"lr": 0.1, "preconditioner": "diagonal"},
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
SHARE = 0.25


def made(call, dtype=torch.float32, **options):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((5, 3), (4,), ())]
    return params, lodo.LODO(params, **call, **{"average_share": SHARE, **options})


def one_step(params, optimizer, number, missing=()):
    generator = torch.Generator().manual_seed(number)
    for place, p in enumerate(params):
        noise = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = None if place in missing else p.detach() + noise
    optimizer.step()


def copies(params):
    return [p.detach().clone() for p in params]


def walk(params, optimizer, steps):
    """The iterates of some steps, the one before the first among them."""
    iterates = [copies(params)]
    for number in range(steps):
        one_step(params, optimizer, number)
        iterates.append(copies(params))
    return iterates


def assert_at_means(params, optimizer, iterates):
    """Inside `averaged`, of iterates that all parameters have had."""
    with optimizer.averaged():
        for place, p in enumerate(params):
            torch.testing.assert_close(p.double(), mean([each[place] for each in iterates]), rtol=1e-6, atol=1e-6)


def mean(iterates):
    """Weighted by s (s + 1) (s + 2) at place s = 1, 2, ..., for a share of a quarter."""
    weights = torch.tensor([s * (s + 1) * (s + 2) for s in range(1, len(iterates) + 1)], dtype=torch.float64)
    stack = torch.stack([x.double() for x in iterates])
    return torch.tensordot(weights / weights.sum(), stack, dims=1)
