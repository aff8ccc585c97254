"""With which settings final runs are made: of the best trials those that prove good at further seeds, or the best of a
few candidates for all tasks.

The lowest of dozens of losses at one seed is in part luck, above all where few held-out data are noisy. So the best
trials run again at two of the `CONFIRMING_SEEDS`, where none of them was chosen, then the best of these at two more,
and these runs alone decide.
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
FINALISTS = 2  # of these, that run once more
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
    costs much is taken only if it lowers the loss by more than the share `GAIN`. Where every trial diverged it is the
    first one.
    """
    if contender.candidates:
        return calibrated(plan, contender, records, aim)
    if not contender.space:
        return Chosen(fixed_options(contender.name, plan.recommended), contender.schedule)
    rounds = _rounds(plan, task, contender, records, aim)
    if rounds is None:
        return None
    return rounds[-1][0] if len(rounds[-1]) == 1 else None


def _rounds(
    plan: Plan, task: Task, contender: Contender, records: Sequence[Record], aim: str
) -> list[list[Chosen]] | None:
    """Who runs at the first of the confirming seeds, who of these at the next, and so on, up to the round whose runs
    are missing, or to the one that is chosen. None while the search is not done."""
    found = shortlist(plan, task, contender, records, aim)
    if found is None:
        return None
    rounds, by_key = [found], {record["key"]: record for record in records if record["job"]["stage"] == CONFIRM}
    seeds: tuple[int, ...] = ()
    for number, more in enumerate(CONFIRMING_SEEDS):
        if len(rounds[-1]) == 1:
            break
        seeds += more
        costs = [_cost(plan, task, contender, chosen, seeds, by_key, aim) for chosen in rounds[-1]]
        known = [(cost, place) for place, cost in enumerate(costs) if cost is not None]
        if len(known) < len(costs):
            break
        is_last = number == len(CONFIRMING_SEEDS) - 1
        rounds.append([rounds[-1][place] for _, place in sorted(known)[: 1 if is_last else FINALISTS]])
    return rounds


def _cost(
    plan: Plan,
    task: Task,
    contender: Contender,
    chosen: Chosen,
    seeds: Sequence[int],
    by_key: Mapping[str, Record],
    aim: str,
) -> float | None:
    """The mean logarithm of the losses at some seeds, with a handicap for options that cost much; None if some run is
    missing."""
    keys = [job.key for job in _at_seeds(plan, task, contender, chosen, seeds)]
    if any(key not in by_key for key in keys):
        return None
    cost = fmean(math.log(max(score_of(by_key[key], aim), TINY)) for key in keys)
    return cost - math.log(1 - GAIN) if contender.afterwards.keys() & chosen.hyperparameters.keys() else cost


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
    """The runs of all shortlists at the first of the confirming seeds, and of the best of these at the next, as far as
    they are known; each once."""
    jobs = [
        job
        for task, contender in plan.pairs()
        if contender.space
        for aim in task.aims
        for found, seeds in zip(_rounds(plan, task, contender, records, aim) or [], CONFIRMING_SEEDS, strict=False)
        if len(found) > 1
        for chosen in found
        for job in _at_seeds(plan, task, contender, chosen, seeds)
    ]
    return list({job.key: job for job in jobs}.values())


def _at_seeds(plan: Plan, task: Task, contender: Contender, chosen: Chosen, seeds: Sequence[int]) -> list[Job]:
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
        for seed in seeds
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
