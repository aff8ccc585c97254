"""Tasks that are drawn, not read: regressions, a factorisation, a differential equation, two test functions."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.shootout.problem import Problem, held_out, rows
from examples.paper.tasks.bowl import NoisyBowl

Batch = tuple[Tensor, Tensor]
BOWL_STEPS = 12_000
HELD_OUT = 2000  # rows to validate with
START_DISTANCE = 30.0  # of the bowl's x from its centre, in every coordinate
DECADES = 4  # of the features' scales
CHAIN = 100  # variables of the Rosenbrock function
TARGET_NOISE = 0.1
TURN = 2e-4  # radians that the drifting task's teacher turns at each step, in every plane


class Vector(nn.Module):
    """A model that is a single vector."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(start)


def logistic(seed: int, root: Path | None) -> Problem:
    """Logistic regression with 100 features of scales from 1e-3 to 10, 10,000 rows; batches of 64, float64.

    The true weights are such that every feature has the same say.
    """
    source = torch.Generator().manual_seed(seed + 17)
    count, size = 10_000, 100
    plain = torch.randn(count, size, generator=source, dtype=torch.float64)
    scales = torch.logspace(1 - DECADES, 1, size, dtype=torch.float64)
    scales = scales[torch.randperm(size, generator=source)]
    say = torch.randn(size, generator=source, dtype=torch.float64) * 3 / math.sqrt(size)
    labels = torch.bernoulli(torch.sigmoid(plain @ say), generator=source)
    features = plain * scales
    others = torch.randn(HELD_OUT, size, generator=source, dtype=torch.float64)
    other_labels = torch.bernoulli(torch.sigmoid(others @ say), generator=source)

    def draw(generator: torch.Generator, step: int) -> Batch:
        picks = rows(generator, count, 64)
        return features[picks], labels[picks]

    def objective(model: Vector, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(batch[0] @ model.x, batch[1])

    def accuracy(model: Vector, batch: Batch) -> Tensor:
        return ((batch[0] @ model.x > 0) == (batch[1] > 0)).double().mean()

    validate = held_out((others * scales, other_labels), objective, accuracy)
    return Problem(Vector(torch.zeros(size, dtype=torch.float64)), draw, objective, seed, validate=validate)


class Factors(nn.Module):
    def __init__(self, height: int, width: int, rank: int) -> None:
        super().__init__()
        self.left = nn.Parameter(0.1 * torch.randn(height, rank))
        self.right = nn.Parameter(0.1 * torch.randn(width, rank))


def factorisation(seed: int, root: Path | None) -> Problem:
    """A 300 x 200 matrix of rank 20 with singular values over two decades, plus noise, as a product of factors of rank
    20; batches of 512 entries."""
    source = torch.Generator().manual_seed(seed + 17)
    height, width, rank = 300, 200, 20
    left = torch.linalg.qr(torch.randn(height, rank, generator=source))[0]
    right = torch.linalg.qr(torch.randn(width, rank, generator=source))[0]
    spectrum = torch.logspace(0, -2, rank)
    matrix = (left * spectrum) @ right.T
    clean = matrix / matrix.std()
    matrix = clean + 0.01 * torch.randn(height, width, generator=source)

    def draw(generator: torch.Generator, step: int) -> tuple[Tensor, Tensor, Tensor]:
        i, j = rows(generator, height, 512), rows(generator, width, 512)
        return i, j, matrix[i, j]

    def objective(model: Factors, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        i, j, wanted = batch
        return F.mse_loss((model.left[i] * model.right[j]).sum(1), wanted)

    def validate(model: Factors, step: int) -> tuple[Tensor, None]:
        """Against the matrix without its noise."""
        return F.mse_loss(model.left @ model.right.T, clean), None

    return Problem(Factors(height, width, rank), draw, objective, seed, validate=validate)


def pinn(seed: int, root: Path | None) -> Problem:
    """A network u, 1-24-24-1, tanh, float64, that is to solve -u'' + u^3 = f on [0, 1] with u(0) = u(1) = 0.

    f is such that u = sin(2 pi x) + sin(6 pi x) / 5. The loss is the mean squared residual at 64 fixed points, over
    f's variance, plus the squared boundary values times 10.
    """
    points = torch.linspace(0, 1, 64, dtype=torch.float64)[:, None]
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    waves = ((2 * math.pi, 1.0), (6 * math.pi, 0.2))
    solution = sum(size * torch.sin(wave * points) for wave, size in waves)
    bend = sum(size * wave**2 * torch.sin(wave * points) for wave, size in waves)
    force = torch.as_tensor(bend + solution**3)
    scale = float(force.var())
    first = nn.Linear(1, 24)
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)).double()
    with torch.no_grad():
        # Bends of the first layer spread over the interval, at the scale of the solution.
        first.weight.mul_(6.0)
        first.bias.copy_(-first.weight[:, 0] * torch.rand(24, dtype=torch.float64))

    def objective(model: nn.Module, batch: Any) -> Tensor:
        x = points.clone().requires_grad_()
        with torch.enable_grad():
            u = model(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        residual = -second + u**3 - force
        return residual.square().mean() / scale + 10 * model(ends).square().sum()

    others = torch.linspace(0, 1, 257, dtype=torch.float64)[:, None]
    other_solution = torch.as_tensor(sum(size * torch.sin(wave * others) for wave, size in waves))

    def validate(model: nn.Module, step: int) -> tuple[Tensor, None]:
        """The squared error of u itself, between the points too, over the solution's mean square."""
        return (model(others) - other_solution).square().mean() / other_solution.square().mean(), None

    return Problem(model, lambda generator, step: None, objective, seed, validate=validate)


def bowl(seed: int, root: Path | None) -> Problem:
    """The paper's noisy bowl: n = 100, float64, condition number 1,000, a centre that walks at random.

    Unlike there x starts far from the centre: else the loss would start lower than any optimizer can keep it. Every
    loss is that at a place of the centre never seen before, so nothing is held out.
    """
    walk = NoisyBowl(seed)
    start = START_DISTANCE * torch.randn(100, dtype=torch.float64)

    def draw(generator: torch.Generator, step: int) -> Tensor:
        walk.draw()
        return walk.center.clone()

    def objective(model: Vector, center: Tensor) -> Tensor:
        offset = model.x - center
        return 0.5 * (offset @ (walk.h @ offset))

    # What standing still comes to in the end, for the centre walks away from it.
    return Problem(Vector(start), draw, objective, seed, (START_DISTANCE**2 + BOWL_STEPS) * walk.floor)


def rosenbrock(seed: int, root: Path | None) -> Problem:
    """The chained Rosenbrock function of 100 variables, float64, divided by 100, under noise of two sorts.

    sum_i a_i 100 (x_{i+1} - x_i^2)^2 + (1 + e_i - x_i)^2 with a_i exponential of mean 1 and e_i normal, fresh at
    each step. The start is (-1.2, 1, -1.2, 1, ...) with a little noise.
    """
    source = torch.Generator().manual_seed(seed + 17)
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64).repeat(CHAIN // 2)
    start = start + 0.1 * torch.randn(CHAIN, generator=source, dtype=torch.float64)

    def draw(generator: torch.Generator, step: int) -> Batch:
        weights = torch.empty(CHAIN - 1, dtype=torch.float64).exponential_(generator=generator)
        return weights, 1 + TARGET_NOISE * torch.randn(CHAIN - 1, generator=generator, dtype=torch.float64)

    def objective(model: Vector, batch: Batch) -> Tensor:
        here, after = model.x[:-1], model.x[1:]
        valley = batch[0] * (after - here.square()).square()
        return (100 * valley + (batch[1] - here).square()).sum() / CHAIN

    def validate(model: Vector, step: int) -> tuple[Tensor, None]:
        """The loss's expectation over its noise."""
        ones = torch.ones(CHAIN - 1, dtype=torch.float64)
        return objective(model, (ones, ones)) + TARGET_NOISE**2 * (CHAIN - 1) / CHAIN, None

    return Problem(Vector(start), draw, objective, seed, validate=validate)


def drift(seed: int, root: Path | None) -> Problem:
    """A 20-64-1 tanh network follows a 20-8-1 teacher whose weights turn steadily; batches of 64.

    The teacher's eight input vectors turn in ten planes by 2e-4 radians a step; inputs have scales from 0.3 to 3.
    """
    source = torch.Generator().manual_seed(seed + 17)
    size, hidden = 20, 8
    first = torch.randn(hidden, size, generator=source) / math.sqrt(size)
    last = torch.randn(hidden, generator=source)
    basis = torch.linalg.qr(torch.randn(size, size, generator=source))[0]
    scales = torch.logspace(-0.5, 0.5, size)
    sign = torch.where(torch.rand(size // 2, generator=source) < 0.5, -1.0, 1.0)

    def turned(step: int) -> Tensor:
        angle = sign * (TURN * step)
        even, odd = (first @ basis).view(hidden, size // 2, 2).unbind(-1)
        moved = torch.stack((even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), -1)
        return moved.view(hidden, size) @ basis.T

    def draw(generator: torch.Generator, step: int, count: int = 64) -> Batch:
        x = torch.randn(count, size, generator=generator)
        return x * scales, torch.tanh(2 * x @ turned(step).T) @ last

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(model(batch[0])[:, 0], batch[1])

    def validate(model: nn.Module, step: int) -> tuple[Tensor, None]:
        """On other inputs, with the teacher where it is now."""
        return objective(model, draw(torch.Generator().manual_seed(seed + 18), step, HELD_OUT)), None

    model = nn.Sequential(nn.Linear(size, 64), nn.Tanh(), nn.Linear(64, 1))
    return Problem(model, draw, objective, seed, validate=validate)
