"""Every optimizer of the paper's comparisons by name: how to build it for a task, and what of it is tuned."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch.optim import Optimizer

import lodo
from examples.paper.baselines.levenberg_marquardt import LevenbergMarquardt
from examples.paper.baselines.quasi_newton import BFGS, OnlineLBFGS
from examples.paper.tasks import Task
from lodo.preconditioners import Preconditioner

Build = Callable[..., Optimizer]


@dataclass(frozen=True)
class Hyperparameter:
    """A number that the search tunes, in its normalised space: log x for a rate, log(1 - x) for a decay.

    Attributes:
        default: where the search starts.
        kind: "rate" for a number above 0, "decay" for one in [0, 1): a momentum, a beta.
    """

    default: float
    kind: Literal["rate", "decay"] = "rate"

    def normalise(self, value: float) -> float:
        return math.log(value) if self.kind == "rate" else math.log(1 - value)

    def denormalise(self, position: float) -> float:
        """The value at `position`; positions above 0 of a decay mean 0, and none means 1."""
        return math.exp(position) if self.kind == "rate" else min(max(0.0, 1 - math.exp(position)), 1 - 2.0**-53)


@dataclass(frozen=True)
class OptimizerEntry:
    """How to make an optimizer for a task.

    Attributes:
        build: called with the task and the hyperparameters by name.
        space: what the search tunes, by name.
        feed: what `step` wants: "gradients" in place; "closure", which evaluates loss and gradients of the present
            sample; or "loss", a function that returns the differentiable loss of the present sample.
    """

    build: Build
    space: Mapping[str, Hyperparameter] = field(default_factory=dict)
    feed: Literal["gradients", "closure", "loss"] = "gradients"


def _torch(kind: Callable[..., Optimizer], **fixed: Any) -> Build:
    return lambda task, **options: kind(task.params, **fixed, **options)


def _adam(task: Task, lr: float, beta1: float, beta2: float, **fixed: Any) -> Optimizer:
    return torch.optim.Adam(task.params, lr=lr, betas=(beta1, beta2), fused=True, **fixed)


def _yogi(task: Task, lr: float, beta1: float, beta2: float) -> Optimizer:
    from pytorch_optimizer import Yogi  # a large package, only where it is used

    return Yogi(task.params, lr=lr, betas=(beta1, beta2))


def _lars(task: Task, **options: Any) -> Optimizer:
    from pytorch_optimizer import LARS

    return LARS(task.params, **options)


def _transplanted(task: Task, pretrain_steps: int, seed: int, **options: Any) -> Optimizer:
    """A LODO whose G was learned in `pretrain_steps` on the same objective with other noise, and is now frozen.

    Learning starts from the task's own start, which stays as it is, for the steps are made on another task.
    """
    teacher_task = task.sibling(seed + 1)
    teacher = lodo.LODO(teacher_task.params, seed=seed, **options)
    for _ in range(pretrain_steps):
        teacher_task.draw()
        teacher_task.backward()
        teacher.step()
    if pretrain_steps == 0:
        return lodo.LODO(task.params, seed=seed, **options | {"meta_lr": 0.0})
    learned = teacher.preconditioners[0]
    assert isinstance(learned, Preconditioner)
    kept = {name: options[name] for name in ("lr", "beta") if name in options}
    return lodo.LODO(task.params, preconditioner=learned, meta_lr=0.0, **kept)


def _learned(task: Task, seed: int, **options: Any) -> Optimizer:
    from examples.paper.baselines.learned_lstm import LearnedOptimizer, trained_rule

    first = 1_000_000 + 1000 * seed  # walks that no run is scored on
    return LearnedOptimizer(task.params, trained_rule(lambda number: task.sibling(first + number), seed, **options))


_RATE = {"lr": Hyperparameter(1.0), "meta_lr": Hyperparameter(1e-3)}
_LODO = _RATE | {"beta": Hyperparameter(0.9, "decay")}
_ADAM = {
    "lr": Hyperparameter(1e-3),
    "beta1": Hyperparameter(0.9, "decay"),
    "beta2": Hyperparameter(0.999, "decay"),
}
_LBFGS = {"lr": Hyperparameter(1e-3), "tau": Hyperparameter(1e4), "epsilon": Hyperparameter(1e-10)}

# The starting points of the searches are those of the authors' code.
OPTIMIZERS: Mapping[str, OptimizerEntry] = {
    "SGD": OptimizerEntry(
        _torch(torch.optim.SGD, fused=True), {"lr": Hyperparameter(1e-2), "momentum": Hyperparameter(0.0, "decay")}
    ),
    "RMSprop": OptimizerEntry(
        _torch(torch.optim.RMSprop),
        {
            "lr": Hyperparameter(1e-3),
            "alpha": Hyperparameter(0.9, "decay"),
            "momentum": Hyperparameter(0.0, "decay"),
        },
    ),
    "Adam": OptimizerEntry(_adam, _ADAM),
    "Yogi": OptimizerEntry(_yogi, _ADAM),
    "LARS": OptimizerEntry(
        _lars,
        {
            "lr": Hyperparameter(1e-3),
            "momentum": Hyperparameter(0.9, "decay"),
            "weight_decay": Hyperparameter(5e-4),
        },
    ),
    "L-BFGS": OptimizerEntry(_torch(OnlineLBFGS, scaling="last"), _LBFGS, "closure"),
    "O-LBFGS": OptimizerEntry(_torch(OnlineLBFGS, scaling="average"), _LBFGS, "closure"),
    "BFGS": OptimizerEntry(_torch(BFGS), {"lr": Hyperparameter(1e-2), "initial_scale": Hyperparameter(1.0)}),
    "Levenberg-Marquardt": OptimizerEntry(_torch(LevenbergMarquardt), {"damping": Hyperparameter(1.0)}, "loss"),
    "L2L": OptimizerEntry(_learned),
    "LODO": OptimizerEntry(_torch(lodo.LODO), _LODO),
    "LODO-Diagonal": OptimizerEntry(_torch(lodo.LODO, preconditioner="diagonal"), _LODO),
    "LODO-Global": OptimizerEntry(_torch(lodo.LODO, preconditioner="scalar"), _LODO),
    "LODO-Residuals": OptimizerEntry(_torch(lodo.LODO, preconditioner="residual"), _LODO),
    "LODO-No-Momentum": OptimizerEntry(_torch(lodo.LODO, beta=0.0), _RATE),
    "LODO-SGD": OptimizerEntry(_torch(lodo.LODO, meta_optimizer="sgd"), _LODO),
    "LODO-Transplanted": OptimizerEntry(_transplanted, _LODO),
}
SEEDED = frozenset(name for name in OPTIMIZERS if name.startswith("LODO") or name == "L2L")
"""The optimizers that draw random numbers of their own and so take a `seed`."""


def entry(name: str) -> OptimizerEntry:
    """Looks an optimizer up.

    Raises:
        ValueError: no optimizer has that name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    return OPTIMIZERS[name]


def defaults(name: str) -> dict[str, float]:
    """The hyperparameters at which the search for `name` starts."""
    return {key: hyperparameter.default for key, hyperparameter in entry(name).space.items()}


def make_optimizer(name: str, task: Task, hyperparameters: Mapping[str, Any], seed: int) -> Optimizer:
    """The optimizer `name` over `task.params`."""
    options = dict(hyperparameters) | ({"seed": seed} if name in SEEDED else {})
    return entry(name).build(task, **options)


def make_step(name: str, task: Task, optimizer: Optimizer) -> Callable[[], float]:
    """One step on the task's present sample, which returns the loss before it."""
    feed = entry(name).feed
    if feed == "closure":
        return partial(_step, optimizer, task.backward)
    if feed == "loss":
        return partial(_solve, optimizer, lambda: task.loss(task.params))

    def step() -> float:
        loss = task.backward()
        optimizer.step()
        return loss

    return step


def _solve(optimizer: Optimizer, function: Callable[[], Any]) -> float:
    try:
        return _step(optimizer, function)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # a step that does not exist: the run has diverged
        return math.nan


def _step(optimizer: Optimizer, function: Callable[[], Any]) -> float:
    return float(optimizer.step(function))
