"""Runs of variants of AutoLODO on tasks of the shoot-out, kept as they come, one JSON line each; what the comparisons
of one kind (`benchmarks.endings`, `benchmarks.shards`) have in common."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.shootout.problem import Task
from benchmarks.shootout.tasks import TASKS, get_task

TINY = 1e-30  # in place of a loss of zero

Record = dict[str, Any]
Run = Callable[[Task, int, str, Path | None, int | None], Record]
"""One run: the task, the seed, the variant, MNIST's folder, steps in place of the task's own."""


def new_record(task: Task, seed: int, variant: str, steps: int) -> Record:
    names = {"task": task.name, "seed": seed, "variant": variant, "steps": steps, "version": task.version}
    return {**names, "environment": environment(), "training": {}, "validation": {}}


def loaded(path: Path, steps: int | None) -> dict[tuple[str, int, str], Record]:
    """The runs of the present tasks with so many steps (None: the tasks' own), the last one of each."""
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    tasks = {record["task"]: get_task(record["task"]) for record in found}
    return {
        (record["task"], record["seed"], record["variant"]): record
        for record in found
        if (record["steps"], record["version"]) == (steps or tasks[record["task"]].steps, tasks[record["task"]].version)
    }


def records_of(
    arguments: Sequence[str] | None,
    doc: str,
    out: Path,
    run: Run,
    variants_of: Callable[[Task], Sequence[str]],
) -> tuple[list[Record], Path]:
    """Reads a command, makes the runs that it asks for and that are not on record with the present code, seed by seed.

    Returns:
        All records, and the folder for what is made of them.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--out", type=Path, default=out, help="folder of runs and report")
    parser.add_argument("--data-root", type=Path, help="folder of MNIST's files; its tasks are left out without")
    parser.add_argument("--tasks", help="comma-separated; all on which defaults are chosen")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each variant on each task")
    parser.add_argument("--steps", type=int, help="of every run, instead of the tasks' own; for trying out")
    parser.add_argument("--report-only", action="store_true", help="of the runs that there are")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = chosen.tasks.split(",") if chosen.tasks else [n for n, task in TASKS.items() if task.split == "choose"]
    tasks = [get_task(name) for name in names]
    for task in [task for task in tasks if task.needs_mnist and chosen.data_root is None]:
        print(f"{task.name} is left out: it needs --data-root, the folder of MNIST's files", file=sys.stderr)
        tasks.remove(task)
    chosen.out.mkdir(parents=True, exist_ok=True)
    path, source = chosen.out / "runs.jsonl", environment()["lodo_source"]
    wanted = [(task, seed, name) for seed in range(chosen.seeds) for task in tasks for name in variants_of(task)]
    done = {key for key, each in loaded(path, chosen.steps).items() if each["environment"]["lodo_source"] == source}
    for task, seed, name in [] if chosen.report_only else wanted:
        if (task.name, seed, name) not in done:
            record = run(task, seed, name, chosen.data_root, chosen.steps)
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"{task.name}, seed {seed}, {name}: {record['training']} {record['validation']}", file=sys.stderr)
    if not (records := [*loaded(path, chosen.steps).values()]):
        sys.exit(f"there are no runs in {path}")
    return records, chosen.out


def mean_ratio(found: Sequence[float | None]) -> str:
    """Geometric; none where a run diverged or is missing."""
    known = [max(each, TINY) for each in found if each is not None and math.isfinite(each)]
    return f"{geometric_mean(known):.2f}" if known and len(known) == len(found) else ""


def made_of(records: Sequence[Record]) -> str:
    """On what, and with which code."""
    machine, sources = records[-1]["environment"], sorted({record["environment"]["lodo_source"] for record in records})
    return f"{machine['processor']}, torch {machine['torch']}, lodo source {', '.join(sources)}"


def tasks_of(records: Sequence[Record]) -> list[str]:
    return [task for task in TASKS if any(record["task"] == task for record in records)]
