"""The report of an experiment: `report.md` and its pictures, from the results on disk."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.paper import pictures
from examples.paper.experiments import FIRST_ORDER, Experiment
from examples.paper.optimizers import defaults
from examples.paper.pictures import by_label, final_losses, finished, mean, metrics
from examples.paper.protocol import describe_seeds, per_optimizer_steps, what_was_run
from examples.paper.records import (
    NOTHING,
    Records,
    bowl_floor,
    diverged,
    enumerate_text,
    in_order,
    load,
    number,
    plus_minus,
    steps_of,
    table,
    whole,
)
from examples.paper.runs import TAIL, Result


@dataclass(frozen=True)
class Row:
    """One optimizer's runs: its final losses, and those at the end of the common time."""

    optimizer: str
    runs: Sequence[Result]
    by_steps: Sequence[float]
    by_time: Sequence[float]

    @property
    def rate(self) -> float:
        """Steps per second, the median over runs."""
        return float(np.median([run["steps_per_second"] for run in finished(self.runs) or self.runs]))


def write_report(experiment: Experiment, out: Path) -> Path:
    """Draws the pictures of the results in `out` and writes `out/report.md`, with the text of `out/reading.md` if any.

    Raises:
        ValueError: `out` holds no results.
    """
    records = load(experiment, out)
    reading = out / "reading.md"
    parts = [
        f"# {experiment.title} (section {experiment.section})",
        reading.read_text(encoding="utf-8").strip() if reading.exists() else "",
        *what_was_run(records),
        *losses(records, out),
        *validation(records, out),
        *tests(records, out),
        *hessian_errors(records, out),
        *trajectories(records, out),
        *hyperparameters(records),
        *sweeps(records, out),
    ]
    path = out / "report.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def picture(title: str, path: Path) -> str:
    return f"![{title}]({path.name})"


# Losses

SHORTEST_TIME = 1.0  # seconds


def common_time(results: Sequence[Result]) -> float | None:
    """The training time that every finished run had; None where it is too short to tell optimizers from noise."""
    shortest = min((float(run["seconds"]) for run in finished(results)), default=0.0)
    return shortest if shortest >= SHORTEST_TIME else None


def loss_at(run: Result, time: float) -> float | None:
    """The mean loss of the bins that end in the last tenth of `time`, else that of the last before it, else None."""
    ends, values = (np.asarray(run["curve"][name], dtype=np.float64) for name in ("seconds", "loss"))
    before = ends <= time
    if not before.any():
        return None
    late = before & (ends > (1 - TAIL) * time)
    return mean(list(values[late])) if late.any() else float(values[before][-1])


def rows(results: Sequence[Result]) -> list[Row]:
    """Every optimizer, the lowest mean loss first."""
    time = common_time(results)
    found = []
    for name, runs in by_label(results).items():
        timed = [loss_at(run, time) for run in finished(runs)] if time is not None else []
        found.append(Row(name, runs, final_losses(runs), [loss for loss in timed if loss is not None]))
    return found


def losses(records: Records, out: Path) -> list[str]:
    if not records.main:
        return []
    found, floor, time = rows(records.main), records.floor, common_time(records.main)
    sentence = (
        f"Loss: the mean over the last {100 * TAIL:.0f} % of the steps, ± the sample standard deviation over runs; "
        "diverged runs count in their own column only."
    )
    if time is not None:
        sentence += (
            f" Same time: the mean over the last {100 * TAIL:.0f} % of the first T = {number(time, 3)} s of training, "
            "the time of the fastest run, from the bins of the learning curves."
        )
    by_steps = pictures.learning_curves(records.main, out / "losses_by_step.png", "step", floor)
    by_time = pictures.learning_curves(records.main, out / "losses_by_time.png", "seconds", floor, time)
    return [
        "## Losses",
        loss_table(found, floor),
        sentence + deterministic(found) + setup_times(found),
        "\n".join(f"- {line}" for line in headlines(found, floor)),
        picture("Training loss over steps", by_steps),
        picture("Training loss over time", by_time),
    ]


def deterministic(found: Sequence[Row]) -> str:
    """A word on optimizers whose runs are all the same: the task draws nothing, and neither do they."""
    same = [row.optimizer for row in found if len(row.by_steps) > 1 and len(set(row.by_steps)) == 1]
    return f" All runs of {enumerate_text(same)} are the same run: nothing in them is random." if same else ""


def setup_times(found: Sequence[Row]) -> str:
    medians = {row.optimizer: float(np.median([run["setup_seconds"] for run in row.runs])) for row in found}
    slow = [f"{name} {number(seconds, 3)} s" for name, seconds in medians.items() if seconds > 1]
    return f" Times leave out what comes before the first step: {enumerate_text(slow)}." if slow else ""


