"""Which runs the comparison consists of: the plan of a command, and the jobs of its stages.

A contender is tuned with two aims: the training loss, which is that of the last tenth of the steps, and the loss on
held-out data at the end. Each has its own setting, and its own final runs where the settings differ.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from benchmarks.environment import source_hash
from benchmarks.shootout.bootstrap import DRAWS
from benchmarks.shootout.changes import CHANGES
from benchmarks.shootout.contenders import (
    CLOCK,
    RECOMMENDED,
    REFERENCE,
    TUNED,
    UNTUNED,
    Contender,
    fixed_options,
    get_contender,
)
from benchmarks.shootout.problem import SELECTING, TRAINING, VALIDATION, Task
from benchmarks.shootout.running import CALIBRATE, CHANGE, FINAL, ROBUST, TUNE, Job, Record, score_of
from benchmarks.shootout.tasks import TASKS, get_task
from benchmarks.shootout.tuning import Search
from examples.paper.runs import read_results

TUNING_SEED = (
    SELECTING  # of all trials, and of no other stage: on the same batches trials differ by their settings alone
)
GAIN = 0.01
WORST = 10.0  # times the lowest loss on a task, that a candidate for all tasks may lose there
CHANGE_SEED = SELECTING + 1  # of the runs with one thing changed, by which defaults may be chosen
FACTORS = (0.01, 0.1, 10.0, 100.0)


@dataclass(frozen=True)
class Plan:
    """What one command works on.

    Attributes:
        out: the folder of records and report.
        tasks, contenders: their names.
        recommended: the call of untuned LODO; of the tuned one all but what is searched.
        trials: of every search, instead of the contenders' own numbers; None: these.
        seeds: how many final runs a pair has, instead of the contenders' own numbers; None: these.
        robust_seeds: of the runs with a wrong learning rate.
        steps: of every run, instead of the tasks' own; for trying out.
        redoes: LODO's runs with other code than the present one count as not made.
        draws: of the report's bootstrap.
    """

    out: Path
    tasks: Sequence[str]
    contenders: Sequence[str]
    data_root: Path | None = None
    workers: int = 1
    recommended: Mapping[str, Any] = field(default_factory=lambda: dict(RECOMMENDED))
    trials: int | None = None
    seeds: int | None = None
    robust_seeds: int = 3
    steps: int | None = None
    redoes: bool = False
    draws: int = DRAWS

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
        return self.trials or contender.trials if contender.space else 0

    def candidates_of(self, contender: Contender) -> Sequence[Mapping[str, Any]]:
        """All of them, or as many as a search has trials."""
        return contender.candidates[: self.trials]

    def seeds_of(self, contender: Contender) -> range:
        return range(self.seeds or contender.seeds)

    def load(self) -> list[Record]:
        """The records in the file, and in a packed one beside it (.gz), to which nothing is added; of each run the last
        one."""
        path = self.records_path
        found = [*read_results(path.with_name(path.name + ".gz")), *read_results(path)]
        latest = {record["key"]: record for record in found}.values()
        own = [record for record in latest if "validation" in record]  # others are of a protocol before this one
        return [record for record in own if not (self.redoes and is_outdated(record))]


def is_outdated(record: Record) -> bool:
    """LODO's, made with other code than the present one, and the clock's that were made with LODO's."""
    is_remade = record["job"]["contender"] in (UNTUNED, TUNED, CLOCK)
    return is_remade and record["environment"].get("lodo_source") != source_hash()


def trials(plan: Plan, task: Task, contender: Contender, records: Iterable[Record]) -> list[Record]:
    """The trials that count for a search, in order, up to the first one missing; one that was made with other fixed
    options does not."""
    fixed = fixed_options(contender.name, plan.recommended)
    found: dict[int, Record] = {}
    for record in records:
        job = record["job"]
        same = (job["stage"], job["task"], job["contender"], job["steps"], job["version"])
        if same != (TUNE, task.name, contender.name, plan.steps_of(task), task.version):
            continue
        searched = {*contender.space, *contender.afterwards}
        wanted = contender.space_of(task).keys() - {"schedule"}
        own = job["hyperparameters"]
        if wanted <= own.keys() and {key: value for key, value in own.items() if key not in searched} == fixed:
            found[job["trial"]] = record
    return [found[number] for number in takewhile(found.__contains__, count())]


def search_of(plan: Plan, task: Task, contender: Contender) -> Search:
    return Search(
        task=task.name,
        contender=contender.name,
        space=contender.space_of(task),
        aims=task.aims,
        count=plan.trials_of(contender),
        afterwards=contender.afterwards,
        widens=plan.trials is None,
    )


def next_trial(plan: Plan, task: Task, contender: Contender, records: Sequence[Record]) -> Job | None:
    """The trial that a search wants next, None when it is done."""
    done = trials(plan, task, contender, records)
    setting = search_of(plan, task, contender).next_setting(done)
    if setting is None:
        return None
    return Job(
        stage=TUNE,
        task=task.name,
        contender=contender.name,
        hyperparameters=fixed_options(contender.name, plan.recommended) | _without_schedule(setting),
        schedule=setting.get("schedule", contender.schedule),
        seed=TUNING_SEED,
        steps=plan.steps_of(task),
        trial=len(done),
        version=task.version,
    )


