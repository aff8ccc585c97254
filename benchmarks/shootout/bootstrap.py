"""Intervals for figures over tasks: the tasks, and the seeds of each pair, are drawn again with replacement.

A percentile bootstrap in two stages (Efron and Tibshirani 1993, chapters 8 and 13): the tasks stand for tasks that
might have been chosen, the seeds for runs that might have been made. The goals are taken anew from the seeds drawn.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.shootout.scores import Tracks

DRAWS = 1000
LEVEL = 0.9  # of the intervals: from the 5th to the 95th percentile

Statistic = Callable[[Tracks, Sequence[str]], Mapping[str, float]]
"""Figures by name, of the tracks of some tasks; a task may be there several times, under names of its own."""


def resampled(found: Tracks, tasks: Sequence[str], random: np.random.Generator) -> tuple[Tracks, list[str]]:
    """One draw. The n-th of its tasks is called n."""
    picks = [tasks[place] for place in random.integers(len(tasks), size=len(tasks))]
    names = [str(number) for number in range(len(picks))]
    own: dict[str, list[str]] = {}
    for task, contender in found:
        own.setdefault(task, []).append(contender)
    drawn = {}
    for name, task in zip(names, picks, strict=True):
        for contender in own.get(task, ()):
            runs = found[task, contender]
            drawn[name, contender] = [runs[place] for place in random.integers(len(runs), size=len(runs))]
    return drawn, names


def intervals(
    found: Tracks, tasks: Sequence[str], statistic: Statistic, draws: int = DRAWS, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """The interval of each figure; a figure that is NaN in a draw is left out of that draw."""
    random = np.random.default_rng(seed)
    values: dict[str, list[float]] = {}
    for _ in range(draws if tasks else 0):
        for name, value in statistic(*resampled(found, tasks, random)).items():
            if not np.isnan(value):
                values.setdefault(name, []).append(value)
    low, high = 50 * (1 - LEVEL), 100 - 50 * (1 - LEVEL)
    return {name: (float(np.percentile(own, low)), float(np.percentile(own, high))) for name, own in values.items()}
