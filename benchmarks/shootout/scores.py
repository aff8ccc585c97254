"""Figures of merit: pure functions of the records. The protocol in benchmarks/README.md says the same in words.

A goal on a task is a loss, training or validation, that some contender ends at: the median over its seeds. A run
reaches it at the first point of its curve that is not above; the steps count relative to the task's budget, the seconds
relative to a run of fused AdamW. A contender's figure on a task is the median over its seeds, a run that never reaches
the goal counting as infinite.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_high
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.shootout.problem import TRAINING
from benchmarks.shootout.running import Record, score_of
from benchmarks.shootout.tasks import get_task

PENALTY = 2.0  # budgets that a task counts for whose goal is never reached
TAU = 4.0  # times the fastest contender's steps or seconds, where a profile ends
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Track:
    """What of a run counts for one aim.

    Attributes:
        final: the loss at the end; infinite where the run diverged.
        accuracy: at the end, where it is known.
        steps, seconds: where the loss was taken, steps as a share of the budget; no points where the run diverged.
        lowest: the lowest loss up to there.
        whole: the seconds of all steps.
    """

    final: float
    accuracy: float | None
    steps: Floats
    seconds: Floats
    lowest: Floats
    whole: float

    def reached_at(self, level: float) -> tuple[float, float]:
        """Steps and seconds at the first point at `level` or below; infinite: never."""
        place = int(np.searchsorted(-self.lowest, -level))
        return (
            (float(self.steps[place]), float(self.seconds[place])) if place < len(self.steps) else (math.inf, math.inf)
        )


def track(record: Record, aim: str = TRAINING) -> Track:
    """The score stands in for the last point of the training curve, whose digits are rounded."""
    curve = record["curve"] if aim == TRAINING else record["validation"]
    if record["score"] is None:
        nothing = np.array([])
        return Track(math.inf, None, nothing, nothing, nothing, record["seconds"])
    losses = [math.inf if loss is None else loss for loss in curve["loss"]]
    if aim == TRAINING:
        losses[-1] = score_of(record)
    return Track(
        final=score_of(record, aim),
        accuracy=None if aim == TRAINING else curve["accuracy"][-1],
        steps=np.array(curve["step"], dtype=float) / record["job"]["steps"],
        seconds=np.array(curve["seconds"], dtype=float),
        lowest=np.minimum.accumulate(np.array(losses, dtype=float)),
        whole=record["seconds"],
    )


Tracks = Mapping[tuple[str, str], Sequence[Track]]
"""The final runs of each task and contender, for one aim."""


def by_pair(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record["job"]["task"], record["job"]["contender"]), []).append(record)
    return found


def tracks(runs: Mapping[tuple[str, str], Sequence[Record]], aim: str = TRAINING) -> dict[tuple[str, str], list[Track]]:
    """Of those that have the aim's data."""
    usable = {pair: [run for run in own if aim == TRAINING or _is_validated(run)] for pair, own in runs.items()}
    return {pair: [track(run, aim) for run in own] for pair, own in usable.items() if own}


def _is_validated(run: Record) -> bool:
    """Or would have been, had it not diverged before."""
    return run["validation"] is not None or (run["score"] is None and get_task(run["job"]["task"]).is_validated)


def goal(runs: Sequence[Track]) -> float | None:
    """What is to be reached: the median of the final losses, of an even number the higher one, so that the contender
    itself reaches it. None without runs, or if most diverged."""
    level = median_high(run.final for run in runs) if runs else math.inf
    return level if math.isfinite(level) else None


Goals = Callable[[Tracks, str], float | None]
"""The goal on a task, from the tracks; None: there is none."""


def goal_of(contender: str) -> Goals:
    """What one contender ends at."""
    return lambda found, task: goal(found.get((task, contender), ()))


def best_goal(contenders: Iterable[str]) -> Goals:
    """The lowest that one of the contenders sets."""
    names = list(contenders)

    def best(found: Tracks, task: str) -> float | None:
        levels = [goal(found.get((task, name), ())) for name in names]
        return min((level for level in levels if level is not None), default=None)

    return best


@dataclass(frozen=True)
class Outcome:
    """How a contender did on one task.

    Attributes:
        loss: median of the final losses over the seeds; infinite: diverged.
        ends_below: it is not above the goal.
        steps: to the goal, as a share of the budget; median over the seeds; infinite: not reached.
        seconds: the same, relative to a run of the clock's contender.
        cost: of a whole run in seconds, relative to the same; NaN without finished runs.
        diverged, runs: how many.
    """

    loss: float
    ends_below: bool
    steps: float
    seconds: float
    cost: float
    diverged: int
    runs: int

    @property
    def is_reached(self) -> bool:
        return self.steps <= 1

    def penalised(self, axis: str) -> float:
        """Steps or seconds, or where the goal was not reached `PENALTY` times a whole run, which in seconds is no
        shorter than the clock's."""
        figure: float = getattr(self, axis)
        if math.isnan(figure):
            return figure  # seconds without a clock
        whole = self.cost if axis == "seconds" and math.isfinite(self.cost) else 1.0
        return figure if math.isfinite(figure) else PENALTY * max(1.0, whole)


