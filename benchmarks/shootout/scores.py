"""Figures of merit: pure functions of the records. The protocol in benchmarks/README.md says the same in words.

The goal on a task is the tuned reference's final loss, the median over its seeds. A run reaches it at the first point
of its curve, a running mean, that is not above; the steps count relative to the reference's budget, the seconds
relative to the median of the reference's runs. A contender's figure on a task is the median over its seeds, a run that
never reaches the goal counting as infinite.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_high
from typing import Any

from benchmarks.shootout.running import Record

PENALTY = 2.0  # budgets that a task counts for whose goal is never reached
Runs = Mapping[tuple[str, str], Sequence[Record]]
"""The runs of each task and contender."""


def by_pair(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record["job"]["task"], record["job"]["contender"]), []).append(record)
    return found


def final_losses(runs: Sequence[Record]) -> list[float]:
    """The scores; infinite for runs that diverged."""
    return [math.inf if run["score"] is None else float(run["score"]) for run in runs]


def goal(runs: Sequence[Record]) -> float | None:
    """What is to be reached: the median of the reference's final losses, of an even number the higher one, so that the
    reference itself reaches it. None without runs, or if most diverged."""
    level = median_high(final_losses(runs)) if runs else math.inf
    return level if math.isfinite(level) else None


def reached_at(run: Record, level: float) -> tuple[float, float] | None:
    """Steps and seconds at which the run's curve first is at `level` or below; None: never.

    The score stands in for the last point, whose digits are rounded. A run that diverged reaches nothing.
    """
    if run["score"] is None:
        return None
    curve = run["curve"]
    losses = [*curve["loss"][:-1], run["score"]]
    for step, seconds, loss in zip(curve["step"], curve["seconds"], losses, strict=True):
        if loss is not None and loss <= level:
            return float(step), float(seconds)
    return None


@dataclass(frozen=True)
class Outcome:
    """How a contender did on one task.

    Attributes:
        loss, lowest, highest: median and range of the final losses over the seeds; infinite: diverged.
        steps, seconds: to the goal, relative to the reference; median over the seeds; infinite: not reached.
        cost: of a whole run in seconds, relative to the reference's; NaN without finished runs.
        diverged, runs: how many.
    """

    loss: float
    lowest: float
    highest: float
    steps: float
    seconds: float
    cost: float
    diverged: int
    runs: int

    @property
    def is_reached(self) -> bool:
        return self.steps <= 1

    def penalised(self, figure: float, whole: float) -> float:
        """`figure`, or where the goal was not reached `PENALTY` times a whole run, which is no shorter than the
        reference's."""
        return figure if math.isfinite(figure) else PENALTY * max(1.0, whole if math.isfinite(whole) else 1.0)


def outcome(runs: Sequence[Record], reference: Sequence[Record], level: float | None = None) -> Outcome | None:
    """None where there are no runs, or no goal: that which the reference sets, or `level`."""
    level = goal(reference) if level is None else level
    if not runs or not reference or level is None:
        return None
    losses = final_losses(runs)
    budget = median(run["job"]["steps"] for run in reference)
    time = median(run["seconds"] for run in reference if run["score"] is not None)
    at = [reached_at(run, level) or (math.inf, math.inf) for run in runs]
    whole = [run["seconds"] / time for run in runs if run["score"] is not None]
    return Outcome(
        loss=median(losses),
        lowest=min(losses),
        highest=max(losses),
        steps=median(steps for steps, _ in at) / budget,
        seconds=median(seconds for _, seconds in at) / time,
        cost=median(whole) if whole else math.nan,
        diverged=sum(run["score"] is None for run in runs),
        runs=len(runs),
    )


