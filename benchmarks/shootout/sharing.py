"""Shares runs out among processes, of this command or of several: each unit of work is claimed by a file lock.

A lock ends with its process, however it ends, and what a run has found is one line of the records: nothing else is
left behind by a kill.
"""

import hashlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.shootout.choosing import calibration_jobs, confirmation_jobs
from benchmarks.shootout.contenders import Contender, get_contender
from benchmarks.shootout.jobs import change_jobs, final_jobs, robust_jobs
from benchmarks.shootout.plan import Plan, next_trial, search_of, trials
from benchmarks.shootout.problem import Task
from benchmarks.shootout.running import CALIBRATE, CHANGE, CONFIRM, FINAL, TUNE, Job, Record, run
from benchmarks.shootout.tasks import get_task
from examples.paper.runs import append_result, fcntl

WAIT_SECONDS = 5.0


@dataclass(frozen=True)
class Unit:
    """What one process at a time works on: a search, or a single run.

    Attributes:
        next_job: the job that it wants next, from all records; None when it is done.
        is_done: whether that is None, which of a search is known much sooner.
    """

    name: str
    next_job: Callable[[Sequence[Record]], Job | None]
    is_done: Callable[[Sequence[Record]], bool]


def units(plan: Plan, stage: str, records: Sequence[Record]) -> list[Unit]:
    if stage == TUNE:
        return [
            Unit(
                f"{task.name}/{contender.name}",
                partial(next_trial, plan, task, contender),
                partial(_is_tuned, plan, task, contender),
            )
            for task, contender in plan.pairs()
            if contender.space
        ]
    if stage == CALIBRATE:
        every = [job for name in plan.contenders for job in calibration_jobs(plan, get_contender(name))]
        jobs = [job for job in every if plan.data_root is not None or not get_task(job.task).needs_mnist]
    elif stage == CONFIRM:
        jobs = confirmation_jobs(plan, records)
    elif stage == CHANGE:
        jobs = [job for own in change_jobs(plan).values() for job in own]
    else:
        jobs = final_jobs(plan, records) if stage == FINAL else robust_jobs(plan, records)
    return [Unit(job.key, partial(_unless_done, job), partial(_is_made, job)) for job in jobs]


def _is_tuned(plan: Plan, task: Task, contender: Contender, records: Sequence[Record]) -> bool:
    return search_of(plan, task, contender).is_done(trials(plan, task, contender, records))


def _is_made(job: Job, records: Sequence[Record]) -> bool:
    return any(record["key"] == job.key for record in records)


def _unless_done(job: Job, records: Sequence[Record]) -> Job | None:
    return None if _is_made(job, records) else job


@contextmanager
def claim(folder: Path, name: str) -> Iterator[bool]:
    """Whether this process holds `name` now, until the end of the block."""
    if fcntl is None:  # no locks to be had: `work_on` allows one process only
        yield True
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / hashlib.sha256(name.encode()).hexdigest()[:16]).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def work(plan: Plan, stage: str, parent: int | None = None) -> int:
    """Makes runs until the stage is done; returns how many units failed. Several processes may do so at once.

    Args:
        parent: the process of the command, for a worker, which must not go on alone if the command is killed. The
            command itself outlives its parent, the shell that it may have been left behind by.
    """
    torch.set_num_threads(1)  # of what proposes settings, as of the runs
    failed: set[str] = set()
    while True:
        records = plan.load()
        left = [unit for unit in units(plan, stage, records) if unit.name not in failed and not unit.is_done(records)]
        if not left or _is_orphan(parent):
            return len(failed)
        was_busy = False
        for unit in left:
            with claim(plan.out / "claims", unit.name) as is_ours:
                if is_ours:
                    was_busy = True
                    if not _finish(unit, plan, parent):
                        failed.add(unit.name)
        if not was_busy:
            time.sleep(WAIT_SECONDS)


def _is_orphan(parent: int | None) -> bool:
    return parent is not None and os.getppid() != parent


def _finish(unit: Unit, plan: Plan, parent: int | None) -> bool:
    """Makes all runs of a unit; returns whether none failed."""
    while not _is_orphan(parent):
        told = unit.name
        try:
            job = unit.next_job(plan.load())
            if job is None:
                return True
            told = _named(job)
            record = run(job, plan.data_root)
        except Exception:
            print(f"{told} failed:\n{traceback.format_exc()}", file=sys.stderr)
            return False
        append_result(plan.records_path, record)
        found = "diverged" if record["score"] is None else f"{record['score']:.4g}"
        print(f"{_named(job)}: {found} in {record['seconds']:.1f} s", file=sys.stderr, flush=True)
    return True


def _named(job: Job) -> str:
    detail = f"trial {job.trial}" if job.trial is not None else f"seed {job.seed}, lr x {job.factor:g}"
    return f"{job.stage} {job.task}, {job.contender}, {job.schedule}, {detail}"


def _work_in_process(plan: Plan, stage: str, parent: int) -> None:
    sys.exit(1 if work(plan, stage, parent) else 0)


def work_on(plan: Plan, stage: str) -> None:
    """Makes a stage's missing runs, in `plan.workers` processes.

    Raises:
        RuntimeError: some failed; the others are made and kept.
        ValueError: several workers on a system without file locks.
    """
    if plan.workers == 1:
        if count := work(plan, stage):
            raise RuntimeError(f"{count} units of the stage {stage!r} failed; the same command tries them again")
        return
    if fcntl is None:
        raise ValueError(f"workers must be 1 on this system, which has no file locks, got {plan.workers}")
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads
    arguments = (plan, stage, os.getpid())
    processes = [context.Process(target=_work_in_process, args=arguments, daemon=True) for _ in range(plan.workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"some units of the stage {stage!r} failed; the same command tries them again")
