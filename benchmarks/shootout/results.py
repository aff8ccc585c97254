"""The records that a plan's present settings lead to, and what is asked of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from benchmarks.shootout.contenders import CLOCK, REFERENCE, UNTUNED, WITH_END, get_contender
from benchmarks.shootout.jobs import change_jobs, final_jobs, robust_jobs
from benchmarks.shootout.plan import Plan
from benchmarks.shootout.problem import TRAINING, VALIDATION
from benchmarks.shootout.running import Record
from benchmarks.shootout.scores import Goals, Outcome, Tracks, at_factors, by_pair, goal_of, outcomes, tracks
from benchmarks.shootout.tasks import get_task

AIMS = (TRAINING, VALIDATION)
Runs = Mapping[tuple[str, str], Sequence[Record]]


@dataclass(frozen=True)
class Results:
    """What a report is made of.

    Attributes:
        finals: for each aim the final runs at the setting chosen for it, by task and contender.
        factors: the runs by the factor of the learning rate, at the seeds of the robustness runs; empty without them.
        changes: the runs of untuned LODO with one thing changed, by the change.
    """

    plan: Plan
    records: Sequence[Record]
    finals: Mapping[str, Runs]
    factors: Mapping[float, Runs]
    changes: Mapping[str, Runs]

    @cached_property
    def tracks(self) -> dict[str, Tracks]:
        return {aim: tracks(runs, aim) for aim, runs in self.finals.items()}

    @property
    def tasks(self) -> list[str]:
        return [task for task in self.plan.tasks if any(task == pair[0] for pair in self.finals[TRAINING])]

    @property
    def contenders(self) -> list[str]:
        return [name for name in self.plan.contenders if any(name == pair[1] for pair in self.finals[TRAINING])]

    @property
    def untuned(self) -> list[str]:
        """LODO, and what runs with one setting on all tasks."""
        own = [name for name in self.contenders if get_contender(name).candidates]
        return [*(name for name in (UNTUNED, *WITH_END) if name in self.contenders), *own]

    @property
    def peers(self) -> list[str]:
        return [name for name in self.contenders if not name.startswith(UNTUNED)]

    def tasks_of(self, splits: Sequence[str]) -> list[str]:
        return [task for task in self.tasks if get_task(task).split in splits]

    def outcomes(
        self, name: str, tasks: Sequence[str], aim: str = TRAINING, goals: Goals | None = None
    ) -> dict[str, Outcome]:
        return outcomes(self.tracks[aim], name, tasks, goals or goal_of(REFERENCE), CLOCK)

    def against_reference(self, runs: Runs, name: str, tasks: Sequence[str]) -> dict[str, Outcome]:
        """Of other runs than the final ones, which set the goals."""
        finals = self.tracks[TRAINING]
        level = goal_of(REFERENCE)
        return outcomes(tracks(runs), name, tasks, lambda _, task: level(finals, task), CLOCK)


def collect(plan: Plan) -> Results:
    """Reads the records.

    Raises:
        ValueError: there is no final run at these settings.
    """
    records = plan.load()
    by_key = {record["key"]: record for record in records}
    finals = {
        aim: by_pair(by_key[job.key] for job in final_jobs(plan, records, (aim,)) if job.key in by_key) for aim in AIMS
    }
    robust = [by_key[job.key] for job in robust_jobs(plan, records) if job.key in by_key]
    if not finals[TRAINING]:
        raise ValueError(
            f"{plan.records_path} holds no final run for these settings: give the --trials, --steps and --lodo of the "
            "runs, or make them first"
        )
    changed = {
        name: by_pair(by_key[job.key] for job in jobs if job.key in by_key) for name, jobs in change_jobs(plan).items()
    }
    right = [run for own in finals[TRAINING].values() for run in own]
    return Results(plan, records, finals, at_factors(robust, right) if robust else {}, changed)
