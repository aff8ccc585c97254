"""The part of a report that says what was run, what the paper ran, and the commands."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from examples.paper.experiments import Experiment
from examples.paper.pictures import by_label
from examples.paper.records import (
    Records,
    enumerate_text,
    in_order,
    most_common,
    per_optimizer,
    seeds_of,
    steps_of,
    task_options,
    whole,
)
from examples.paper.runs import Result

IMAGE_TASKS = ("generation", "classification")


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
    generations = f"{len(steps)} generations of " if len(steps) > 1 else ""
    options = f" ({describe_options(about['options'])})" if about.get("options") else ""
    return f"{about['sampler']} search, {generations}{about['population']} runs of {span} steps{options}"


def machine_lines(records: Records) -> list[str]:
    every = [*records.main, *(run for runs in records.sweeps.values() for run in runs)]
    environments = [run["environment"] for run in every]

    def all_of(*names: str) -> str:
        return enumerate_text(dict.fromkeys(" ".join(str(each[name]) for name in names) for each in environments))

    loads = [each["load"] for each in environments if each.get("load") is not None]
    devices = list(dict.fromkeys(f"{each['device']} ({each['device_name']})" for each in environments))
    versions = enumerate_text(f"{name} {all_of(name)}" for name in ("lodo", "torch", "numpy", "python"))
    lines = [
        f"device: {enumerate_text(devices)}, threads of each process: {all_of('threads')}; "
        f"processes at once: {all_of('workers')}"
        + (f"; load at their starts: {min(loads)} to {max(loads)}" if loads else ""),
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
    if "L2L" in ran:
        changes.append("L2L has no search: it is trained on other walks before each run")
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
    options += f" --workers {environment['workers']}" * (environment["workers"] != 1)
    return options + f" --threads {environment['threads']}"
