"""Which runs the comparison consists of: the plan of a command, and the jobs of its stages."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.shootout.changes import CHANGES
from benchmarks.shootout.contenders import RECOMMENDED, UNTUNED, Contender, fixed_options, get_contender
from benchmarks.shootout.problem import Task
from benchmarks.shootout.running import CHANGE, FINAL, ROBUST, TUNE, Job, Record
from benchmarks.shootout.tasks import get_task
from examples.paper.runs import read_results

SEEDS = (0, 1, 2)
TUNING_SEED = 1000  # of all trials, and of no other stage: on the same batches trials differ by their settings alone
CHANGE_SEED = 1001  # of the runs with one thing changed, by which defaults may be chosen
FACTORS = (0.01, 0.1, 10.0, 100.0)


@dataclass(frozen=True)
class Plan:
    """What one command works on.

    Attributes:
        out: the folder of records and report.
        tasks, contenders: their names.
        recommended: the call of untuned LODO; of the tuned one all but what is searched.
        trials: of every search, instead of the contenders' own numbers; None: these.
        seeds, robust_seeds: of the final runs and of those with a wrong learning rate.
        steps: of every run, instead of the tasks' own; for trying out.
    """

    out: Path
    tasks: Sequence[str]
    contenders: Sequence[str]
    data_root: Path | None = None
    workers: int = 1
    recommended: Mapping[str, Any] = field(default_factory=lambda: dict(RECOMMENDED))
    trials: int | None = None
    seeds: Sequence[int] = SEEDS
    robust_seeds: Sequence[int] = SEEDS[:1]
    steps: int | None = None

    @property
    def records_path(self) -> Path:
        return self.out / "runs.jsonl"

    def pairs(self) -> list[tuple[Task, Contender]]:
        """Every task with every contender that applies to it."""
        pairs = [(get_task(task), get_contender(name)) for task in self.tasks for name in self.contenders]
        return [(task, contender) for task, contender in pairs if contender.applies_to(task)]

    def steps_of(self, task: Task) -> int:
        return self.steps or task.steps

    def trials_of(self, contender: Contender) -> int:
        """Of the search with each schedule."""
        return self.trials or contender.trials if contender.space else 0


def load(path: Path) -> list[Record]:
    """The records in a file, and in a packed one beside it (.gz), to which nothing is added; each run once."""
    found = [*read_results(path.with_name(path.name + ".gz")), *read_results(path)]
    return list({record["key"]: record for record in found}.values())


def trials(plan: Plan, task: Task, contender: Contender, schedule: str, records: Iterable[Record]) -> list[Record]:
    """The trials that count for one search, in order; one that was made with other fixed options does not."""
    fixed = fixed_options(contender.name, plan.recommended)
    found: dict[int, Record] = {}
    for record in records:
        job = record["job"]
        same = (job["stage"], job["task"], job["contender"], job["schedule"], job["steps"], job["version"])
        if same != (TUNE, task.name, contender.name, schedule, plan.steps_of(task), task.version):
            continue
        if {key: value for key, value in job["hyperparameters"].items() if key not in contender.space} == fixed:
            found[job["trial"]] = record
    wanted = range(plan.trials_of(contender))
    return [found[number] for number in wanted if number in found]


def score_of(record: Record) -> float:
    """Infinite where the run diverged."""
    return math.inf if record["score"] is None else float(record["score"])


def choice(
    plan: Plan, task: Task, contender: Contender, records: Sequence[Record]
) -> tuple[dict[str, Any], str] | None:
    """The hyperparameters and the schedule for the final runs: those of the best trial over all schedules.

    None while some search is not done. Where every trial diverged it is the first one of the last search.
    """
    if not contender.space:
        return fixed_options(contender.name, plan.recommended), contender.schedules[0]
    best: Record | None = None
    for schedule in contender.schedules:
        found = trials(plan, task, contender, schedule, records)
        if len(found) < plan.trials_of(contender):
            return None
        leader = min(found, key=score_of)
        if best is None or score_of(leader) <= score_of(best):
            best = leader
    assert best is not None
    return dict(best["job"]["hyperparameters"]), best["job"]["schedule"]


def final_jobs(plan: Plan, records: Sequence[Record]) -> list[Job]:
    """The runs at the tuned settings, for pairs whose search is done."""
    return [job for task, contender in plan.pairs() for job in _jobs(plan, task, contender, records, FINAL, 1.0)]


def robust_jobs(plan: Plan, records: Sequence[Record]) -> list[Job]:
    """The same with the learning rate off by each of `FACTORS`."""
    return [
        job
        for task, contender in plan.pairs()
        for factor in FACTORS
        for job in _jobs(plan, task, contender, records, ROBUST, factor)
    ]


def change_jobs(plan: Plan) -> dict[str, list[Job]]:
    """The runs of untuned LODO with one thing changed, by the change."""
    found: dict[str, list[Job]] = {}
    for name, change in CHANGES.items():
        options = {key: value for key, value in {**plan.recommended, **change.options}.items() if value is not None}
        tasks = [get_task(task) for task in plan.tasks if get_task(task).split in change.splits]
        found[name] = [
            Job(CHANGE, task.name, UNTUNED, options, "constant", CHANGE_SEED, plan.steps_of(task), version=task.version)
            for task in tasks
            if UNTUNED in plan.contenders
        ]
    return found


def _jobs(
    plan: Plan, task: Task, contender: Contender, records: Sequence[Record], stage: str, factor: float
) -> list[Job]:
    chosen = choice(plan, task, contender, records)
    if chosen is None:
        return []
    hyperparameters, schedule = chosen
    if factor != 1:
        hyperparameters["lr"] = factor * hyperparameters.get("lr", 1.0)  # LODO's own lr is 1
    return [
        Job(
            stage=stage,
            task=task.name,
            contender=contender.name,
            hyperparameters=hyperparameters,
            schedule=schedule,
            seed=seed,
            steps=plan.steps_of(task),
            factor=factor,
            version=task.version,
        )
        for seed in (plan.seeds if stage == FINAL else plan.robust_seeds)
    ]


def untuned_pairs(plan: Plan, records: Sequence[Record]) -> list[str]:
    """The pairs whose search is not done, by name."""
    return [
        f"{contender.name} on {task.name}"
        for task, contender in plan.pairs()
        if choice(plan, task, contender, records) is None
    ]
