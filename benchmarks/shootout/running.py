"""One run: a job, and the record that it leaves, ready for JSON."""

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

import lodo
from benchmarks.environment import environment
from benchmarks.schedules import factor_at
from benchmarks.shootout.contenders import Contender, get_contender
from benchmarks.shootout.problem import TRAINING, Problem
from benchmarks.shootout.tasks import get_task
from examples.paper.runs import FORMAT, SKIPS

Record = dict[str, Any]
TUNE, CALIBRATE, CONFIRM, FINAL, ROBUST, CHANGE = "tune", "calibrate", "confirm", "final", "robust", "change"
CHOOSING = (TUNE, CALIBRATE, CONFIRM)  # stages of whose runs only the end matters
POINTS = 100  # of a curve
VALIDATIONS = 25  # of a run; those that choose settings are validated at their end alone
TAIL = 0.1  # the share of the steps, at the end, whose mean loss is the score; also the window of the curve
DIVERGED = 2.0  # a run that ends above so many times the loss of standing still has diverged


@dataclass(frozen=True)
class Job:
    """All that fixes a run, but for the machine.

    Attributes:
        stage: "tune", "calibrate", "confirm", "final", "robust" or "change".
        trial: its number in its search, or of its candidate; None for the other stages.
        factor: by which the learning rate among `hyperparameters` is off.
        version: of the task.
    """

    stage: str
    task: str
    contender: str
    hyperparameters: Mapping[str, Any]
    schedule: str
    seed: int
    steps: int
    trial: int | None = None
    factor: float = 1.0
    version: int = 1

    @property
    def key(self) -> str:
        """A digest of all fields: runs with the same key are the same run."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


class Clock:
    """Seconds of this process's CPU time: on a busy machine a run waits, and that must not count.

    With one thread on a quiet machine they are those of the wall.
    """

    def __init__(self) -> None:
        self.total = self.optimizer = 0.0
        self._begun: float | None = None

    def start(self) -> None:
        self._begun = time.process_time()

    def stop(self) -> None:
        """Does nothing to a clock that stands still."""
        if self._begun is not None:
            self.total += time.process_time() - self._begun
            self._begun = None

    def optimize(self, step: Callable[[], Any]) -> None:
        begun = time.process_time()
        step()
        self.optimizer += time.process_time() - begun


class Curve:
    """The losses of a run as a running mean over a window of a tenth of its budget, at about 100 points.

    The last point is the score. Early points are means over the steps so far.
    """

    def __init__(self, steps: int) -> None:
        self.losses = np.empty(steps)
        self.steps, self.count = steps, 0
        self.window = max(1, math.floor(TAIL * steps))
        self.points = {math.ceil(number * steps / POINTS) for number in range(1, POINTS + 1)}
        self.step: list[int] = []
        self.seconds: list[float] = []
        self.loss: list[float] = []

    def add(self, loss: float, seconds: float) -> None:
        self.losses[self.count] = loss
        self.count += 1
        if self.count in self.points:
            self.step.append(self.count)
            self.seconds.append(seconds)
            self.loss.append(float(self.losses[max(0, self.count - self.window) : self.count].mean()))

    def as_json(self) -> dict[str, list[float]]:
        return {
            "step": [float(step) for step in self.step],
            "seconds": [round(seconds, 4) for seconds in self.seconds],
            "loss": [float(f"{loss:.8g}") for loss in self.loss],
        }


class Validation:
    """Loss and accuracy on held-out data at evenly spread steps, the last one among them."""

    def __init__(self, steps: int, points: int) -> None:
        self.points = {math.ceil(number * steps / points) for number in range(1, points + 1)}
        self.step: list[int] = []
        self.seconds: list[float] = []
        self.found: list[tuple[float, float | None]] = []

    def take(
        self, problem: Problem, optimizers: list[Optimizer], step: int, seconds: float, is_averaging: bool
    ) -> None:
        """At the parameters that one would deploy."""
        if step not in self.points:
            return
        if is_averaging:
            with _at_average(optimizers):
                put_back = problem.renew_statistics()
                found = problem.validate()
                put_back()
        else:
            found = problem.validate()
        if found is not None:
            self.step.append(step)
            self.seconds.append(seconds)
            self.found.append(found)

    def as_json(self) -> dict[str, list[Any]] | None:
        """A loss that is not finite is None. None without held-out data."""
        if not self.found:
            return None
        losses = [float(f"{loss:.8g}") if math.isfinite(loss) else None for loss, _ in self.found]
        accuracies = [None if accuracy is None else round(accuracy, 6) for _, accuracy in self.found]
        seconds = [round(each, 4) for each in self.seconds]
        return {"step": self.step, "seconds": seconds, "loss": losses, "accuracy": accuracies}


class DivergenceError(Exception):
    """A loss that is not finite."""


class _BudgetSpentError(Exception):
    """Ends an optimizer that evaluates as often as it likes."""


def run(job: Job, data_root: Path | None) -> Record:
    """Trains as `job` says, on one thread.

    A loss that is not finite ends the run there as diverged. One that ends above `DIVERGED` times the loss of standing
    still has diverged too, and so has a LODO that skipped more than a tenth of its steps, and more than `SKIPS`, since
    their numbers overflow.
    """
    torch.set_num_threads(1)
    started, wall = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    problem = get_task(job.task).build(job.seed, data_root)
    torch.manual_seed(job.seed)  # of what the optimizers draw
    np.random.seed(job.seed)  # noqa: NPY002  (Kron draws from here)
    contender = get_contender(job.contender)
    optimizers = contender.make(problem, job.hyperparameters, job.seed, job.steps)
    curve, clock = Curve(job.steps), Clock()
    validation = Validation(job.steps, 1 if job.stage in CHOOSING else VALIDATIONS)
    train = _train_by_closure if contender.uses_closure else _train
    diverged_at: int | None = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LODO skipped a step")  # the record counts them
        try:
            train(job, contender, problem, optimizers, curve, clock, validation)
        except DivergenceError:
            diverged_at = curve.count + 1
    score = curve.loss[-1] if diverged_at is None else None
    skipped = sum(each.skipped_steps for each in optimizers if isinstance(each, lodo.LODO))
    if score is not None and not (score <= DIVERGED * problem.idle_loss and skipped <= max(SKIPS, job.steps // 10)):
        diverged_at = job.steps
    return {
        "format": FORMAT,
        "key": job.key,
        "job": asdict(job),
        "score": score if diverged_at is None else None,
        "diverged_at": diverged_at,
        "idle_loss": problem.idle_loss,
        "curve": None if job.stage in CHOOSING else curve.as_json(),
        "validation": validation.as_json(),
        "seconds": clock.total,
        "optimizer_seconds": clock.optimizer,
        "wall_seconds": time.perf_counter() - wall,
        "skipped_steps": skipped,
        "started": started,
        "environment": environment(),
    }


def score_of(record: Record, aim: str = TRAINING) -> float:
    """A run's final loss on data of either sort; infinite where it diverged."""
    if record["score"] is None:
        return math.inf
    loss = record["score"] if aim == TRAINING else record["validation"]["loss"][-1]
    return math.inf if loss is None else float(loss)