def loss_table(found: Sequence[Row], floor: float | None) -> str:
    adam = next((row.rate for row in found if row.optimizer == "Adam"), None)
    header = ["Optimizer", "Loss", "Loss, same time", "Diverged", "Steps/s", "Steps/s, Adam = 1"]
    lines = [
        [
            row.optimizer,
            plus_minus(row.by_steps),
            plus_minus(row.by_time),
            diverged(row.runs),
            number(row.rate, 3),
            number(row.rate / adam, 3) if adam else NOTHING,
        ]
        for row in found
    ]
    if floor is not None:
        header[2:2] = ["Loss / floor", "Above the floor"]
        for line, row in zip(lines, found, strict=True):
            above = mean(row.by_steps) - floor if row.by_steps else None
            line[2:2] = [NOTHING] * 2 if above is None else [number(above / floor + 1), number(above)]
        lines.insert(0, ["Floor", number(floor), "1", "0", *[NOTHING] * 4])
    return table(header, lines)


def headlines(found: Sequence[Row], floor: float | None) -> list[str]:
    lines = []
    if floor is not None:
        lines.append(
            "the floor, half of the trace of H times the noise^2, is that of Newton's method with the true Hessian"
        )
    readings: list[tuple[str, Callable[[Row], Sequence[float]], float]] = [
        ("after the same steps", lambda row: row.by_steps, 0.0),
        ("after the same time", lambda row: row.by_time, 0.0),
    ]
    if floor is not None:
        readings.insert(1, ("above the floor, after the same steps", lambda row: row.by_steps, floor))
    for what, get, offset in readings:
        if line := against_first_order(found, get, offset):
            lines.append(f"{what}: {line}")
    return lines


def against_first_order(found: Sequence[Row], get: Callable[[Row], Sequence[float]], offset: float) -> str:
    """LODO's mean against that of the best first-order baseline; empty where one is missing, or ran for other steps."""
    steps = steps_of(next((row.runs for row in found if row.optimizer == "LODO"), ()))
    means = {row.optimizer: mean(get(row)) - offset for row in found if get(row) and steps_of(row.runs) == steps}
    baselines = [name for name in means if name in FIRST_ORDER]
    if "LODO" not in means or not baselines:
        return ""
    best = min(baselines, key=lambda name: means[name])
    if not means[best] > 0:
        return ""
    change = 100 * (means["LODO"] / means[best] - 1)
    relation = f"{abs(change):.1f} % {'below' if change < 0 else 'above'}"
    if change > 100:
        relation = f"{number(1 + change / 100, 2)} times as high as"
    both = f"{number(means['LODO'])} against {number(means[best])}"
    for row in found:
        if row.optimizer in ("LODO", best) and len(row.by_steps) < len(row.runs):
            both += f"; {diverged(row.runs)} of {row.optimizer} diverged"
    return f"LODO is {relation} the best first-order baseline, {best} ({both})"


# Validation, Hessian error, trajectories


def validation(records: Records, out: Path) -> list[str]:
    names = metrics(records.main)
    if not names:
        return []
    lines = []
    for label, runs in by_label(records.main).items():
        kept = [run["validation"] for run in finished(runs)]
        values = [[known(each[name][-1]) for each in kept if each.get(name)] for name in names]
        lines.append([label, *map(plus_minus, values), diverged(runs)])
    last = {run["validation"]["step"][-1] for run in finished(records.main) if run["validation"]}
    steps = f" at step {whole(map(int, last))}" if last else ""
    by_step = pictures.validation_curves(records.main, out / "validation_by_step.png", "step")
    by_time = pictures.validation_curves(records.main, out / "validation_by_time.png", "seconds")
    return [
        "## Validation",
        table(["Optimizer", *(name.replace("_", " ") for name in names), "Diverged"], lines),
        f"The last values{steps}: mean ± sample standard deviation over the runs that finished.",
        picture("Validation over steps", by_step),
        picture("Validation over time", by_time),
    ]


def hessian_errors(records: Records, out: Path) -> list[str]:
    lines = []
    for label, runs in by_label(records.main).items():
        kept = [run["hessian_error"] for run in pictures.drawn(runs) if run["hessian_error"]]
        if not kept:
            continue
        first, last = (mean([known(each["value"][place]) for each in kept]) for place in (0, -1))
        steps = f"step {kept[0]['step'][0]:,.0f} to {kept[0]['step'][-1]:,.0f}"
        lines.append([label, number(first), number(last), steps])
    if not lines:
        return []
    return [
        "## Hessian error",
        "How far G is from the inverse of the Hessian H: the Frobenius norm of I - G H over sqrt(n), estimated from "
        "random directions; 1 for G = 0. Means over runs, first and last estimate.",
        table(["Optimizer", "First", "Last", "From, to"], lines),
        picture("Hessian error", pictures.hessian_error(records.main, out / "hessian_error.png")),
    ]


def known(figure: float | None) -> float:
    """Not a number, for figures that were not finite."""
    return math.nan if figure is None else figure


