"""Which runs a command consists of, and the making of those that are not there yet."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.larger.contenders import Axis, Contender, get_contender
from benchmarks.larger.running import FINAL, SEARCH, Job, Record, final_loss, run
from benchmarks.larger.tasks import Task
from examples.paper.runs import append_result, read_results

SEARCH_SEED = 1000  # of the search, and of no final run
Settings = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What one command works on.

    Attributes:
        out: the folder of records and report.
        options: the task's.
        steps, search_steps: of a final run and of one of the search.
    """

    task: Task
    out: Path
    options: Mapping[str, Any]
    contenders: Sequence[str]
    seeds: Sequence[int]
    steps: int
    search_steps: int
    threads: int = 2
    device: str = "cpu"
    data_root: Path | None = None

    @property
    def records_path(self) -> Path:
        return self.out / "runs.jsonl"

    def job(self, stage: str, data: str, contender: Contender, settings: Settings, seed: int) -> Job:
        steps = self.search_steps if stage == SEARCH else self.steps
        common = (self.task.name, dict(self.options), data, contender.name, settings)
        return Job(stage, *common, seed=seed, steps=steps, threads=self.threads, device=self.device)


class Records:
    """The finished runs of a folder, by their keys."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Record] = {record["key"]: record for record in read_results(path)}

    def get(self, job: Job) -> Record | None:
        return self.found.get(job.key)

    def make(self, job: Job, data_root: Path | None) -> Record:
        """The job's record, after its run if that is not there yet."""
        if job.key not in self.found:
            self.found[job.key] = run(job, data_root)
            append_result(self.path, self.found[job.key])
            print(describe(self.found[job.key]), file=sys.stderr, flush=True)
        return self.found[job.key]

    def data_of(self, plan: Plan) -> str:
        """The name of the data of the plan's runs.

        Raises:
            ValueError: there are no such runs, or they have several data.
        """
        jobs = [record["job"] for record in self.found.values()]
        names = {job["data"] for job in jobs if job["task"] == plan.task.name and job["options"] == dict(plan.options)}
        if len(names) != 1:
            found = f"runs on {'; '.join(sorted(names))}" if names else "none"
            raise ValueError(f"{self.path} must hold runs of {plan.task.name} on one data set, it holds {found}")
        return names.pop()


def describe(record: Record) -> str:
    """One line on a run."""
    job = record["job"]
    rates = ", ".join(f"{name} {value:g}" for name, value in job["settings"].items() if name.endswith("lr"))
    end = "diverged" if math.isinf(final_loss(record)) else f"validation loss {final_loss(record):.4f}"
    what = f"{job['contender']} ({rates or 'as it is'}), seed {job['seed']}"
    return f"{job['stage']}: {what}: {end}, {record['seconds']:.0f} s"


@dataclass
class Search:
    """One contender's search as far as it has come.

    Attributes:
        settings: the best ones so far.
        tried: for each axis that has been begun, the settings it was searched at and the loss at each of its places.
        lacking: jobs that have to be made before it can go on; none when it is done.
    """

    settings: Settings
    tried: list[tuple[Axis, dict[int, float]]]
    lacking: list[Job]


def search(plan: Plan, records: Records, data: str, contender: Contender) -> Search:
    """Follows a contender's axes through the records, up to the first runs that are not there."""
    found = Search(dict(contender.settings(plan.task)), [], [])
    for axis in contender.axes:
        losses: dict[int, float] = {}
        found.tried.append((axis, losses))
        while places := axis.lacking(losses):
            for place in places:
                settings = found.settings | {axis.name: axis.value(place)}
                job = plan.job(SEARCH, data, contender, settings, SEARCH_SEED)
                if record := records.get(job):
                    losses[place] = final_loss(record)
                else:
                    found.lacking.append(job)
            if found.lacking:
                return found
        found.settings[axis.name] = axis.value(axis.best(losses))
    return found


def make_search(plan: Plan, records: Records, data: str) -> None:
    for name in plan.contenders:
        while jobs := search(plan, records, data, get_contender(name)).lacking:
            for job in jobs:
                records.make(job, plan.data_root)


def final_jobs(plan: Plan, records: Records, data: str, name: str) -> list[Job]:
    """A contender's final runs, at the best settings of its search; none before that is done."""
    contender = get_contender(name)
    found = search(plan, records, data, contender)
    if found.lacking:
        return []
    return [plan.job(FINAL, data, contender, found.settings, seed) for seed in plan.seeds]


def make_finals(plan: Plan, records: Records, data: str) -> None:
    """Seed by seed, so that all contenders meet the same drift of the machine."""
    jobs = {name: final_jobs(plan, records, data, name) for name in plan.contenders}
    if missing := [name for name, found in jobs.items() if not found]:
        print(f"{FINAL}: left out, for their search is not done: {'; '.join(missing)}", file=sys.stderr)
    for seed in plan.seeds:
        for found in jobs.values():
            for job in found:
                if job.seed == seed:
                    records.make(job, plan.data_root)


def finals(plan: Plan, records: Records, data: str) -> dict[str, list[Record]]:
    """The final runs that are there, by contender."""
    found = {}
    for name in plan.contenders:
        runs = [record for job in final_jobs(plan, records, data, name) if (record := records.get(job))]
        if runs:
            found[name] = runs
    return found


def shortened(plan: Plan, steps: int | None, search_steps: int | None) -> Plan:
    """The plan with other numbers of steps; those of the search follow from the former, if they are not given."""
    if steps is None:
        return replace(plan, search_steps=search_steps or plan.search_steps)
    in_proportion = math.ceil(steps * plan.task.search_steps / plan.task.steps)
    return replace(plan, steps=steps, search_steps=search_steps or in_proportion)
