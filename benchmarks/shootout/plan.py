"""The plan of a command, and the trials of its searches.

A contender is tuned with two aims: the training loss, which is that of the last tenth of the steps, and the loss on
held-out data at the end. Each has its own setting, and its own final runs where the settings differ.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from benchmarks.environment import source_hash
from benchmarks.shootout.bootstrap import DRAWS
from benchmarks.shootout.contenders import (
    CLOCK,
    RECOMMENDED,
    TUNED,
    UNTUNED,
    WITH_END,
    Contender,
    fixed_options,
    get_contender,
)
from benchmarks.shootout.problem import SELECTING, Task
from benchmarks.shootout.running import TUNE, Job, Record, without_schedule
from benchmarks.shootout.tasks import get_task
from benchmarks.shootout.tuning import Search
from examples.paper.runs import read_results

TUNING_SEED = SELECTING
"""Of all trials and of the candidates for all tasks: on the same batches they differ by their settings alone."""
CHANGE_SEED = SELECTING + 1
"""Of the runs with one thing changed, by which defaults may be chosen."""
CONFIRMING_SEEDS = ((SELECTING + 2, SELECTING + 3), (SELECTING + 4, SELECTING + 5))
"""Of the runs that choose among the best trials, and of those that choose among the best of these."""


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
        """The records in the file, and in a packed one beside it (.xz), to which nothing is added; of each run the last
        one."""
        path = self.records_path
        found = [*read_results(path.with_name(path.name + ".xz")), *read_results(path)]
        latest = {record["key"]: record for record in found}.values()
        own = [record for record in latest if "validation" in record]  # others are of a protocol before this one
        return [record for record in own if not (self.redoes and is_outdated(record))]


def is_outdated(record: Record) -> bool:
    """LODO's, made with other code than the present one, and the clock's that were made with LODO's."""
    is_remade = record["job"]["contender"] in (UNTUNED, *WITH_END, TUNED, CLOCK)
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
        hyperparameters=fixed_options(contender.name, plan.recommended) | without_schedule(setting),
        schedule=setting.get("schedule", contender.schedule),
        seed=TUNING_SEED,
        steps=plan.steps_of(task),
        trial=len(done),
        version=task.version,
    )
