"""Training runs: one job, its result as one JSON line, and many of them over worker processes, resumable."""

import hashlib
import importlib
import json
import lzma
import math
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lodo
from examples import checkpoints
from examples.paper.optimizers import make_optimizer, make_step
from examples.paper.tasks import Task, make_task

FORMAT = 1  # of the result lines
BINS = 200  # points of a learning curve
TAIL = 0.1  # the share of the steps, at the end, whose mean loss is a run's score
PROBES = 100  # random directions of the Hessian error
CHECKPOINT_SECONDS = 120.0
PROGRESS_SECONDS = 10.0  # at most, between two signs of life
SKIPS = 10  # steps that LODO may skip, before it counts as diverged where they are a tenth of all

Result = dict[str, Any]
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None


@dataclass(frozen=True)
class Job:
    """All that fixes a run, but for the machine.

    Attributes:
        part: what it belongs to in its experiment: "main", or the name of a sweep.
        label: the curve it belongs to; runs that differ in the seed alone share it.
        value: its place on the sweep's axis.
        validate_every, hessian_every: in steps; 0: never.
    """

    experiment: str
    part: str
    label: str
    task: str
    optimizer: str
    hyperparameters: Mapping[str, Any]
    seed: int
    steps: int
    task_options: Mapping[str, Any] = field(default_factory=dict)
    value: float | None = None
    validate_every: int = 0
    hessian_every: int = 0
    trajectory: bool = False

    @property
    def key(self) -> str:
        """A digest of all fields: runs with the same key are the same run."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Place:
    """Where runs happen.

    Attributes:
        workers: how many runs share the machine; for the record.
        checkpoints: the folder for states of unfinished runs; None: none are kept.
        samples: the folder for what a run of seed 0 makes of its model in the end; None: it is not asked.
    """

    device: str = "cpu"
    data_root: Path | None = None
    threads: int = 1
    workers: int = 1
    checkpoints: Path | None = None
    samples: Path | None = None

    def checkpoint(self, job: "Job") -> Path | None:
        return self.checkpoints / f"{job.key}.pt" if self.checkpoints else None


class Curve:
    """The losses of a run, averaged over bins of steps, and those of its tail exactly.

    Its attributes are what a checkpoint holds: numbers and lists of them.
    """

    def __init__(self, steps: int) -> None:
        self.width = max(1, math.ceil(steps / BINS))
        self.tail_start = steps - max(1, math.floor(TAIL * steps))
        self.step: list[int] = []
        self.seconds: list[float] = []
        self.loss: list[float] = []
        self.sum = self.tail_sum = 0.0

    def add(self, step: int, loss: float) -> bool:
        """Takes the loss of step `step`, counted from 1; returns whether it completes a bin."""
        self.sum += loss
        if step > self.tail_start:
            self.tail_sum += loss
        return step % self.width == 0

    def close(self, step: int, seconds: float) -> None:
        """Ends the bin at `step`, if it holds any loss."""
        count = step - (self.step[-1] if self.step else 0)
        if count:
            self.step.append(step)
            self.seconds.append(seconds)
            self.loss.append(self.sum / count)
        self.sum = 0.0

    def tail_mean(self, step: int) -> float:
        return self.tail_sum / max(1, step - self.tail_start)


class Recorder:
    """What a run leaves behind besides its parameters."""

    def __init__(self, job: Job, task: Task) -> None:
        self.job, self.task = job, task
        self.curve = Curve(job.steps)
        self.validation: dict[str, list[float | None]] = {}
        self.hessian: dict[str, list[float | None]] = {}
        self.trajectory: list[list[float]] = []
        self.step = 0
        self.training_seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        kept = ("validation", "hessian", "trajectory", "step", "training_seconds")
        return {"curve": vars(self.curve)} | {name: getattr(self, name) for name in kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self.curve).update(state["curve"])
        vars(self).update({name: value for name, value in state.items() if name != "curve"})

    def measure(self, optimizer: torch.optim.Optimizer) -> None:
        """Validates and estimates the Hessian error where this step is one for it."""
        job, step = self.job, self.step
        if job.validate_every and step % job.validate_every == 0:
            figures = {"step": float(step), "seconds": self.training_seconds} | self.task.validate()
            for name, figure in figures.items():
                self.validation.setdefault(name, []).append(_finite(figure))
        if job.hessian_every and step % job.hessian_every == 0 and isinstance(optimizer, lodo.LODO):
            self.hessian.setdefault("step", []).append(float(step))
            self.hessian.setdefault("value", []).append(_finite(hessian_error(optimizer, self.task, seed=step)))


def hessian_error(optimizer: lodo.LODO, task: Task, seed: int) -> float:
    """||I - G H||_F / sqrt(n) of LODO's present G at the task's present sample, from `PROBES` random directions."""
    preconditioner = optimizer.preconditioners[0]
    assert preconditioner is not None
    lr = float(optimizer.param_groups[0]["lr"])
    generator = torch.Generator(task.params[0].device).manual_seed(seed)
    return lodo.hessian_error(preconditioner, task.hessian(), lr=lr, samples=PROBES, generator=generator)


def run(job: Job, place: Place, on_progress: Callable[[int], None] | None = None) -> Result:
    """Trains as `job` says and returns the result, ready for JSON.

    A loss that is not finite ends the run there as diverged. So does a LODO that skips a tenth of its steps, since
    their numbers overflow: it stands still, at a finite loss. The checkpoint is left to the caller to remove.

    Args:
        on_progress: called with the number of steps done since the last call, every few seconds.
    """
    torch.set_num_threads(place.threads)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    task = make_task(job.task, job.seed, job.task_options, device=place.device, data_root=place.data_root)
    setup = time.perf_counter()
    optimizer = make_optimizer(job.optimizer, task, job.hyperparameters, job.seed)
    setup_seconds = time.perf_counter() - setup
    recorder = Recorder(job, task)
    machine = environment(place, task)
    checkpoint = place.checkpoint(job)
    if checkpoint and checkpoint.exists():
        _restore(checkpoint, recorder, task, optimizer)
    diverged_at = _train(recorder, optimizer, checkpoint, on_progress)
    final_loss = _finite(recorder.curve.tail_mean(job.steps)) if diverged_at is None else None
    if diverged_at is None and final_loss is None:
        diverged_at = job.steps
    samples = place.samples / f"{job.label}.npy" if place.samples and job.seed == 0 else None
    test = task.finish(samples) if diverged_at is None and job.part == "main" else {}
    return {
        "format": FORMAT,
        "key": job.key,
        "job": asdict(job),
        "status": "finished" if diverged_at is None else "diverged",
        "diverged_at": diverged_at,
        "final_loss": final_loss,
        "skipped_steps": skipped_steps(optimizer),
        "seconds": recorder.training_seconds,
        "setup_seconds": setup_seconds,
        "steps_per_second": recorder.step / max(recorder.training_seconds, 1e-9),
        "curve": {name: _short(getattr(recorder.curve, name)) for name in ("step", "seconds", "loss")},
        "validation": recorder.validation,
        "test": {name: _finite(figure) for name, figure in test.items()},
        "hessian_error": recorder.hessian,
        "trajectory": [_short(point) for point in recorder.trajectory],
        "started": started,
        "environment": machine,
    }


def skipped_steps(optimizer: torch.optim.Optimizer) -> int:
    return optimizer.skipped_steps if isinstance(optimizer, lodo.LODO) else 0


def _finite(number: float) -> float | None:
    """JSON has no infinity."""
    return number if math.isfinite(number) else None


def _short(numbers: list[Any]) -> list[Any]:
    """Six significant digits: curves are looked at, and the final loss stands beside them in full."""
    return [_finite(float(f"{number:.6g}")) if isinstance(number, float) else number for number in numbers]


def _train(
    recorder: Recorder,
    optimizer: torch.optim.Optimizer,
    checkpoint: Path | None,
    on_progress: Callable[[int], None] | None,
) -> int | None:
    """Takes the steps that are left; returns the one whose loss was not finite, or None."""
    job, task, curve = recorder.job, recorder.task, recorder.curve
    step_once = make_step(job.optimizer, task, optimizer)
    intervals = [every for every in (job.validate_every, job.hessian_every) if every]
    last_progress = last_checkpoint = begun = time.perf_counter()
    begun -= recorder.training_seconds
    reported = recorder.step
    for step in range(recorder.step + 1, job.steps + 1):
        if job.trajectory:
            recorder.trajectory.append(torch.cat([param.detach().reshape(-1) for param in task.params]).tolist())
        task.draw()
        loss = step_once()
        recorder.step = step
        if not math.isfinite(loss):
            recorder.training_seconds = time.perf_counter() - begun
            return step
        bin_full = curve.add(step, loss) or step == job.steps
        now = time.perf_counter()
        is_late, is_due = now - last_progress > PROGRESS_SECONDS, now - last_checkpoint > CHECKPOINT_SECONDS
        if not (bin_full or is_late or is_due or any(step % every == 0 for every in intervals)):
            continue
        _synchronise(task)
        recorder.training_seconds = time.perf_counter() - begun
        if bin_full:
            curve.close(step, recorder.training_seconds)
            if skipped_steps(optimizer) > max(SKIPS, step // 10):
                return step
        recorder.measure(optimizer)
        if on_progress and (bin_full or is_late):
            on_progress(step - reported)
            reported, last_progress = step, now
        if checkpoint and is_due:
            _save(checkpoint, recorder, task, optimizer)
            last_checkpoint = time.perf_counter()
        begun = time.perf_counter() - recorder.training_seconds  # the clock stood still meanwhile
    return None


def _synchronise(task: Task) -> None:
    if task.params[0].is_cuda:
        torch.cuda.synchronize(task.params[0].device)


def _save(path: Path, recorder: Recorder, task: Task, optimizer: torch.optim.Optimizer) -> None:
    state = {"recorder": recorder.state_dict(), "task": task.state_dict(), "optimizer": optimizer.state_dict()}
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.save(path, state)


def _restore(path: Path, recorder: Recorder, task: Task, optimizer: torch.optim.Optimizer) -> None:
    state = checkpoints.load(path)
    task.load_state_dict(state["task"])
    optimizer.load_state_dict(state["optimizer"])
    recorder.load_state_dict(state["recorder"])


def environment(place: Place, task: Task) -> dict[str, Any]:
    """The versions and the device behind a result; the load of the machine is that at the start."""
    device = task.params[0].device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "lodo": lodo.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "device": device.type,
        "device_name": name,
        "threads": place.threads,
        "workers": place.workers,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def read_results(path: Path) -> list[Result]:
    """The results in a JSON lines file, in order; one called .xz is unpacked. A last line cut off by a kill is left
    out, with a note on stderr.

    Raises:
        ValueError: a line that is not the last is no result, or the format is another one.
    """
    if not path.exists():
        return []
    data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    lines = data.decode().split("\n")
    results = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        if number == len(lines):  # every whole line ends with a line break
            print(f"{path}: the last line is cut off; its run will be made again", file=sys.stderr)
            continue
        try:
            result = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not a JSON line ({error})") from error
        if result.get("format") != FORMAT:
            raise ValueError(f"{path}, line {number}: format must be {FORMAT}, got {result.get('format')!r}")
        results.append(result)
    return results


def append_result(path: Path, result: Result) -> None:
    """Adds one line in one write that has reached the disk on return; a torn last line is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(result, allow_nan=False) + "\n"
    with path.open("a+b") as file:
        if fcntl:  # another process must not take a half-written line for a torn one
            fcntl.flock(file, fcntl.LOCK_EX)
        content_end = file.seek(0, os.SEEK_END)
        if content_end:
            file.seek(content_end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def run_all(jobs: Iterable[Job], path: Path, place: Place, workers: int) -> list[Result]:
    """Makes the runs that `path` does not hold yet, adds each as it ends, and returns all results of `jobs`.

    A run that raises does not take the others with it; the first error is raised when the rest is done.
    """
    jobs = list({job.key: job for job in jobs}.values())
    done = {result["key"] for result in read_results(path)}
    todo = [job for job in jobs if job.key not in done]
    if len(todo) < len(jobs):
        print(f"{path}: {len(jobs) - len(todo)} of {len(jobs)} runs are there already", file=sys.stderr)
    errors: list[tuple[Job, BaseException]] = []
    from tqdm import tqdm  # `run` does without it

    with tqdm(total=sum(job.steps for job in todo), unit="step", unit_scale=True, disable=not todo) as bar:
        for job, outcome in _outcomes(todo, place, workers, bar):
            if isinstance(outcome, BaseException):
                errors.append((job, outcome))
                bar.write(f"{job.label}, seed {job.seed}: {outcome!r}", file=sys.stderr)
                continue
            append_result(path, outcome)
            if checkpoint := place.checkpoint(job):
                checkpoint.unlink(missing_ok=True)
                checkpoints.remove_parts(checkpoint)
            bar.set_postfix_str(f"{job.label}, seed {job.seed}: {describe(outcome)}")
    if errors:
        job, error = errors[0]
        raise RuntimeError(
            f"{len(errors)} of {len(todo)} runs failed, the first: {job.label}, seed {job.seed}"
        ) from error
    wanted = {job.key for job in jobs}
    return [result for result in read_results(path) if result["key"] in wanted]


def describe(result: Result) -> str:
    if result["status"] == "diverged":
        return f"diverged at step {result['diverged_at']}"
    return f"{result['final_loss']:.4g}"


def _outcomes(jobs: list[Job], place: Place, workers: int, bar: Any) -> Iterator[tuple[Job, Result | BaseException]]:
    if workers == 1:
        for job in jobs:
            yield job, _attempt(job, place, bar.update)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads
    with ProcessPoolExecutor(workers, context, _leave_interrupts_to_the_parent) as pool:
        futures: dict[Future[Result], Job] = {pool.submit(run, job, place): job for job in jobs}
        try:
            for future in as_completed(futures):
                job = futures[future]
                bar.update(job.steps)
                yield job, future.exception() or future.result()
        except (
            BaseException
        ):  # an interrupt, say: what waits must not be made and thrown away; checkpoints keep the rest
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _attempt(job: Job, place: Place, on_progress: Callable[[int], None]) -> Result | Exception:
    try:
        return run(job, place, on_progress)
    except Exception as error:
        return error
