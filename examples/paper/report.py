"""The report of an experiment: `report.md` and its pictures, from the results on disk."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from examples.paper import pictures
from examples.paper.experiments import EXPERIMENTS, FIRST_ORDER, Experiment
from examples.paper.pictures import by_label, deviation, final_losses, finished, mean, metrics
from examples.paper.plan import read_json
from examples.paper.runs import TAIL, Result, read_results
from examples.paper.tasks import NoisyBowl

IMAGE_TASKS = ("generation", "classification")
NOTHING = "-"


@dataclass(frozen=True)
class Records:
    """What an experiment left on disk.

    Attributes:
        main, sweeps: the runs; those of the sweeps by the sweep's name.
        replaced: how many older runs, at other settings, are not reported.
        paper: the experiment as the paper has it.
        searched: how each optimizer was searched here.
    """

    experiment: Experiment
    paper: Experiment
    main: list[Result]
    sweeps: dict[str, list[Result]]
    replaced: int
    tuned: dict[str, dict[str, float]]
    searched: dict[str, dict[str, Any]]

    @property
    def floor(self) -> float | None:
        """The bowl's loss that no optimizer can beat, at the runs' own size and noise."""
        if self.experiment.task != "bowl":
            return None
        return bowl_floor(**task_options(self.main))


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
        *hessian_errors(records, out),
        *trajectories(records, out),
        *hyperparameters(records),
        *sweeps(records, out),
    ]
    path = out / "report.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def load(experiment: Experiment, out: Path) -> Records:
    path = out / "runs.jsonl"
    every = read_results(path)
    if not every:
        raise ValueError(f"{path} holds no results: `python -m examples.paper {experiment.name}` makes them")
    results = latest(every)
    parts: dict[str, list[Result]] = {}
    for result in results:
        parts.setdefault(result["job"]["part"], []).append(result)
    return Records(
        experiment=experiment,
        paper=EXPERIMENTS.get(experiment.name, experiment),
        main=parts.pop("main", []),
        sweeps=parts,
        replaced=len({result["key"] for result in every}) - len(results),
        tuned=read_json(out / "tuned.json"),
        searched=read_json(out / "search.json"),
    )


def latest(results: Sequence[Result]) -> list[Result]:
    """The runs at each curve's latest settings, each once: runs at different settings must not be averaged."""

    def curve(result: Result) -> tuple[Any, ...]:
        return tuple(result["job"][name] for name in ("part", "label", "value"))

    def settings(result: Result) -> str:
        return json.dumps({name: value for name, value in result["job"].items() if name != "seed"}, sort_keys=True)

    current = {curve(result): settings(result) for result in results}
    kept = {result["key"]: result for result in results if current[curve(result)] == settings(result)}
    return list(kept.values())


def number(value: float, digits: int = 4) -> str:
    """`digits` significant digits, without an exponent where that stays readable."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if not -4 <= exponent < 7:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def plus_minus(values: Sequence[float]) -> str:
    """Mean and sample standard deviation; the value alone where there is one."""
    if not values:
        return NOTHING
    spread = deviation(values)
    if spread is None:
        return number(mean(values))
    rounding = spread <= 1e-12 * abs(mean(values))  # of runs that are all the same
    return f"{number(mean(values))} ± {number(0.0 if rounding else spread, 2)}"


def diverged(runs: Sequence[Result]) -> str:
    return f"{len(runs) - len(finished(runs))}/{len(runs)}"


def table(header: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first `left` columns are aligned left."""
    marks = [":---" if column < left else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, marks, *lines))


def picture(title: str, path: Path) -> str:
    return f"![{title}]({path.name})"


def enumerate_text(items: Iterable[Any]) -> str:
    return ", ".join(str(item) for item in items)


def whole(values: Iterable[int]) -> str:
    """Whole numbers in order; as a range where none is missing."""
    ordered = sorted(set(values))
    if len(ordered) > 1 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]} to {ordered[-1]}"
    return enumerate_text(f"{value:,}" for value in ordered)


