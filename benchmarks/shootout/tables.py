"""The tables of a report."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.shootout.bootstrap import intervals
from benchmarks.shootout.changes import CHANGES, NOTHING_CHANGED
from benchmarks.shootout.choosing import choice
from benchmarks.shootout.contenders import CLOCK, CONTENDERS, REFERENCE, UNTUNED, get_contender
from benchmarks.shootout.problem import TRAINING, VALIDATION
from benchmarks.shootout.results import AIMS, Results
from benchmarks.shootout.scores import (
    Goals,
    Outcome,
    Summary,
    Track,
    Tracks,
    best_goal,
    goal,
    goal_of,
    loss_ratio,
    outcomes,
    profile_score,
    ratios,
    slowdown,
    summarise,
)
from benchmarks.shootout.spaces import Range
from benchmarks.shootout.tasks import get_task
from examples.paper.records import NOTHING, number, table

SPLITS = {
    "all tasks": ("choose", "hold out", "fresh", "sealed"),
    "to choose on": ("choose",),
    "held out": ("hold out",),
    "fresh": ("fresh",),
    "sealed": ("sealed",),
}
FAMILY = (
    "Prodigy",
    "schedule-free AdamW",
    "AdEMAMix",
    *(name for name in CONTENDERS if get_contender(name).candidates),
)
"""Adam's relatives, tuned or not."""
LEAD = 0.95  # a member of Adam's family below this share of AdamW's loss says that AdamW's search was too weak


def percent(share: float) -> str:
    return NOTHING if math.isnan(share) else f"{100 * share:.0f} %"


def figures_of(found: Tracks, tasks: Sequence[str], names: Sequence[str], goals: Goals) -> dict[str, float]:
    """All figures of a standing, by contender and column."""
    every = {name: outcomes(found, name, tasks, goals, CLOCK) for name in names}
    by_axis = {axis: ratios(every, axis) for axis in ("steps", "seconds")}
    figures: dict[str, float] = {}
    for name, own in every.items():
        summary = summarise(own.values())
        figures |= {f"{name}/reached": summary.share, f"{name}/diverged": summary.diverged}
        for axis, found_ratios in by_axis.items():
            figures[f"{name}/{axis}"] = getattr(summary, axis)
            figures[f"{name}/profile {axis}"] = profile_score(found_ratios[name])
    return figures


def standing(results: Results, aim: str, names: Sequence[str], goals: Goals, tasks: Sequence[str]) -> str:
    """Who reaches the goals, and how soon, with bootstrap intervals. Who ran on fewer than half of the tasks is left
    out."""
    found = results.tracks[aim]
    most = max((sum((task, name) in found for task in tasks) for name in names), default=0)
    names = [name for name in names if 2 * sum((task, name) in found for task in tasks) >= max(1, most)]
    whole = figures_of(found, tasks, names, goals)
    ends = intervals(found, tasks, lambda some, own: figures_of(some, own, names, goals), results.plan.draws)

    def cell(name: str, column: str) -> str:
        value, around = whole[f"{name}/{column}"], ends.get(f"{name}/{column}")
        if math.isnan(value):
            return NOTHING
        return number(value, 2) + (f" ({number(around[0], 2)} to {number(around[1], 2)})" if around else "")

    lines = []
    for name in names:
        summary = summarise(outcomes(found, name, tasks, goals, CLOCK).values())
        around = ends.get(f"{name}/reached")
        spread = f" ({percent(around[0])[:-2]} to {percent(around[1])})" if around else ""
        shown = [cell(name, column) for column in ("steps", "seconds", "profile steps", "profile seconds")]
        reached = f"{summary.reached} of {summary.tasks}{spread}"
        lines.append([name, reached, str(summary.ends_below), *shown, percent(summary.diverged)])
    columns = ("reached", "ends below", "steps", "seconds", "profile, steps", "profile, seconds", "diverged")
    return table(("", *columns), lines)


