"""What the paper runs: for each experiment its task, optimizers, search schedule, training runs and sweeps."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FIRST_ORDER = ("SGD", "RMSprop", "Adam", "LARS", "Yogi")
"""The baselines that see gradients only and keep state of the parameters' size."""


@dataclass(frozen=True)
class Generation:
    """One generation of the search: its standard deviation in the normalised space, and the steps of each run."""

    std: float
    steps: int


def _schedule(stds: Sequence[float], steps: Sequence[int]) -> tuple[Generation, ...]:
    return tuple(Generation(std, count) for std, count in zip(stds, steps, strict=True))


@dataclass(frozen=True)
class Point:
    """One setting of a sweep: what it changes in LODO's tuned hyperparameters, or in the task.

    Attributes:
        value: where it stands on the sweep's axis.
    """

    value: float
    optimizer: str = "LODO"
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    task_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """Runs over one quantity, all else at LODO's tuned hyperparameters."""

    name: str
    axis: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Experiment:
    """One section of the paper.

    Attributes:
        schedule: the generations of the search. population: the runs of each.
        steps, runs: of the training after the search.
        halve_lr: whether the learning rates found are halved for the (much longer) training, as the paper does.
        validate_every, hessian_every: steps between validations, and between estimates of LODO's Hessian error; 0:
            never.
        trajectory: whether each run keeps all its points.
    """

    name: str
    section: str
    title: str
    task: str
    optimizers: tuple[str, ...]
    steps: int
    schedule: tuple[Generation, ...]
    task_options: Mapping[str, Any] = field(default_factory=dict)
    population: int = 32
    runs: int = 8
    halve_lr: bool = False
    validate_every: int = 0
    hessian_every: int = 0
    trajectory: bool = False
    sweeps: tuple[Sweep, ...] = ()


def betas(count: int, last: float = 0.9) -> Iterator[float]:
    """The paper's sweep of the momentum: 1 - (1 - last)^(r / (count - 1)), from 0 to `last`."""
    return (1 - (1 - last) ** (r / (count - 1)) for r in range(count))


BETA = Sweep("beta", "momentum beta", tuple(Point(beta, hyperparameters={"beta": beta}) for beta in betas(6)))
DEPTH = Sweep(
    "depth", "depth N", tuple(Point(depth, hyperparameters={"depth": depth}) for depth in (0, 2, 4, 8, 12, 16, 24))
)
BLOCK_SIZE = Sweep(
    "block size",
    "block size k, at N = 64 // k",
    tuple(Point(k, hyperparameters={"block_size": k, "depth": 64 // k}) for k in (2, 3, 4, 5, 6, 8, 16)),
)
ABLATIONS = ("LODO-Diagonal", "LODO-Global", "LODO-Residuals", "LODO-No-Momentum", "LODO-SGD")

BOWL = Experiment(
    name="bowl",
    section="5.1",
    title="Noisy quadratic bowl",
    task="bowl",
    optimizers=("SGD", "RMSprop", "Adam", "Yogi", "L-BFGS", "O-LBFGS", "BFGS", "Levenberg-Marquardt", "L2L", "LODO"),
    steps=100_000,
    schedule=_schedule((3, 3, 3, 3, 2, 1.7, 1.4, 1.2, 0.9, 0.6), (100, 300, 1000, *[10_000] * 7)),
    hessian_every=1000,
    sweeps=(
        BETA,
        DEPTH,
        BLOCK_SIZE,
        Sweep(
            "frozen",
            "steps for which the transplanted G was learned",
            tuple(
                Point(steps, "LODO-Transplanted", {"pretrain_steps": steps})
                for steps in (0, 300, 1000, 3000, 10_000, 30_000)
            ),
        ),
        Sweep(
            "noise",
            "standard deviation of the centre's steps",
            tuple(Point(noise, task_options={"noise": noise}) for noise in (0.25, 0.5, 1.0, 2.0)),
        ),
    ),
)
ROSENBROCK = Experiment(
    name="rosenbrock",
    section="5.2",
    title="Rosenbrock function",
    task="rosenbrock",
    optimizers=("SGD", "RMSprop", "Adam", "Yogi", "LODO"),
    steps=200,
    schedule=_schedule((3, 3, 3, 2.5, 2, 1.5, 1, 0.75, 0.5, 0.3), (200,) * 10),
    trajectory=True,
)
GENERATION = Experiment(
    name="generation",
    section="5.3",
    title="Image generation",
    task="generation",
    optimizers=("SGD", "RMSprop", "Adam", "LARS", "Yogi", "LODO", *ABLATIONS),
    steps=300_000,
    schedule=_schedule(
        (3, 3, 3, 3, 2, 1.7, 1.4, 1.2, 0.9, 0.6), (1000, 1000, 1000, 1000, 1500, 1500, 2000, 3000, 5000, 8000)
    ),
    halve_lr=True,
    validate_every=1000,
    sweeps=(BETA, DEPTH, BLOCK_SIZE),
)
CLASSIFICATION = Experiment(
    name="classification",
    section="5.4",
    title="Image classification",
    task="classification",
    optimizers=("SGD", "RMSprop", "Adam", "LARS", "Yogi", "O-LBFGS", "LODO"),
    steps=3000,
    schedule=_schedule((3, 3, 3, 3, 2, 1.7, 1.4, 1.2, 0.9, 0.6), (50, 50, 50, 50, 50, 60, 100, 200, 300, 500)),
    population=16,
    validate_every=100,
)
EXPERIMENTS: Mapping[str, Experiment] = {
    experiment.name: experiment for experiment in (BOWL, ROSENBROCK, GENERATION, CLASSIFICATION)
}
