"""Writes report.md and its pictures from the records alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.shootout import pictures
from benchmarks.shootout.changes import CHANGES, EVERYWHERE, NOTHING_CHANGED
from benchmarks.shootout.contenders import RECOMMENDED, REFERENCE, UNTUNED, Contender, fixed_options, get_contender
from benchmarks.shootout.plan import CHANGE_SEED, Plan, change_jobs, choice, final_jobs, load, robust_jobs
from benchmarks.shootout.running import PACKAGES, Record
from benchmarks.shootout.scores import (
    PENALTY,
    Outcome,
    Runs,
    Summary,
    at_factors,
    best_levels,
    by_pair,
    loss_ratio,
    outcomes,
    slowdown,
    summarise,
)
from benchmarks.shootout.tasks import get_task
from examples.paper.records import NOTHING, number, table, whole

EDGE = 1.1  # a tuned value within this factor of its range's end is marked
SPLITS = {
    "all tasks": ("choose", "hold out", "fresh"),
    "the tasks to choose on": ("choose",),
    "held out": ("hold out",),
    "fresh": ("fresh",),
}


@dataclass(frozen=True)
class Results:
    """The records that the plan's present settings lead to.

    Attributes:
        finals: the final runs by task and contender.
        factors: the runs by the factor of the learning rate, at the seeds of the robustness runs; empty without them.
        changes: the runs of untuned LODO with one thing changed, by the change.
    """

    plan: Plan
    records: Sequence[Record]
    finals: Runs
    factors: Mapping[float, Runs]
    changes: Mapping[str, Runs]

    @property
    def tasks(self) -> list[str]:
        return [task for task in self.plan.tasks if any(task == pair[0] for pair in self.finals)]

    @property
    def contenders(self) -> list[str]:
        return [name for name in self.plan.contenders if any(name == pair[1] for pair in self.finals)]

    def tasks_of(self, splits: Sequence[str]) -> list[str]:
        return [task for task in self.tasks if get_task(task).split in splits]

    def outcomes(self, contender: str, tasks: Iterable[str], factor: float | None = None) -> dict[str, Outcome]:
        runs, reference = self.finals, self.finals
        if factor is not None:
            runs, reference = self.factors[factor], self.factors[1.0]
        return outcomes(runs, reference, contender, tasks, REFERENCE)


def collect(plan: Plan) -> Results:
    """Reads the records.

    Raises:
        ValueError: there is no final run at these settings.
    """
    records = load(plan.records_path)
    by_key = {record["key"]: record for record in records}
    finals = [by_key[job.key] for job in final_jobs(plan, records) if job.key in by_key]
    robust = [by_key[job.key] for job in robust_jobs(plan, records) if job.key in by_key]
    if not finals:
        raise ValueError(
            f"{plan.records_path} holds no final run for these settings: give the --trials, --steps and --lodo of the "
            "runs, or make them first"
        )
    changed = {
        name: by_pair(by_key[job.key] for job in jobs if job.key in by_key) for name, jobs in change_jobs(plan).items()
    }
    return Results(plan, records, by_pair(finals), at_factors(robust, finals) if robust else {}, changed)


def write_report(plan: Plan) -> Path:
    results = collect(plan)
    drawn = pictures.draw(results.finals, results.tasks, results.contenders, plan.out)
    parts = ["# Optimizers on small tasks", _about(results), "## In one table", *_summaries(results)]
    parts += [_image("profile.png", "Share of each contender's tasks whose goal is reached, by steps and by seconds")]
    if results.factors:
        pictures.robustness(_reached_by_factor(results), plan.out / "robustness.png")
        parts += ["## When the learning rate is wrong", *_robustness(results)]
        parts += [_image("robustness.png", "Share of tasks whose goal is reached, by the factor of the learning rate")]
    if len(results.contenders) > 1:
        parts += ["## When the goal is the best of the others", *_against_the_best(results)]
    if results.changes.get(NOTHING_CHANGED):
        parts += ["## With one thing changed", *_changes(results)]
    parts += ["## Final losses", _losses(results), "## Seconds", _seconds(results), "## Settings", _settings(results)]
    parts += ["## Curves", *(_image(name, f"Losses on {name[7:-4]}") for name in drawn)]
    path = plan.out / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _image(name: str, text: str) -> str:
    return f"![{text}]({name})"


def _about(results: Results) -> str:
    runs = [run for each in results.finals.values() for run in each]
    seeds = whole({run["job"]["seed"] for run in runs})
    versions = {
        name: sorted({str(run["environment"].get(name)) for run in runs}) for name in ("lodo", "python", *PACKAGES)
    }
    told = ", ".join(f"{name} {' and '.join(found)}" for name, found in versions.items())
    sources = sorted({str(run["environment"].get("lodo_source")) for run in _of_lodo(results)})
    machines = sorted({_machine(run["environment"]) for run in runs})
    loads = [run["environment"]["load"] for run in runs if run["environment"]["load"] is not None]
    load = f", load {min(loads):g} to {max(loads):g}" if loads else ""
    missing = [task for task in results.plan.tasks if task not in results.tasks]
    recommended = results.plan.recommended
    untuned = "lodo.AutoLODO(params)" if recommended == RECOMMENDED else f"lodo.LODO(params, {_call(recommended)})"
    lines = [
        f"{len(results.tasks)} tasks, {len(results.contenders)} contenders, seeds {seeds}; {len(results.records)} runs "
        f"on record, searches included. One thread each on {'; '.join(machines)}{load}; {told}.",
        f"The goal on a task is tuned {REFERENCE}'s final loss. The protocol is in benchmarks/README.md. Untuned LODO "
        f"is `{untuned}`.",
    ]
    if len(sources) > 1:
        lines.append(f"**LODO's runs are of different code**: {', '.join(sources)}.")
    if missing:
        lines.append(f"**Not run**: {', '.join(missing)}.")
    return "\n\n".join(lines)


def _of_lodo(results: Results) -> list[Record]:
    """Its final runs, and those at wrong learning rates."""
    every = [results.finals, *results.factors.values()]
    return [run for runs in every for (_, name), found in runs.items() if name.startswith("LODO") for run in found]


def _machine(environment: Mapping[str, Any]) -> str:
    return f"{environment.get('processor') or environment['machine']}, {environment['cores']} cores"


def _call(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


def _summaries(results: Results) -> list[str]:
    parts = []
    for title, splits in SPLITS.items():
        tasks = results.tasks_of(splits)
        if tasks:
            lines = [
                _summary_line(name, summarise(results.outcomes(name, tasks).values())) for name in results.contenders
            ]
            parts += [f"**{title.capitalize()}** ({len(tasks)}):", table(_SUMMARY, lines)]
    parts.append(
        f"`steps` and `seconds` are geometric means of what the goal takes relative to {REFERENCE}'s whole run. A task "
        f"whose goal is not reached counts as {PENALTY:g} whole runs: in seconds, of the contender's own if they take "
        "longer. `where reached` leaves such tasks out. `diverged` is the share of the runs. Most of the tasks that "
        "were held out were looked at while LODO's defaults were chosen (docs/experiments.md says where); the fresh "
        "ones were added when they were settled."
    )
    return parts


_SUMMARY = ("", "reached", "steps", "where reached", "seconds", "where reached", "diverged")


def _summary_line(name: str, summary: Summary) -> list[str]:
    figures = (summary.steps, summary.steps_if_reached, summary.seconds, summary.seconds_if_reached)
    told = [NOTHING if math.isnan(figure) else number(figure, 2) for figure in figures]
    return [name, f"{summary.reached} of {summary.tasks}", *told, _percent(summary.diverged)]


def _percent(share: float) -> str:
    return NOTHING if math.isnan(share) else f"{100 * share:.0f} %"


def _reached_by_factor(results: Results) -> dict[str, dict[float, Summary]]:
    tasks = results.tasks_of(SPLITS["all tasks"])
    return {
        name: {factor: summarise(results.outcomes(name, tasks, factor).values()) for factor in results.factors}
        for name in _with_wrong_rates(results, tasks)
    }


def _with_wrong_rates(results: Results, tasks: Sequence[str]) -> list[str]:
    """The contenders that were run with one."""
    wrong = [factor for factor in results.factors if factor != 1]
    return [name for name in results.contenders if any(results.outcomes(name, tasks, factor) for factor in wrong)]


def _robustness(results: Results) -> list[str]:
    factors = list(results.factors)
    header = ["", *(f"lr x {factor:g}" for factor in factors)]
    parts = [
        "Tasks whose goal is reached; how many times as many steps the goal takes as at lr x 1, at the same seeds "
        f"(median over the tasks, a goal that is not reached counting as {PENALTY:g} runs); the share of diverged runs."
    ]
    for title, splits in SPLITS.items():
        if tasks := results.tasks_of(splits):
            lines = [
                [name, *(_factor_cell(results, name, tasks, factor) for factor in factors)]
                for name in _with_wrong_rates(results, tasks)
            ]
            parts += [f"**{title.capitalize()}**:", table(header, lines)]
    return parts


def _factor_cell(results: Results, name: str, tasks: Sequence[str], factor: float) -> str:
    found = results.outcomes(name, tasks, factor)
    summary, slower = summarise(found.values()), slowdown(found, results.outcomes(name, tasks, 1.0))
    return f"{summary.reached} of {summary.tasks}; {number(slower, 3)}; {_percent(summary.diverged)}"


def _against_the_best(results: Results) -> list[str]:
    """How the contenders do where the goal is not the reference's but the lowest one of any that is not LODO."""
    peers = [name for name in results.contenders if not name.startswith(UNTUNED)]
    levels = best_levels(results.finals, results.tasks, peers)
    lines = []
    for name in results.contenders:
        found = outcomes(results.finals, results.finals, name, list(levels), REFERENCE, levels)
        summary = summarise(found.values())
        lines.append(_summary_line(name, summary)[:4])
    text = (
        "The goal on each task is the lowest of the final losses of all contenders but LODO, each tuned there; steps "
        f"are relative to {REFERENCE}'s budget as above."
    )
    return [text, table(_SUMMARY[:4], lines)]


