"""The searches: a scan of the learning rate, then Optuna's tree-structured Parzen estimator.

A search has no state but its records. Trial k follows from the trials before it and from k alone, so a search that
was killed goes on exactly as if it had not been.
"""

import zlib
from collections.abc import Sequence

import optuna
from optuna.distributions import FloatDistribution

from benchmarks.shootout.contenders import Contender, fixed_options
from benchmarks.shootout.plan import TUNING_SEED, Plan, score_of, trials
from benchmarks.shootout.problem import Task
from benchmarks.shootout.running import TUNE, Job, Record

SCANNED = 0.45  # the share of the trials that scan the learning rate, the others' defaults beside it


def scan(contender: Contender, count: int) -> list[dict[str, float]]:
    """Where the first trials lie: learning rates in the middle of `count` equal parts of the range."""
    rate = contender.space["lr"]
    start = {name: each.start for name, each in contender.space.items()}
    ratio = rate.high / rate.low
    return [start | {"lr": rate.low * ratio ** ((number + 0.5) / count)} for number in range(count)]


def next_trial(plan: Plan, task: Task, contender: Contender, schedule: str, records: Sequence[Record]) -> Job | None:
    """The trial that this search wants next, None when it is done."""
    total = plan.trials_of(contender)
    done = trials(plan, task, contender, schedule, records)
    if len(done) >= total:
        return None
    number = next(each for each in range(total) if each >= len(done) or done[each]["job"]["trial"] != each)
    first = scan(contender, max(1, round(SCANNED * total)))
    place = first[number] if number < len(first) else _suggest(contender, done[:number], _seed(task, contender, number))
    values = {name: each.value(place[name]) for name, each in contender.space.items()}
    return Job(
        stage=TUNE,
        task=task.name,
        contender=contender.name,
        hyperparameters=fixed_options(contender.name, plan.recommended) | values,
        schedule=schedule,
        seed=TUNING_SEED,
        steps=plan.steps_of(task),
        trial=number,
        version=task.version,
    )


def _seed(task: Task, contender: Contender, number: int) -> int:
    return zlib.crc32(f"{task.name}/{contender.name}/{number}".encode())


def _suggest(contender: Contender, done: Sequence[Record], seed: int) -> dict[str, float]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {name: FloatDistribution(each.low, each.high, log=True) for name, each in contender.space.items()}
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=1)
    study = optuna.create_study(sampler=sampler)
    for record in done:
        values = record["job"]["hyperparameters"]
        # 1 - (1 - x) may lie a rounding outside of the range.
        place = {
            name: min(max(each.value(values[name]), each.low), each.high) for name, each in contender.space.items()
        }
        study.add_trial(optuna.trial.create_trial(params=place, distributions=dict(space), value=score_of(record)))
    return dict(study.ask(dict(space)).params)