def most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def per_optimizer(results: Sequence[Result], get: Callable[[list[Result]], str]) -> str:
    """What `get` says of most optimizers' runs, with the exceptions by name."""
    told = {name: get(runs) for name, runs in by_label(results).items()}
    usual = most_common(told.values())
    exceptions = [f"{name}: {text}" for name, text in told.items() if text != usual]
    return usual + (f" ({'; '.join(exceptions)})" if exceptions else "")


# What was run


def what_was_run(records: Records) -> list[str]:
    lines = [*run_lines(records), *search_lines(records), *machine_lines(records)]
    changes = shortened(records)
    protocol = (
        f"Not as in the paper: {'; '.join(changes)}."
        if changes
        else "Steps, runs, optimizers, searches and sweeps are as many as in the paper."
    )
    code = "\n".join(commands(records))
    again = f"To make it again:\n\n```sh\n{code}\n```"
    return ["## What was run", "\n".join(f"- {line}" for line in lines), protocol, again]


def run_lines(records: Records) -> list[str]:
    main = records.main
    if not main:
        return ["no training run of its own yet"]
    lines = [
        f"optimizers: {enumerate_text(in_order(records))}",
        f"steps of each run: {per_optimizer(main, lambda runs: whole(steps_of(runs)))}",
        f"runs: {per_optimizer(main, describe_seeds)}",
        f"task options: {describe_options(task_options(main)) or 'those of the task'}",
    ]
    if records.replaced:
        lines.append(f"left out: {records.replaced} older runs, at settings that later runs replaced")
    return lines


def describe_seeds(runs: Sequence[Result]) -> str:
    seeds = seeds_of(runs)
    return f"{len(runs)}, at seed{'s' * (len(seeds) > 1)} {whole(seeds)}"


def describe_options(options: Mapping[str, Any]) -> str:
    return enumerate_text(f"{name.replace('_', ' ')} {value}" for name, value in options.items())


def in_order(records: Records) -> list[str]:
    """The optimizers that were run, in the experiment's order."""
    names = list(by_label(records.main))
    order = {name: place for place, name in enumerate(records.paper.optimizers)}
    return sorted(names, key=lambda name: order.get(name, len(order)))


def steps_of(runs: Iterable[Result]) -> set[int]:
    return {run["job"]["steps"] for run in runs}


def seeds_of(runs: Iterable[Result]) -> set[int]:
    return {run["job"]["seed"] for run in runs}


def task_options(runs: Sequence[Result]) -> dict[str, Any]:
    return dict(runs[0]["job"]["task_options"]) if runs else {}


def search_lines(records: Records) -> list[str]:
    return [f"searched here: {describe_search(about)}: {enumerate_text(names)}" for names, about in searches(records)]


def searches(records: Records) -> list[tuple[list[str], dict[str, Any]]]:
    """The optimizers that were searched in the same way, and how."""
    groups: dict[str, list[str]] = {}
    for name, about in records.searched.items():
        groups.setdefault(json.dumps(about, sort_keys=True), []).append(name)
    return [(names, json.loads(about)) for about, names in groups.items()]


def describe_search(about: Mapping[str, Any]) -> str:
    steps = [each[1] for each in about["schedule"]]
    span = f"{min(steps):,}" if min(steps) == max(steps) else f"{min(steps):,} to {max(steps):,}"
    return f"{about['sampler']} search, {len(steps)} generations of {about['population']} runs of {span} steps"


def machine_lines(records: Records) -> list[str]:
    every = [*records.main, *(run for runs in records.sweeps.values() for run in runs)]
    environments = [run["environment"] for run in every]

    def all_of(*names: str) -> str:
        return enumerate_text(dict.fromkeys(" ".join(str(each[name]) for name in names) for each in environments))

    devices = list(dict.fromkeys(f"{each['device']} ({each['device_name']})" for each in environments))
    versions = enumerate_text(f"{name} {all_of(name)}" for name in ("lodo", "torch", "numpy", "python"))
    lines = [
        f"device: {enumerate_text(devices)}, threads of each process: {all_of('threads')}",
        f"versions: {versions}; {all_of('system')}",
        f"started: {min(run['started'] for run in every)} to {max(run['started'] for run in every)}",
    ]
    if len({(each["device"], each["device_name"], each["threads"]) for each in environments}) > 1:
        lines.append("not all runs had the same device and threads: their times do not compare")
    return lines


