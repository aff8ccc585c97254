"""With which settings final runs are made: of the best trials those that prove good at further seeds, or the best of a
few candidates for all tasks.

The lowest of dozens of losses at one seed is in part luck, above all where few held-out data are noisy. So the best
trials run again at `CONFIRMING_SEEDS`, where none of them was chosen, and these runs alone decide.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from benchmarks.shootout.contenders import Contender, fixed_options, get_contender
from benchmarks.shootout.plan import CONFIRMING_SEEDS, TUNING_SEED, Plan, search_of, trials
from benchmarks.shootout.problem import TRAINING, VALIDATION, Task
from benchmarks.shootout.running import CALIBRATE, CONFIRM, Job, Record, score_of, without_schedule
from benchmarks.shootout.tasks import TASKS, get_task

CONFIRMED = {TRAINING: 3, VALIDATION: 5}  # trials that run again for each aim; training losses are means, less noisy
GAIN = 0.01
WORST = 10.0  # times the lowest loss on a task, that a candidate for all tasks may lose there
TINY = 1e-300


@dataclass(frozen=True)
class Chosen:
    """What final runs are made with."""

    hyperparameters: Mapping[str, Any]
    schedule: str


def choice(
    plan: Plan, task: Task, contender: Contender, records: Sequence[Record], aim: str = TRAINING
) -> Chosen | None:
    """The setting of the final runs for an aim; None while that is not known yet.

    Of a searched contender that with the lowest geometric mean of the losses at the confirming seeds. An option that
    costs much is taken only if the loss is lower by more than the share `GAIN`. Where every trial diverged it is the
    first one.
    """
    if contender.candidates:
        return calibrated(plan, contender, records, aim)
    if not contender.space:
        return Chosen(fixed_options(contender.name, plan.recommended), contender.schedule)
    found = shortlist(plan, task, contender, records, aim)
    if found is None:
        return None
    if len(found) == 1:
        return found[0]
    by_key = {record["key"]: record for record in records if record["job"]["stage"] == CONFIRM}
    losses = [
        [by_key[job.key] for job in _at_seeds(plan, task, contender, chosen) if job.key in by_key] for chosen in found
    ]
    if any(len(own) < len(CONFIRMING_SEEDS) for own in losses):
        return None
    costs = [fmean(math.log(max(score_of(record, aim), TINY)) for record in own) for own in losses]
    for number, chosen in enumerate(found):
        if contender.afterwards.keys() & chosen.hyperparameters.keys():
            costs[number] -= math.log(1 - GAIN)
    return found[costs.index(min(costs))]


def shortlist(plan: Plan, task: Task, contender: Contender, records: Sequence[Record], aim: str) -> list[Chosen] | None:
    """The settings that run again: the best trials, those with options that cost much, and where a relative runs with
    one setting on all tasks that setting, best first. None while the search is not done."""
    done = trials(plan, task, contender, records)
    if not search_of(plan, task, contender).is_done(done):
        return None
    best = sorted(done, key=partial(score_of, aim=aim))
    cheap = [each for each in best if not contender.afterwards.keys() & each["job"]["hyperparameters"].keys()]
    found = [each for each in best if each in cheap[: CONFIRMED[aim]] or each not in cheap]
    finite = [each for each in found if math.isfinite(score_of(each, aim))] or done[:1]
    settings = [Chosen(each["job"]["hyperparameters"], each["job"]["schedule"]) for each in finite]
    if contender.relative and (known := calibrated(plan, get_contender(contender.relative), records, aim)):
        settings.append(known)
    return [setting for number, setting in enumerate(settings) if setting not in settings[:number]]


def confirmation_jobs(plan: Plan, records: Sequence[Record]) -> list[Job]:
    """The runs of all shortlists at the confirming seeds, for pairs whose search is done; each once."""
    jobs = [
        job
        for task, contender in plan.pairs()
        if contender.space
        for aim in task.aims
        if len(found := shortlist(plan, task, contender, records, aim) or []) > 1
        for chosen in found
        for job in _at_seeds(plan, task, contender, chosen)
    ]
    return list({job.key: job for job in jobs}.values())


def _at_seeds(plan: Plan, task: Task, contender: Contender, chosen: Chosen) -> list[Job]:
    return [
        Job(
            stage=CONFIRM,
            task=task.name,
            contender=contender.name,
            hyperparameters=chosen.hyperparameters,
            schedule=chosen.schedule,
            seed=seed,
            steps=plan.steps_of(task),
            version=task.version,
        )
        for seed in CONFIRMING_SEEDS
    ]


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
            hyperparameters=without_schedule(candidate),
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
    return Chosen(without_schedule(best), best["schedule"])