def outcome(runs: Sequence[Track], level: float | None, clock: Sequence[Track]) -> Outcome | None:
    """None where there are no runs, or no goal.

    Args:
        clock: the runs whose time is the unit of seconds; without any, seconds are NaN.
    """
    if not runs or level is None:
        return None
    done = [run.whole for run in clock if len(run.steps)]
    unit = median(done) if done else math.nan
    at = [run.reached_at(level) for run in runs]
    costs = [run.whole / unit for run in runs if len(run.steps)]
    return Outcome(
        loss=(loss := median(run.final for run in runs)),
        ends_below=loss <= level,
        steps=median(steps for steps, _ in at),
        seconds=median(seconds for _, seconds in at) / unit,
        cost=median(costs) if costs else math.nan,
        diverged=sum(not len(run.steps) for run in runs),
        runs=len(runs),
    )


def outcomes(found: Tracks, contender: str, tasks: Iterable[str], goals: Goals, clock: str) -> dict[str, Outcome]:
    """A contender's outcomes on those of `tasks` where it ran and there is a goal."""
    every = {
        task: outcome(found.get((task, contender), ()), goals(found, task), found.get((task, clock), ()))
        for task in tasks
    }
    return {task: each for task, each in every.items() if each is not None}


@dataclass(frozen=True)
class Summary:
    """A contender over several tasks.

    Attributes:
        tasks: on how many it ran where there is a goal; all that follows is over these.
        reached: on how many it got to the goal within the budget.
        ends_below: on how many its final loss is not above the goal.
        steps, seconds: geometric means with the penalty; NaN without tasks.
        diverged: the share of the runs.
    """

    tasks: int
    reached: int
    ends_below: int
    steps: float
    seconds: float
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
    runs = sum(each.runs for each in every)
    return Summary(
        tasks=len(every),
        reached=sum(each.is_reached for each in every),
        ends_below=sum(each.ends_below for each in every),
        steps=geometric_mean(each.penalised("steps") for each in every),
        seconds=geometric_mean(each.penalised("seconds") for each in every),
        diverged=sum(each.diverged for each in every) / runs if runs else math.nan,
    )


def ratios(every: Mapping[str, Mapping[str, Outcome]], axis: str) -> dict[str, list[float]]:
    """Each contender's steps or seconds to the goals over the fastest one's, on the tasks where it ran (AlgoPerf, Dahl
    et al. 2023, section 4.5); infinite where it does not reach the goal."""
    tasks = dict.fromkeys(task for own in every.values() for task in own)
    fastest = {
        task: min(
            getattr(own[task], axis) if own[task].is_reached else math.inf for own in every.values() if task in own
        )
        for task in tasks
    }
    return {
        name: [getattr(each, axis) / fastest[task] if each.is_reached else math.inf for task, each in own.items()]
        for name, own in every.items()
    }


def profile_score(found: Sequence[float]) -> float:
    """The integral of the performance profile over tau from 1 to `TAU`, as a share of what a contender has that is the
    fastest on all tasks; NaN without tasks."""
    return float(np.mean(np.maximum(0.0, TAU - np.array(found)) / (TAU - 1))) if found else math.nan


def profile(found: Sequence[float]) -> tuple[list[float], list[float]]:
    """The share of a contender's tasks whose ratio is at most tau: a staircase's corners."""
    at = sorted(ratio for ratio in found if math.isfinite(ratio))
    return at, [(number + 1) / len(found) for number in range(len(at))]


def loss_ratio(changed: Mapping[str, Outcome], plain: Mapping[str, Outcome]) -> float:
    """Geometric mean of final losses over those of `plain`, on the tasks where both are finite and above zero."""
    pairs = [(changed[task].loss, plain[task].loss) for task in changed if task in plain]
    return geometric_mean(new / old for new, old in pairs if 0 < new < math.inf and 0 < old < math.inf)


def slowdown(wrong: Mapping[str, Outcome], right: Mapping[str, Outcome]) -> float:
    """How many times as many steps the goals take as with the right learning rate: the median over the tasks of both, a
    goal that is not reached counting as `PENALTY` budgets; NaN without tasks."""
    shared = [(wrong[task], right[task]) for task in wrong if task in right]
    found = [each.penalised("steps") / other.penalised("steps") for each, other in shared]
    return median(found) if found else math.nan


def at_factors(records: Sequence[Record], finals: Sequence[Record]) -> dict[float, dict[tuple[str, str], list[Record]]]:
    """The runs at each wrong learning rate and, as factor 1, the final runs at the same seeds."""
    seeds = {record["job"]["seed"] for record in records}
    found: dict[float, Any] = {1.0: by_pair(record for record in finals if record["job"]["seed"] in seeds)}
    for factor in sorted({record["job"]["factor"] for record in records}):
        found[factor] = by_pair(record for record in records if record["job"]["factor"] == factor)
    return dict(sorted(found.items()))