def shortened(records: Records) -> list[str]:
    """What differs from the paper's protocol, in words."""
    paper, changes = records.paper, []
    ran = set(by_label(records.main))
    if missing := [name for name in paper.optimizers if name not in ran]:
        changes.append(f"without {enumerate_text(missing)}")
    if records.main:
        changes += compared(records.main, paper)
    for names, about in searches(records):
        told = describe_search(about)
        schedule = [[each.std, each.steps] for each in paper.schedule]
        in_paper = describe_search({"sampler": "genetic", "population": paper.population, "schedule": schedule})
        if told != in_paper:
            changes.append(f"{told} instead of {in_paper} ({enumerate_text(names)})")
    if given := [name for name in ran if name not in records.searched and uses_hyperparameters(records, name)]:
        changes.append(f"no search here for {enumerate_text(name for name in in_order(records) if name in given)}")
    return changes + shortened_sweeps(records)


def shortened_sweeps(records: Records) -> list[str]:
    """What differs in the sweeps; those that differ in the same way together."""
    changes: dict[str, list[str]] = {}
    for sweep in records.paper.sweeps:
        runs = records.sweeps.get(sweep.name, [])
        absent = len(sweep.points) - len({run["job"]["value"] for run in runs})
        points = [f"{absent} of {len(sweep.points)} points missing"] if absent > 0 else []
        change = enumerate_text([*points, *compared(runs, records.paper, False)]) if runs else "not run"
        changes.setdefault(change, []).append(sweep.name)
    return [f"sweep of {enumerate_text(names)}: {change}" for change, names in changes.items() if change]


def uses_hyperparameters(records: Records, name: str) -> bool:
    return any(run["job"]["hyperparameters"] for run in records.main if run["job"]["label"] == name)


def compared(results: Sequence[Result], paper: Experiment, options: bool = True) -> list[str]:
    """Steps, runs and task options where they are not the paper's."""
    changes = []
    if steps_of(results) != {paper.steps}:
        changes.append(f"{per_optimizer_steps(results)} steps instead of {paper.steps:,}")
    counts = [len(runs) for runs in by_label(results).values()]
    if set(counts) != {paper.runs}:
        span = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        changes.append(f"{span} run{'s' * (max(counts) > 1)} instead of {paper.runs}")
    own = {name: value for name, value in task_options(results).items() if paper.task_options.get(name) != value}
    if own and options:
        changes.append(describe_options(own))
    return changes


def per_optimizer_steps(results: Sequence[Result]) -> str:
    steps = steps_of(results)
    return f"{min(steps):,}" if len(steps) == 1 else f"{min(steps):,} to {max(steps):,}"


def commands(records: Records) -> list[str]:
    """The command lines that lead to these results, searches first."""
    base = f"python -m examples.paper {records.experiment.name}"
    place = place_options(records)
    lines = [
        f"{base} --stages search{search_options(names, about, records)}{place}" for names, about in searches(records)
    ]
    stages = ["train"] * bool(records.main) + ["sweep"] * bool(records.sweeps) + ["report"]
    return [*lines, f"{base} --stages {','.join(stages)}{run_options(records)}{place}"]


def optimizers_option(names: Sequence[str], paper: Experiment) -> str:
    return "" if set(names) == set(paper.optimizers) else f" --optimizers {','.join(names)}"


