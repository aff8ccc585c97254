"""One run: a job, and the record that it leaves, ready for JSON."""

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

import lodo
from benchmarks.environment import environment
from benchmarks.larger.contenders import get_contender
from benchmarks.larger.problem import Figures, Problem
from benchmarks.larger.tasks import TASKS
from benchmarks.measuring import device_name
from benchmarks.schedules import factor_at
from examples.paper.runs import FORMAT

Record = dict[str, Any]
SEARCH, FINAL = "search", "final"
TAIL = 0.1  # the share of the steps, at the end, whose mean loss is the final training loss; also the curve's window
POINTS = 100  # of a training curve
VALIDATIONS = 25  # of a final run; one of the search is validated at its end alone


@dataclass(frozen=True)
class Job:
    """All that fixes a run, but for the machine.

    Attributes:
        options: the task's.
        data: their name.
        settings: the contender's.
    """

    stage: str
    task: str
    options: Mapping[str, Any]
    data: str
    contender: str
    settings: Mapping[str, Any]
    seed: int
    steps: int
    threads: int
    device: str

    @property
    def key(self) -> str:
        """A digest of all fields: runs with the same key are the same run."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


class DivergenceError(Exception):
    """A loss that is not finite."""


class Clock:
    """Seconds of the wall in training, evaluation left out, and how many of them in optimizers' steps."""

    def __init__(self, device: str) -> None:
        self.total = self.optimizer = 0.0
        self._device = device

    def time(self, work: Callable[[], Any], is_optimizer: bool = False) -> Any:
        begun = self._now()
        result = work()
        seconds = self._now() - begun
        self.total += seconds
        self.optimizer += seconds if is_optimizer else 0.0
        return result

    def _now(self) -> float:
        if self._device != "cpu":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class Log:
    """The training loss as a running mean over a tenth of the steps, at about 100 points, and what validation says."""

    def __init__(self, steps: int, validations: int) -> None:
        self.losses = np.empty(steps)
        self.count, self.window = 0, max(1, math.floor(TAIL * steps))
        self.points, self.validation_points = spread(steps, POINTS), spread(steps, validations)
        self.training: dict[str, list[Any]] = {"step": [], "seconds": [], "loss": []}
        self.validation: dict[str, list[Any]] = {"step": [], "seconds": [], "loss": [], "accuracy": []}

    def add(self, loss: float, seconds: float) -> None:
        self.losses[self.count] = loss
        self.count += 1
        if self.count in self.points:
            mean = self.losses[max(0, self.count - self.window) : self.count].mean()
            self._append(self.training, step=self.count, seconds=round(seconds, 4), loss=_short(mean))

    def validate(self, problem: Problem, seconds: float) -> None:
        """Where this step is one for it."""
        if self.count in self.validation_points:
            found = as_json(problem.validate())
            self._append(self.validation, step=self.count, seconds=round(seconds, 4), **found)

    @staticmethod
    def _append(columns: dict[str, list[Any]], **row: Any) -> None:
        for name, value in row.items():
            columns[name].append(value)


def spread(steps: int, points: int) -> set[int]:
    """At most so many steps, evenly spread, the last one among them."""
    return {math.ceil(number * steps / points) for number in range(1, points + 1)}


def as_json(figures: Figures) -> dict[str, float | None]:
    """A loss that is not finite is None."""
    return {"loss": _short(figures.loss), "accuracy": round(figures.accuracy, 6)}


def _short(loss: float) -> float | None:
    return float(f"{loss:.8g}") if math.isfinite(loss) else None


def run(job: Job, data_root: Path | None = None) -> Record:
    """Trains as `job` says. A loss that is not finite ends the run there as diverged.

    The process's number of threads and global random numbers are as before when it returns.
    """
    started, threads = datetime.now(UTC).isoformat(timespec="seconds"), torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LODO skipped a step")  # the record counts them
            torch.manual_seed(job.seed)  # of what the optimizers draw
            problem = TASKS[job.task].make(job.seed, job.device, job.options, data_root)
            return _trained(job, problem) | {"started": started}
    finally:
        torch.set_num_threads(threads)


def _trained(job: Job, problem: Problem) -> Record:
    contender = get_contender(job.contender)
    optimizers = contender.make(problem, job.settings)
    clock, log = Clock(job.device), Log(job.steps, VALIDATIONS if job.stage == FINAL else 1)
    diverged_at: int | None = None
    try:
        train(problem, optimizers, contender.is_scheduled, job.steps, clock, log)
    except DivergenceError:
        diverged_at = log.count + 1
    test = problem.test() if job.stage == FINAL and diverged_at is None else None
    machine = environment()
    return {
        "format": FORMAT,
        "key": job.key,
        "job": asdict(job),
        "parameters": sum(param.numel() for param in problem.params),
        "diverged_at": diverged_at,
        "training": log.training,
        "validation": log.validation,
        "test": None if test is None else as_json(test),
        "seconds": clock.total,
        "optimizer_seconds": clock.optimizer,
        "skipped_steps": sum(each.skipped_steps for each in optimizers if isinstance(each, lodo.LODO)),
        "environment": machine | {"device_name": device_name(job.device)},
    }


def train(
    problem: Problem, optimizers: Sequence[Optimizer], is_scheduled: bool, steps: int, clock: Clock, log: Log
) -> None:
    """Takes all steps.

    Raises:
        DivergenceError: at a loss that is not finite; the step is not taken.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]

    def differentiate() -> float:
        for param in problem.params:
            param.grad = None
        loss = problem.loss()
        loss.backward()
        return float(loss.detach())

    for step in range(steps):
        if is_scheduled:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = factor_at("warmup_cosine", step, steps) * rate
        loss = clock.time(differentiate)
        if not math.isfinite(loss):
            raise DivergenceError
        for optimizer in optimizers:
            clock.time(optimizer.step, is_optimizer=True)
        log.add(loss, clock.total)
        log.validate(problem, clock.total)


def final_loss(record: Record) -> float:
    """The validation loss at the end; infinite where the run diverged."""
    loss = record["validation"]["loss"][-1] if record["diverged_at"] is None else None
    return math.inf if loss is None else float(loss)
