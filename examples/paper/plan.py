"""One experiment as it was asked for: its tuned hyperparameters, and the runs it is made of."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.checkpoints import write_whole
from examples.paper.experiments import Experiment
from examples.paper.optimizers import defaults, entry
from examples.paper.runs import Job, Place

TUNED = Path(__file__).with_name("tuned.json")
"""The hyperparameters that were found for every experiment: what training takes where no search was run here."""

Tuned = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Plan:
    """An experiment as the command line shaped it, and where it happens."""

    experiment: Experiment
    optimizers: tuple[str, ...]
    out: Path
    place: Place
    workers: int
    storage: str
    sampler: str
    sweep_runs: int
    sweep_steps: int

    @property
    def tuned_path(self) -> Path:
        return self.out / "tuned.json"

    @property
    def results_path(self) -> Path:
        return self.out / "runs.jsonl"

    @property
    def tunable(self) -> tuple[str, ...]:
        return tuple(name for name in self.optimizers if entry(name).space)


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces the file in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def read_tuned(plan: Plan) -> Tuned:
    """What a search found here; else what we found; else, with a word on stderr, the search's starting point."""
    known = read_json(TUNED).get(plan.experiment.name, {}) | read_json(plan.tuned_path)
    if untuned := [name for name in plan.tunable if name not in known]:
        print(f"not tuned, run at the search's starting point: {', '.join(untuned)}", file=sys.stderr)
    return {name: known.get(name, defaults(name)) for name in plan.optimizers}


def training_jobs(plan: Plan, tuned: Tuned) -> list[Job]:
    """The runs of every optimizer at its tuned hyperparameters."""
    experiment = plan.experiment
    return [
        Job(
            experiment=experiment.name,
            part="main",
            label=name,
            task=experiment.task,
            optimizer=name,
            hyperparameters=_halved(tuned[name]) if experiment.halve_lr else tuned[name],
            seed=seed,
            steps=experiment.steps,
            task_options=experiment.task_options,
            validate_every=experiment.validate_every,
            hessian_every=experiment.hessian_every,
            trajectory=experiment.trajectory,
        )
        for seed in range(experiment.runs)
        for name in plan.optimizers
    ]


def _halved(hyperparameters: Mapping[str, float]) -> dict[str, float]:
    return {name: value / 2 if name == "lr" else value for name, value in hyperparameters.items()}


def sweep_jobs(plan: Plan, tuned: Tuned) -> list[Job]:
    """The runs of the experiment's sweeps, around LODO's tuned hyperparameters."""
    experiment = plan.experiment
    base = _halved(tuned["LODO"]) if experiment.halve_lr else tuned["LODO"]
    return [
        Job(
            experiment=experiment.name,
            part=sweep.name,
            label=f"{sweep.name} {point.value:g}",
            task=experiment.task,
            optimizer=point.optimizer,
            hyperparameters=base | dict(point.hyperparameters),
            seed=seed,
            steps=plan.sweep_steps,
            task_options=dict(experiment.task_options) | dict(point.task_options),
            value=point.value,
            hessian_every=max(1, plan.sweep_steps // 20) if experiment.hessian_every else 0,
        )
        for seed in range(plan.sweep_runs)
        for sweep in experiment.sweeps
        for point in sweep.points
    ]