def search_options(names: Sequence[str], about: Mapping[str, Any], records: Records) -> str:
    paper, steps = records.paper, [each[1] for each in about["schedule"]]
    options = optimizers_option(names, paper)
    options += f" --sampler {about['sampler']}" * (about["sampler"] != "genetic")
    options += f" --trials {about['population']}" * (about["population"] != paper.population)
    options += f" --generations {len(steps)}" * (len(steps) != len(paper.schedule))
    return options + f" --search-steps {max(steps)}" * (max(steps) < max(each.steps for each in paper.schedule))


def run_options(records: Records) -> str:
    paper, main = records.paper, records.main
    swept = [run for runs in records.sweeps.values() for run in runs]
    options = optimizers_option(in_order(records), paper) if main else ""
    own = main or swept
    steps, count = usual_length(own)
    options += f" --steps {steps}" * (steps != paper.steps) + f" --runs {count}" * (count != paper.runs)
    every = most_common(run["job"]["validate_every"] for run in own)
    options += f" --validate-every {every}" * (bool(main) and every != paper.validate_every)
    if swept and main:
        sweep_steps, sweep_count = usual_length(swept)
        options += f" --sweep-steps {sweep_steps}" * (sweep_steps != steps)
        options += f" --sweep-runs {sweep_count}" * (sweep_count != count)
    return options


def usual_length(results: Sequence[Result]) -> tuple[int, int]:
    """Steps and runs of most curves."""
    return most_common(run["job"]["steps"] for run in results), most_common(map(len, by_label(results).values()))


def place_options(records: Records) -> str:
    runs = records.main or [run for each in records.sweeps.values() for run in each]
    environment = runs[-1]["environment"]
    options = ""
    if records.experiment.task in IMAGE_TASKS:
        own = {name: each for name, each in task_options(runs).items() if records.paper.task_options.get(name) != each}
        options += " --data-root DATA" + "".join(f" --{name.replace('_', '-')} {value}" for name, value in own.items())
    options += f" --device {environment['device']}" * (environment["device"] != "cpu")
    return options + f" --threads {environment['threads']}"


# Losses


def common_time(results: Sequence[Result]) -> float | None:
    """The training time that every finished run had."""
    return min((float(run["seconds"]) for run in finished(results)), default=None)


def loss_at(run: Result, time: float) -> float | None:
    """The mean loss of the bins that end in the last tenth of `time`, else that of the last before it, else None."""
    ends, values = np.asarray(run["curve"]["seconds"]), np.asarray(run["curve"]["loss"])
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
        sentence + setup_times(found),
        "\n".join(f"- {line}" for line in headlines(found, floor)),
        picture("Training loss over steps", by_steps),
        picture("Training loss over time", by_time),
    ]


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
    """LODO's mean against that of the best first-order baseline; empty where one of them is missing."""
    means = {row.optimizer: mean(get(row)) - offset for row in found if get(row)}
    baselines = [name for name in means if name in FIRST_ORDER]
    if "LODO" not in means or not baselines:
        return ""
    best = min(baselines, key=lambda name: means[name])
    if not means[best] > 0:
        return ""
    change = 100 * (means["LODO"] / means[best] - 1)
    relation = f"{abs(change):.1f} % {'below' if change < 0 else 'above'}"
    both = f"{number(means['LODO'])} against {number(means[best])}"
    return f"LODO is {relation} the best first-order baseline, {best} ({both})"


# Validation, Hessian error, trajectories


def validation(records: Records, out: Path) -> list[str]:
    names = metrics(records.main)
    if not names:
        return []
    lines = []
    for label, runs in by_label(records.main).items():
        kept = [run["validation"] for run in finished(runs)]
        values = [[each[name][-1] for each in kept if each.get(name)] for name in names]
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
        first, last = (mean([each["value"][place] for each in kept]) for place in (0, -1))
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
        return "given"
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


@cache
def bowl_floor(**options: Any) -> float:
    return NoisyBowl(0, **options).floor


def seeds_of_points(points: Mapping[float, Sequence[Result]]) -> str:
    """How many runs the points have, and at which seeds."""
    told = list(dict.fromkeys(describe_seeds(runs) for runs in points.values()))
    return " or ".join(told)
