"""The pictures of a report: learning curves, profiles of what is reached when, robustness."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.shootout.contenders import REFERENCE
from benchmarks.shootout.running import Record
from benchmarks.shootout.scores import Runs, Summary, goal, outcomes, profile
from benchmarks.shootout.tasks import get_task

# Okabe and Ito's colours, which survive colour blindness, LODO's the warm ones.
COLORS: Mapping[str, str] = {
    "LODO": "#E69F00",
    "LODO, tuned": "#D55E00",
    "AdamW": "#0072B2",
    "SGD": "#777777",
    "Muon": "#009E73",
    "SOAP": "#56B4E9",
    "PSGD-Kron": "#6A51A3",
    "Prodigy": "#8A8A00",
    "schedule-free AdamW": "#3B2F8C",
    "L-BFGS": "#1B5E20",
}
DPI = 110
ABOVE = 3.0  # losses are shown up to so many times the loss of standing still


def style(name: str) -> dict[str, Any]:
    """How a contender's line looks in every picture."""
    width = 2.4 if name.startswith("LODO") else 1.5
    return {"color": COLORS.get(name, "#000000"), "linewidth": width, "label": name}


def draw(finals: Runs, tasks: Sequence[str], contenders: Sequence[str], out: Path) -> list[str]:
    """The curves of each task and the profile; returns the names of the curves' files."""
    names = []
    for task in tasks:
        names.append(f"curves_{task}.png")
        _curves(finals, task, contenders, out / names[-1])
    _profiles(finals, tasks, contenders, out / "profile.png")
    return names


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.4 * panels, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, panels, number + 1) for number in range(panels)]


def _curves(finals: Runs, task: str, contenders: Sequence[str], path: Path) -> None:
    """The running mean of the loss by steps and by seconds: median over the seeds, and their range by steps."""
    figure, (by_step, by_time) = _figure(2)
    every = [run for name in contenders for run in finals.get((task, name), ())]
    for name in contenders:
        runs = [run for run in finals.get((task, name), ()) if run["score"] is not None]
        if not runs:
            continue
        losses = _stacked(runs, "loss")
        middle = np.median(losses, axis=0)
        by_step.plot(runs[0]["curve"]["step"], middle, **style(name))
        by_step.fill_between(
            runs[0]["curve"]["step"], losses.min(0), losses.max(0), color=style(name)["color"], alpha=0.15, linewidth=0
        )
        by_time.plot(np.median(_stacked(runs, "seconds"), axis=0), middle, **style(name))
    level = goal(finals.get((task, REFERENCE), ()))
    for axes, label in ((by_step, "step"), (by_time, "CPU seconds")):
        if level is not None:
            axes.axhline(level, color="#000000", linewidth=0.8, linestyle=":")
        _scale(axes, every)
        axes.set_xlabel(label)
    by_step.set_ylabel("training loss, running mean")
    by_time.set_xscale("log")
    figure.suptitle(f"{task} ({get_task(task).kind}, {get_task(task).split})")
    _finish(figure, by_time, path)


def _stacked(runs: Sequence[Record], name: str) -> Any:
    return np.array([run["curve"][name] for run in runs], dtype=float)


def _scale(axes: Axes, runs: Sequence[Record]) -> None:
    scores = [run["score"] for run in runs if run["score"] is not None]
    if scores and min(scores) > 0:
        axes.set_yscale("log")
        axes.set_ylim(min(scores) * 0.8, max(run["idle_loss"] for run in runs) * ABOVE)


def _profiles(finals: Runs, tasks: Sequence[str], contenders: Sequence[str], path: Path) -> None:
    figure, panels = _figure(2)
    for axes, axis in zip(panels, ("steps", "seconds"), strict=True):
        largest = 1.0
        for name in contenders:
            found = outcomes(finals, finals, name, tasks, REFERENCE).values()
            if 2 * len(found) < len(tasks):
                continue  # the share of one task or two says little
            at, share = profile(found, axis)
            label = name if len(found) == len(tasks) else f"{name} ({len(found)} of {len(tasks)} tasks)"
            line = {**style(name), "label": label}
            axes.step([0.0, *at, 1e9], [0.0, *share, share[-1] if share else 0.0], where="post", **line)
            largest = max([largest, *at])
        axes.set_xlim(1e-2, largest * 1.05)
        axes.set_xscale("log")
        axes.set_ylim(0, 1.03)
        axes.set_xlabel(f"{axis}, relative to {REFERENCE}'s whole run")
        axes.set_ylabel(f"share of its tasks at {REFERENCE}'s final loss")
    _finish(figure, panels[-1], path)


def robustness(found: Mapping[str, Mapping[float, Summary]], path: Path) -> None:
    """The share of tasks whose goal is reached, and of runs that diverged, by the learning rate's factor."""
    figure, panels = _figure(2)
    for axes, label in zip(panels, ("reached", "diverged"), strict=True):
        for name, by_factor in found.items():
            shares = {k: s.share if label == "reached" else s.diverged for k, s in by_factor.items() if s.tasks}
            known = {factor: share for factor, share in shares.items() if not math.isnan(share)}
            axes.plot(list(known), list(known.values()), marker="o", markersize=4, **style(name))
        axes.set_xscale("log")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("learning rate, relative to the right one")
        axes.set_ylabel("share of tasks at the goal" if label == "reached" else "share of diverged runs")
    _finish(figure, panels[-1], path)


def _finish(figure: Figure, axes: Axes, path: Path) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    for each in figure.axes:
        each.grid(visible=True, which="major", linewidth=0.3)
    figure.savefig(path, dpi=DPI)