def by_split(results: Results, aim: str, names: Sequence[str], goals: Goals) -> str:
    """The same in brief, by the splits of the tasks."""
    splits = {title: tasks for title, splits in SPLITS.items() if (tasks := results.tasks_of(splits))}
    lines = []
    for name in names:
        summaries = [summarise(results.outcomes(name, tasks, aim, goals).values()) for tasks in splits.values()]
        lines.append([name, *map(_brief, summaries)])
    return table(("", *splits), lines)


def _brief(summary: Summary) -> str:
    return f"{summary.reached} of {summary.tasks}; {number(summary.steps, 2)}" if summary.tasks else NOTHING


def reached_goals(results: Results, named: Mapping[str, Goals]) -> str:
    """On how many tasks each LODO reaches each goal, by either aim."""
    lines = []
    for title, goals in named.items():
        cells = []
        for name in (name for name in results.contenders if name.startswith(UNTUNED)):
            for aim in AIMS:
                summary = summarise(results.outcomes(name, results.tasks, aim, goals).values())
                cells.append(_brief(summary))
        lines.append([title, *cells])
    names = [name for name in results.contenders if name.startswith(UNTUNED)]
    return table(("goal", *(f"{name}: {aim}" for name in names for aim in AIMS)), lines)


def goals_before(results: Results, before: Mapping[str, float]) -> str:
    """The goals of the comparison before this one beside the present ones."""
    finals = results.tracks[TRAINING]
    best = best_goal(results.peers)
    lines = []
    for task in (task for task in results.tasks if task in before):
        own, now, lowest = (level(finals, task) for level in (goal_of(UNTUNED), goal_of(REFERENCE), best))
        levels = (before[task], now, lowest)
        told = [NOTHING if level is None else number(level, 3) for level in (*levels, own)]
        ratio = NOTHING if now is None else number(now / before[task], 3)
        marks = [NOTHING if own is None or level is None else "yes" if own <= level else "no" for level in levels]
        lines.append([task, *told[:2], ratio, *told[2:], *marks])
    header = (
        "task",
        "before",
        "now",
        "ratio",
        "best of all peers",
        "untuned LODO",
        "ends below: before",
        "now",
        "best",
    )
    return table(header, lines)


def family(results: Results, aim: str) -> str:
    """Final losses of Adam's relatives over tuned AdamW's."""
    finals = results.tracks[aim]
    names = [name for name in FAMILY if name in results.contenders]

    def cell(task: str, name: str) -> str:
        levels = [goal(finals.get((task, each), ())) for each in (name, REFERENCE)]
        if None in levels:
            return NOTHING
        ratio = levels[0] / levels[1]  # type: ignore[operator]
        return f"**{number(ratio, 3)}**" if ratio < LEAD else number(ratio, 3)

    tasks = [task for task in results.tasks if (task, REFERENCE) in finals]
    return table(("task", *names), [[task, *(cell(task, name) for name in names)] for task in tasks])


def by_factor(results: Results) -> dict[str, dict[float, Summary]]:
    """The contenders that were run with a wrong learning rate, by the rate's factor."""
    return {
        name: {
            factor: summarise(results.against_reference(runs, name, results.tasks).values())
            for factor, runs in results.factors.items()
        }
        for name in _with_wrong_rates(results)
    }


def _with_wrong_rates(results: Results) -> list[str]:
    wrong = [runs for factor, runs in results.factors.items() if factor != 1]
    return [name for name in results.contenders if any(pair[1] == name for runs in wrong for pair in runs)]


def robustness(results: Results, tasks: Sequence[str]) -> str:
    def cell(name: str, factor: float) -> str:
        found = results.against_reference(results.factors[factor], name, tasks)
        right = results.against_reference(results.factors[1.0], name, tasks)
        summary = summarise(found.values())
        slower = number(slowdown(found, right), 3)
        return f"{summary.reached} of {summary.tasks}; {slower}; {percent(summary.diverged)}"

    lines = [[name, *(cell(name, factor) for factor in results.factors)] for name in _with_wrong_rates(results)]
    return table(("", *(f"lr x {factor:g}" for factor in results.factors)), lines)