def tests(records: Records, out: Path) -> list[str]:
    """Figures on test data at the end of the runs, and what their models generated."""
    names = list(dict.fromkeys(name for run in records.main for name in run["test"]))
    lines = [
        [
            label,
            *(
                plus_minus([known(run["test"][name]) for run in finished(runs) if name in run["test"]])
                for name in names
            ),
        ]
        for label, runs in by_label(records.main).items()
    ]
    parts = ["## Test", table(["Optimizer", *(name.replace("_", " ") for name in names)], lines)] if names else []
    for label in by_label(records.main):
        if (samples := out / "samples" / f"{label}.npy").exists():
            path = pictures.image_grid(np.load(samples), out / f"samples_{label}.png")
            parts += [f"Generated by the model that {label} trained (seed 0):", picture(f"Samples, {label}", path)]
    return parts


def trajectories(records: Records, out: Path) -> list[str]:
    if records.experiment.task != "rosenbrock" or not any(run["trajectory"] for run in records.main):
        return []
    return ["## Trajectories", picture("Trajectories", pictures.trajectories(records.main, out / "trajectories.png"))]


# Hyperparameters and sweeps


def hyperparameters(records: Records) -> list[str]:
    used = {run["job"]["label"]: run["job"]["hyperparameters"] for run in records.main}
    lines = []
    for name in in_order(records):
        told = enumerate_text(f"{key} = {significant(value)}" for key, value in used[name].items())
        lines.append([name, told or NOTHING, origin(records, name, used[name])])
    for name in sorted(set(records.searched) - set(used)):
        told = enumerate_text(f"{key} = {significant(value)}" for key, value in records.tuned.get(name, {}).items())
        lines.append([name, told or NOTHING, "searched here, not run"])
    if not lines:
        return []
    halved = " Their lr is half of what the search found." if records.experiment.halve_lr and used else ""
    return [
        "## Hyperparameters",
        f"Those of the runs above.{halved}",
        table(["Optimizer", "Hyperparameters", "From"], lines, left=3),
    ]


def significant(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def origin(records: Records, name: str, used: Mapping[str, Any]) -> str:
    """Whether the search here found what was used: a later search, or an earlier run, leaves other values."""
    if not used:
        return NOTHING
    if name not in records.searched:
        return "untuned: the search's starting point" if used == defaults(name) else "given"
    factor = 0.5 if records.experiment.halve_lr else 1.0
    found = {key: value * (factor if key == "lr" else 1.0) for key, value in records.tuned.get(name, {}).items()}
    same = found.keys() == used.keys() and all(math.isclose(found[key], used[key]) for key in used)
    return "searched here" if same else "given: not what the search here found"


def sweeps(records: Records, out: Path) -> list[str]:
    if not records.sweeps:
        return []
    parts = ["## Sweeps", "LODO's hyperparameters as above, except for what is swept."]
    for name, runs in records.sweeps.items():
        parts += one_sweep(records, name, runs, out)
    return parts


def one_sweep(records: Records, name: str, runs: Sequence[Result], out: Path) -> list[str]:
    axis = next((sweep.axis for sweep in records.experiment.sweeps if sweep.name == name), name)
    points: dict[float, list[Result]] = {}
    for run in sorted(runs, key=lambda run: float(run["job"]["value"])):
        points.setdefault(float(run["job"]["value"]), []).append(run)
    scales = {value: float(each[0]["job"]["task_options"].get("noise", 1.0)) ** 2 for value, each in points.items()}
    scaled = records.experiment.task == "bowl" and len(set(scales.values())) > 1
    header = [axis, "Loss", *["Loss / noise^2"] * scaled, "Diverged"]
    lines = []
    for value, each in points.items():
        found = final_losses(each)
        comparable = [plus_minus([loss / scales[value] for loss in found])] if scaled else []
        lines.append(
            [f"{value:,.4g}" if value < 1000 else f"{value:,.0f}", plus_minus(found), *comparable, diverged(each)]
        )
    floor = sweep_floor(records, runs, scaled)
    told = f" The floor is {number(floor)}{' times noise^2' if scaled else ''}." if floor is not None else ""
    path = out / f"sweep_{name.replace(' ', '_')}.png"
    path = pictures.sweep(points, path, name, axis, floor, *((scales, "loss / noise^2") if scaled else ()))
    return [
        f"### Sweep: {name}",
        f"{per_optimizer_steps(runs)} steps; runs at each point: {seeds_of_points(points)}.{told}",
        table(header, lines, left=0),
        picture(f"Sweep: {name}", path),
    ]


def sweep_floor(records: Records, runs: Sequence[Result], scaled: bool) -> float | None:
    """The bowl's floor for the sweep's runs; at noise 1 where their losses are divided by noise^2."""
    if records.experiment.task != "bowl":
        return None
    options = dict(runs[0]["job"]["task_options"]) | ({"noise": 1.0} if scaled else {})
    return bowl_floor(**options)


def seeds_of_points(points: Mapping[float, Sequence[Result]]) -> str:
    """How many runs the points have, and at which seeds."""
    told = list(dict.fromkeys(describe_seeds(runs) for runs in points.values()))
    return " or ".join(told)