def without_schedule(setting: Mapping[str, Any]) -> dict[str, Any]:
    """What of a setting are the optimizer's own hyperparameters."""
    return {name: value for name, value in setting.items() if name != "schedule"}


def _train(
    job: Job,
    contender: Contender,
    problem: Problem,
    optimizers: list[Optimizer],
    curve: Curve,
    clock: Clock,
    validation: Validation,
) -> None:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    clock.start()
    for step in range(job.steps):
        if job.schedule != "constant":
            factor = factor_at(job.schedule, step, job.steps)
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = factor * rate
        for param in problem.params:
            param.grad = None
        loss = problem.loss()
        loss.backward()
        value = float(loss.detach())
        if not math.isfinite(value):
            clock.stop()
            raise DivergenceError
        if contender.is_averaging:
            clock.stop()
            value = _loss_at_average(problem, optimizers)
            clock.start()
        for optimizer in optimizers:
            clock.optimize(optimizer.step)
        clock.stop()
        curve.add(value, clock.total)
        validation.take(problem, optimizers, step + 1, clock.total, contender.is_averaging)
        clock.start()
    clock.stop()


@contextmanager
def _at_average(optimizers: list[Optimizer]) -> Iterator[None]:
    """Inside, the parameters are where the optimizer would have its model evaluated."""
    for optimizer in optimizers:
        optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for optimizer in optimizers:
            optimizer.train()  # type: ignore[attr-defined]


@contextmanager
def _at(problem: Problem, point: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the parameters are at `point`."""
    kept = [param.data for param in problem.params]
    for param, value in zip(problem.params, point, strict=True):
        param.data = value.data
    try:
        yield
    finally:
        for param, value in zip(problem.params, kept, strict=True):
            param.data = value


@torch.no_grad()
def _loss_at_average(problem: Problem, optimizers: list[Optimizer]) -> float:
    """The present batch's loss at the average; the clock stands still."""
    with _at_average(optimizers):
        value = float(problem.evaluate())
    if not math.isfinite(value):
        raise DivergenceError
    return value


def _train_by_closure(
    job: Job,
    contender: Contender,
    problem: Problem,
    optimizers: list[Optimizer],
    curve: Curve,
    clock: Clock,
    validation: Validation,
) -> None:
    """Every evaluation counts as a step, with the lowest loss so far: the line search may well try high ones. What is
    validated is the point of that loss."""
    (optimizer,) = optimizers
    best, best_point = math.inf, [param.detach().clone() for param in problem.params]
    in_evaluation = 0.0

    def closure() -> float:
        nonlocal best, best_point, in_evaluation
        begun = time.process_time()
        if curve.count == job.steps:
            raise _BudgetSpentError
        for param in problem.params:
            param.grad = None
        loss = problem.loss()
        loss.backward()
        value = float(loss.detach())
        in_evaluation += time.process_time() - begun
        clock.stop()
        if value < best:
            best, best_point = value, [param.detach().clone() for param in problem.params]
        if not math.isfinite(best):
            raise DivergenceError
        curve.add(best, clock.total)
        with _at(problem, best_point):
            validation.take(problem, optimizers, curve.count, clock.total, contender.is_averaging)
        clock.start()
        return value

    clock.start()
    try:
        while True:
            optimizer.step(closure)
            optimizer.state.clear()  # its line search found nothing better: it starts anew there
    except _BudgetSpentError:
        pass
    finally:
        clock.stop()
        clock.optimizer = clock.total - in_evaluation