@dataclass(frozen=True)
class Chosen:
    """What final runs are made with."""

    hyperparameters: Mapping[str, Any]
    schedule: str


def choice(
    plan: Plan, task: Task, contender: Contender, records: Sequence[Record], aim: str = TRAINING
) -> Chosen | None:
    """The setting of the final runs for an aim: the best trial's, the best candidate's, or the only one.

    None while that is not known yet. Where every trial diverged it is the first one. An option that costs much is
    taken only if the loss is lower by more than the share `GAIN`.
    """
    if contender.candidates:
        return calibrated(plan, contender, records, aim)
    if not contender.space:
        return Chosen(fixed_options(contender.name, plan.recommended), contender.schedule)
    found = trials(plan, task, contender, records)
    if not search_of(plan, task, contender).is_done(found):
        return None
    dear = [record for record in found if contender.afterwards.keys() & record["job"]["hyperparameters"].keys()]
    best = min((record for record in found if record not in dear), key=partial(score_of, aim=aim))
    for record in dear:
        if score_of(record, aim) < (1 - GAIN) * score_of(best, aim):
            best = record
    return Chosen(best["job"]["hyperparameters"], best["job"]["schedule"])


def calibration_jobs(plan: Plan, contender: Contender) -> list[Job]:
    """All candidates on all tasks to choose on, whatever the plan's tasks; none where there is but one candidate."""
    candidates = plan.candidates_of(contender)
    if len(candidates) < 2:
        return []
    return [
        Job(
            stage=CALIBRATE,
            task=task.name,
            contender=contender.name,
            hyperparameters=_without_schedule(candidate),
            schedule=candidate["schedule"],
            seed=TUNING_SEED,
            steps=plan.steps_of(task),
            trial=number,
            version=task.version,
        )
        for task in TASKS.values()
        if task.split == "choose" and contender.applies_to(task)
        for number, candidate in enumerate(candidates)
    ]


def calibrated(plan: Plan, contender: Contender, records: Sequence[Record], aim: str) -> Chosen | None:
    """The candidate whose losses on the tasks to choose on have the lowest geometric mean; None while runs are missing.

    A loss counts relative to the lowest one of any candidate on the task, and as no more than `WORST` times that.
    """
    candidates = plan.candidates_of(contender)
    by_key = {record["key"]: record for record in records}
    jobs = [job for job in calibration_jobs(plan, contender) if aim in get_task(job.task).aims]
    if any(job.key not in by_key for job in jobs):
        return None
    cost = [0.0] * len(candidates)
    for task in dict.fromkeys(job.task for job in jobs):
        losses = [score_of(by_key[job.key], aim) for job in jobs if job.task == task]
        for number, loss in enumerate(losses):
            cost[number] += math.log(min(loss / min(losses), WORST) if math.isfinite(loss) else WORST)
    best = candidates[cost.index(min(cost))]
    return Chosen(_without_schedule(best), best["schedule"])


def _without_schedule(setting: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in setting.items() if name != "schedule"}


def final_jobs(plan: Plan, records: Sequence[Record], aims: Sequence[str] = (TRAINING, VALIDATION)) -> list[Job]:
    """The runs at the chosen settings, for pairs whose search is done; each once, though it may serve both aims."""
    jobs = [
        job
        for task, contender in plan.pairs()
        for aim in aims
        if aim in task.aims
        for job in _jobs(plan, task, contender, choice(plan, task, contender, records, aim), FINAL, 1.0)
    ]
    return list({job.key: job for job in jobs}.values())


def robust_jobs(plan: Plan, records: Sequence[Record]) -> list[Job]:
    """Of the reference and of untuned LODO: the same with the learning rate off by each of `FACTORS`."""
    return [
        job
        for task, contender in plan.pairs()
        if contender.name in (REFERENCE, UNTUNED)
        for factor in FACTORS
        for job in _jobs(plan, task, contender, choice(plan, task, contender, records), ROBUST, factor)
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


def _jobs(plan: Plan, task: Task, contender: Contender, setting: Chosen | None, stage: str, factor: float) -> list[Job]:
    if setting is None:
        return []
    hyperparameters = dict(setting.hyperparameters)
    if factor != 1:
        hyperparameters["lr"] = factor * hyperparameters["lr"]
    return [
        Job(
            stage=stage,
            task=task.name,
            contender=contender.name,
            hyperparameters=hyperparameters,
            schedule=setting.schedule,
            seed=seed,
            steps=plan.steps_of(task),
            factor=factor,
            version=task.version,
        )
        for seed in (plan.seeds_of(contender) if stage == FINAL else range(plan.robust_seeds))
    ]


def untuned_pairs(plan: Plan, records: Sequence[Record]) -> list[str]:
    """The pairs whose search is not done, by name."""
    return [
        f"{contender.name} on {task.name}"
        for task, contender in plan.pairs()
        if choice(plan, task, contender, records) is None
    ]
