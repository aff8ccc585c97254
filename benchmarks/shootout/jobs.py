"""The runs that a report is made of, at the settings that were chosen."""

from collections.abc import Sequence

from benchmarks.shootout.changes import CHANGES
from benchmarks.shootout.choosing import Chosen, choice, shortlist
from benchmarks.shootout.contenders import REFERENCE, UNTUNED, Contender
from benchmarks.shootout.plan import CHANGE_SEED, Plan
from benchmarks.shootout.problem import TRAINING, VALIDATION, Task
from benchmarks.shootout.running import CHANGE, CONFIRM, FINAL, ROBUST, Job, Record
from benchmarks.shootout.tasks import get_task

FACTORS = (0.01, 0.1, 10.0, 100.0)  # by which the learning rate is off in the stage `robust`


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


def left_out(plan: Plan, stage: str, records: Sequence[Record]) -> list[str]:
    """The pairs for whose runs in this stage an earlier stage is missing, by name."""
    return [
        f"{contender.name} on {task.name}"
        for task, contender in plan.pairs()
        if _is_left_out(plan, task, contender, stage, records)
    ]


def _is_left_out(plan: Plan, task: Task, contender: Contender, stage: str, records: Sequence[Record]) -> bool:
    if stage == CONFIRM:
        return bool(contender.space) and shortlist(plan, task, contender, records, TRAINING) is None
    aims = task.aims if stage == FINAL else (TRAINING,)
    return any(choice(plan, task, contender, records, aim) is None for aim in aims)