def changes(results: Results, splits: Sequence[str]) -> str:
    tasks, lines = results.tasks_of(splits), []
    plain = _changed(results, NOTHING_CHANGED, tasks)
    for name, change in CHANGES.items():
        if name == NOTHING_CHANGED or tuple(splits) == tuple(change.splits):
            found = _changed(results, name, tasks)
            ratio = loss_ratio(found, plain)
            told = NOTHING if math.isnan(ratio) else number(ratio, 3)
            summary = summarise(found.values())
            lines.append([name, f"{summary.reached} of {summary.tasks}", number(summary.steps, 2), told])
    return table(("", "reached", "steps", "loss"), lines)


def _changed(results: Results, name: str, tasks: Sequence[str]) -> dict[str, Outcome]:
    return results.against_reference(results.changes[name], UNTUNED, tasks)


def losses(results: Results, aim: str) -> str:
    """Final losses, and accuracies where there are any."""
    found = results.tracks[aim]
    lines = []
    for task in results.tasks:
        own = {name: found.get((task, name), ()) for name in results.contenders}
        if any(own.values()):
            best = min(median(run.final for run in runs) for runs in own.values() if runs)
            cells = [_loss_cell(runs, best) for runs in own.values()]
            lines.append([task, get_task(task).kind, get_task(task).split, *cells])
    return table(("task", "kind", "", *results.contenders), lines, left=3)


def _loss_cell(runs: Sequence[Track], best: float) -> str:
    if not runs:
        return NOTHING
    level = median(run.final for run in runs)
    if not math.isfinite(level):
        return "diverged"
    text = f"**{number(level, 3)}**" if level == best else number(level, 3)
    ends = [run.final for run in runs if math.isfinite(run.final)]
    gone = len(runs) - len(ends)
    spread = f" ({number(min(ends), 3)} to {number(max(ends), 3)})" if len(ends) > 1 else ""
    rates = [run.accuracy for run in runs if run.accuracy is not None]
    accuracy = f"; {100 * median(rates):.1f} %" if rates else ""
    return text + spread + accuracy + (f", {gone} diverged" if gone else "")


def seconds(results: Results) -> str:
    def cell(task: str, name: str) -> str:
        done = [run for run in results.finals[TRAINING].get((task, name), ()) if run["score"] is not None]
        if not done:
            return NOTHING
        share = median(run["optimizer_seconds"] / max(run["seconds"], 1e-9) for run in done)
        return f"{number(median(run['seconds'] for run in done), 3)} ({percent(share)})"

    lines = [
        [task, f"{results.plan.steps_of(get_task(task)):,}", *(cell(task, name) for name in results.contenders)]
        for task in results.tasks
    ]
    return table(("task", "steps", *results.contenders), lines)


def settings(results: Results, aim: str) -> str:
    """What was chosen; for what has one setting, once."""
    lines = []
    for name in results.contenders:
        contender = get_contender(name)
        for task in results.tasks if contender.space else results.tasks[:1]:
            if aim == VALIDATION and contender.space and not get_task(task).is_validated:
                continue
            chosen = choice(results.plan, get_task(task), contender, results.records, aim)
            if chosen and (contender.space or contender.candidates):
                place = task if contender.space else "all"
                lines.append([name, place, chosen.schedule, _values(contender.space, chosen.hyperparameters)])
    return table(("contender", "task", "schedule", "hyperparameters"), lines, left=4)


def _values(space: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    told = []
    for name, value in values.items():
        if name in space or not space:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            each = space.get(name)
            mark = "*" if isinstance(each, Range) and each.end_of(value) else ""
            told.append(f"{name} {format(value, '.4g') if is_number else value}{mark}")
    return ", ".join(told)