@dataclass(frozen=True)
class Summary:
    """A contender over several tasks.

    Attributes:
        tasks: on how many it ran where there is a goal; all that follows is over these.
        reached: on how many it got to the goal within the budget.
        steps, seconds: geometric means with the penalty; NaN without tasks.
        steps_if_reached, seconds_if_reached: the same over the tasks whose goal was reached, without a penalty.
        diverged: the share of the runs.
    """

    tasks: int
    reached: int
    steps: float
    seconds: float
    steps_if_reached: float
    seconds_if_reached: float
    diverged: float

    @property
    def share(self) -> float:
        return self.reached / self.tasks if self.tasks else math.nan


def geometric_mean(values: Iterable[float]) -> float:
    """NaN of no values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def summarise(outcomes: Iterable[Outcome]) -> Summary:
    every = list(outcomes)
    reached = [each for each in every if each.is_reached]
    runs = sum(each.runs for each in every)
    return Summary(
        tasks=len(every),
        reached=len(reached),
        steps=geometric_mean(each.penalised(each.steps, 1.0) for each in every),
        seconds=geometric_mean(each.penalised(each.seconds, each.cost) for each in every),
        steps_if_reached=geometric_mean(each.steps for each in reached),
        seconds_if_reached=geometric_mean(each.seconds for each in reached),
        diverged=sum(each.diverged for each in every) / runs if runs else math.nan,
    )


def outcomes(
    runs: Runs,
    reference: Runs,
    contender: str,
    tasks: Iterable[str],
    against: str,
    levels: Mapping[str, float] | None = None,
) -> dict[str, Outcome]:
    """A contender's outcomes on those of `tasks` where it ran and there is a goal: the one that `reference`'s runs of
    `against` set, or the task's of `levels`."""
    found = {
        task: outcome(runs.get((task, contender), ()), reference.get((task, against), ()), (levels or {}).get(task))
        for task in tasks
    }
    return {task: each for task, each in found.items() if each is not None}


def best_levels(runs: Runs, tasks: Iterable[str], contenders: Iterable[str]) -> dict[str, float]:
    """The lowest goal that one of the contenders sets on each task."""
    contenders = list(contenders)
    found = {task: [goal(runs.get((task, name), ())) for name in contenders] for task in tasks}
    levels = {task: [level for level in own if level is not None] for task, own in found.items()}
    return {task: min(own) for task, own in levels.items() if own}


def loss_ratio(changed: Mapping[str, Outcome], plain: Mapping[str, Outcome]) -> float:
    """Geometric mean of final losses over those of `plain`, on the tasks where both are finite and above zero."""
    pairs = [(changed[task].loss, plain[task].loss) for task in changed if task in plain]
    return geometric_mean(new / old for new, old in pairs if 0 < new < math.inf and 0 < old < math.inf)


def slowdown(wrong: Mapping[str, Outcome], right: Mapping[str, Outcome]) -> float:
    """How many times as many steps the goals take as with the right learning rate: the median over the tasks of both, a
    goal that is not reached counting as `PENALTY` budgets; NaN without tasks."""
    shared = [(wrong[task], right[task]) for task in wrong if task in right]
    ratios = [each.penalised(each.steps, 1.0) / other.penalised(other.steps, 1.0) for each, other in shared]
    return median(ratios) if ratios else math.nan


def profile(outcomes: Iterable[Outcome], axis: str) -> tuple[list[float], list[float]]:
    """The share of a contender's tasks whose goal is reached by a fraction of the budget: a staircase's corners.

    Args:
        axis: "steps" or "seconds".
    """
    every = [getattr(each, axis) for each in outcomes]
    at = sorted(value for value in every if math.isfinite(value))
    return at, [(number + 1) / len(every) for number in range(len(at))]


def at_factors(records: Sequence[Record], finals: Sequence[Record]) -> dict[float, Runs]:
    """The runs at each wrong learning rate and, as factor 1, the final runs at the same seeds."""
    seeds = {record["job"]["seed"] for record in records}
    found: dict[float, Any] = {1.0: by_pair(record for record in finals if record["job"]["seed"] in seeds)}
    for factor in sorted({record["job"]["factor"] for record in records}):
        found[factor] = by_pair(record for record in records if record["job"]["factor"] == factor)
    return dict(sorted(found.items()))
