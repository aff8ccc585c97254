"""The report of a comparison, from its records alone."""

import math
from collections.abc import Mapping, Sequence
from statistics import median

from benchmarks.larger.contenders import LODO, REFERENCE, get_contender
from benchmarks.larger.pictures import draw
from benchmarks.larger.plan import Plan, Records, finals, search
from benchmarks.larger.running import Record, final_loss

NOTHING = "-"
HEAD = (
    "",
    "training loss",
    "validation loss",
    "validation accuracy",
    "test accuracy",
    "seconds",
    "of them in the optimizer",
    "steps to AdamW's loss",
    "seconds to it",
)


def write_report(plan: Plan, records: Records) -> str:
    """Writes the task's page and picture into the plan's folder, and returns the page.

    Raises:
        ValueError: there are no final runs of the plan.
    """
    data = records.data_of(plan)
    runs = finals(plan, records, data)
    if not runs:
        raise ValueError(f"{records.path} has no final runs of {plan.task.name} with these options: nothing to report")
    draw(runs, _title(plan), plan.out / f"{plan.task.name}.png")
    parts = [_introduction(plan, data, runs), _table(runs), _searches(plan, records, data), _machine(runs)]
    page = "\n\n".join(parts) + "\n"
    (plan.out / f"{plan.task.name}.md").write_text(page)
    return page


def _introduction(plan: Plan, data: str, runs: Mapping[str, Sequence[Record]]) -> str:
    count = next(iter(runs.values()))[0]["parameters"]
    options = ", ".join(f"{name} {value}" for name, value in plan.options.items())
    seeds = ", ".join(str(seed) for seed in plan.seeds)
    return (
        f"# {_title(plan)}\n\n"
        f"`python -m benchmarks.larger {plan.task.name}`: {count:,} parameters ({options}); {data}. Final runs of "
        f"{plan.steps:,} steps, seeds {seeds}; the search's of {plan.search_steps:,} steps, another seed.\n\n"
        f"![Losses by step and by second]({plan.task.name}.png)"
    )


def _title(plan: Plan) -> str:
    return plan.task.title[0].upper() + plan.task.title[1:]


def _table(runs: Mapping[str, Sequence[Record]]) -> str:
    goal = _goal(runs)
    rows = [HEAD, *([name, *_cells(found, goal)] for name, found in runs.items())]
    used = [column for column in range(len(HEAD)) if any(row[column] != NOTHING for row in rows[1:])]
    lines = [_row([row[column] for column in used]) for row in rows]
    lines.insert(1, _row([":--", *["--:"] * (len(used) - 1)]))
    level = NOTHING if goal is None else f"{goal:.4f}"
    note = (
        "Medians over the seeds, with the range where they differ. The training loss is the mean over the last tenth "
        "of the steps, the others are of the model in evaluation mode after the last step. Seconds are those of the "
        f"wall in training, without evaluation. {REFERENCE}'s loss is the median of its final validation losses, "
        f"{level}; it is looked for at the points of validation, and a run that does not reach it counts as never."
    )
    return "\n".join(lines) + "\n\n" + note


def _cells(runs: Sequence[Record], goal: float | None) -> list[str]:
    sound = [run for run in runs if math.isfinite(final_loss(run))]
    if len(sound) < len(runs):
        return [f"{len(runs) - len(sound)} of {len(runs)} diverged", *[NOTHING] * (len(HEAD) - 2)]
    tests = [run["test"]["accuracy"] for run in runs if run["test"] is not None]
    reached = [_reach(run, goal) for run in runs]
    return [
        _spread([run["training"]["loss"][-1] for run in runs], ".4f"),
        _spread([final_loss(run) for run in runs], ".4f"),
        _spread([run["validation"]["accuracy"][-1] for run in runs], ".2%"),
        _spread(tests, ".2%") if tests else NOTHING,
        _spread([run["seconds"] for run in runs], ".0f"),
        f"{median(run['optimizer_seconds'] / run['seconds'] for run in runs):.0%}",
        _median_reach([step for step, _ in reached], goal),
        _median_reach([seconds for _, seconds in reached], goal),
    ]


def _goal(runs: Mapping[str, Sequence[Record]]) -> float | None:
    found = [final_loss(run) for run in runs.get(REFERENCE, ())]
    return median(found) if found and math.isfinite(median(found)) else None


def _reach(run: Record, goal: float | None) -> tuple[float, float]:
    """Step and seconds of the first point of validation that is not above the goal; infinite if there is none."""
    columns = [run["validation"][name] for name in ("step", "seconds", "loss")]
    points = zip(*columns, strict=True)
    never = (math.inf, math.inf)
    return next(((s, t) for s, t, loss in points if goal is not None and loss is not None and loss <= goal), never)


def _median_reach(found: Sequence[float], goal: float | None) -> str:
    if goal is None:
        return NOTHING
    middle = sorted(found)[len(found) // 2]  # of an even number the later one: no mean with what is infinite
    return f"{middle:,.0f}" if math.isfinite(middle) else "not reached"


def _spread(values: Sequence[float], form: str) -> str:
    """The median, and the range of several values."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _searches(plan: Plan, records: Records, data: str) -> str:
    lines = ["## Settings", "", "Validation losses of the search; the lowest one is chosen.", ""]
    for name in plan.contenders:
        contender = get_contender(name)
        found = search(plan, records, data, contender)
        schedule = "linear warm-up, cosine to zero" if contender.is_scheduled else "constant rate, no schedule"
        settings = ", ".join(f"{key} {_shown(value)}" for key, value in found.settings.items()) or "no argument"
        lines.append(f"- **{name}**: {settings}; {schedule}{'; search not done' if found.lacking else ''}")
        for axis, losses in found.tried:
            tried = ", ".join(f"{axis.value(place):g}: {_loss(losses[place])}" for place in sorted(losses))
            lines.append(f"    - {axis.name}: {tried}")
    return "\n".join(lines)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _loss(loss: float) -> str:
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def _machine(runs: Mapping[str, Sequence[Record]]) -> str:
    """All that the runs were made with; more than one where they differ."""
    machines = [run["environment"] for found in runs.values() for run in found]
    names = {"device_name": "", "threads": "threads ", "torch": "torch ", "pytorch-optimizer": "pytorch_optimizer "}
    parts = [f"{label}{_distinct(machines, name)}" for name, label in names.items()]
    own = [run["environment"] for run in runs.get(LODO, ())]
    if own:
        parts.append(f"lodo {_distinct(own, 'lodo')} (source {_distinct(own, 'lodo_source')})")
    return f"Made with {', '.join(parts)}, load {_distinct_range(machines)}."


def _distinct(machines: Sequence[Record], name: str) -> str:
    return " or ".join(sorted({str(machine.get(name)) for machine in machines}))


def _distinct_range(machines: Sequence[Record]) -> str:
    loads = [machine["load"] for machine in machines if machine.get("load") is not None]
    return f"{min(loads):.1f} to {max(loads):.1f}" if loads else "unknown"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