def _changes(results: Results) -> list[str]:
    parts = [
        f"Untuned LODO with one thing changed, at the seed {CHANGE_SEED}, of no other runs; the goal is {REFERENCE}'s "
        "final loss as above. `loss` is the geometric mean of the final losses over those of the unchanged call. "
        "Parts left out, on all tasks:",
        _change_table(results, EVERYWHERE),
    ]
    parts += ["Other numbers, on the tasks to choose on:", _change_table(results, ("choose",))]
    return parts


def _change_table(results: Results, splits: Sequence[str]) -> str:
    tasks, lines = results.tasks_of(splits), []
    plain = _changed(results, NOTHING_CHANGED, tasks)
    for name, change in CHANGES.items():
        if name == NOTHING_CHANGED or (tuple(splits) == tuple(change.splits)):
            found = _changed(results, name, tasks)
            ratio = loss_ratio(found, plain)
            told = NOTHING if math.isnan(ratio) else number(ratio, 3)
            lines.append([*_summary_line(name, summarise(found.values()))[:3], told])
    return table(("", "reached", "steps", "loss"), lines)


def _changed(results: Results, name: str, tasks: Sequence[str]) -> dict[str, Outcome]:
    return outcomes(results.changes[name], results.finals, UNTUNED, tasks, REFERENCE)


