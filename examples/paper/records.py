"""What an experiment left on disk, and how reports write its figures."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from examples.paper.experiments import EXPERIMENTS, Experiment
from examples.paper.pictures import by_label, deviation, finished, mean
from examples.paper.plan import read_json
from examples.paper.runs import Result, read_results
from examples.paper.tasks import NoisyBowl

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


@cache
def bowl_floor(**options: Any) -> float:
    return NoisyBowl(0, **options).floor


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