def _losses(results: Results) -> str:
    lines = []
    for task in results.tasks:
        found = {name: results.finals.get((task, name), ()) for name in results.contenders}
        levels = {name: _level(runs) for name, runs in found.items() if runs}
        best = min(levels.values(), default=math.inf)
        cells = [_loss_cell(runs, best) for runs in found.values()]
        lines.append([task, get_task(task).kind, get_task(task).split, *cells])
    text = "Mean over the last tenth of the steps; median over the seeds, with their range. The lowest is bold."
    return f"{text}\n\n{table(('task', 'kind', '', *results.contenders), lines, left=3)}"


def _level(runs: Sequence[Record]) -> float:
    return median(math.inf if run["score"] is None else run["score"] for run in runs)


def _loss_cell(runs: Sequence[Record], best: float) -> str:
    if not runs:
        return NOTHING
    level = _level(runs)
    if not math.isfinite(level):
        return "diverged"
    text = f"**{number(level, 3)}**" if level == best else number(level, 3)
    scores = [run["score"] for run in runs if run["score"] is not None]
    gone = len(runs) - len(scores)
    spread = f" ({number(min(scores), 3)} to {number(max(scores), 3)})" if len(scores) > 1 else ""
    return text + spread + (f", {gone} diverged" if gone else "")


def _seconds(results: Results) -> str:
    def cell(runs: Sequence[Record]) -> str:
        done = [run for run in runs if run["score"] is not None]
        if not done:
            return NOTHING
        share = median(run["optimizer_seconds"] / max(run["seconds"], 1e-9) for run in done)
        return f"{number(median(run['seconds'] for run in done), 3)} ({_percent(share)})"

    lines = [
        [task, f"{results.plan.steps_of(get_task(task)):,}"]
        + [cell(results.finals.get((task, name), ())) for name in results.contenders]
        for task in results.tasks
    ]
    text = "CPU seconds of a run, median over the seeds, and the share of the optimizer's own steps."
    return f"{text}\n\n{table(('task', 'steps', *results.contenders), lines)}"


def _settings(results: Results) -> str:
    lines = []
    for task in results.tasks:
        for name in results.contenders:
            chosen = choice(results.plan, get_task(task), get_contender(name), results.records)
            if chosen and get_contender(name).space:
                lines.append([task, name, chosen[1], _values(get_contender(name), chosen[0], results.plan)])
    text = "What the searches chose; * stands at an end of the range."
    return f"{text}\n\n{table(('task', 'contender', 'schedule', 'hyperparameters'), lines, left=4)}"


def _values(contender: Contender, values: Mapping[str, Any], plan: Plan) -> str:
    told = []
    for name, value in values.items():
        if name in contender.space:
            each = contender.space[name]
            place = each.value(value)
            is_edge = place < each.low * EDGE or place > each.high / EDGE
            told.append(f"{name} {number(value, 3)}{'*' if is_edge else ''}")
    fixed = fixed_options(contender.name, plan.recommended)
    return ", ".join(told) + (f"; {_call(fixed)}" if fixed else "")
