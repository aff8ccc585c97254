"""The pictures of a report: learning curves, performance profiles, robustness."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.shootout.contenders import ANCHOR, CLOCK, REFERENCE
from benchmarks.shootout.problem import TRAINING, VALIDATION
from benchmarks.shootout.results import AIMS, Results
from benchmarks.shootout.running import Record
from benchmarks.shootout.scores import TAU, Goals, Summary, goal, goal_of, outcomes, profile, ratios
from benchmarks.shootout.tasks import get_task

# Okabe and Ito's colours, which survive colour blindness, LODO's the warm ones.
COLORS: Mapping[str, str] = {
    "LODO": "#E69F00",
    "LODO, averages": "#F5C55E",
    "LODO, cooldown": "#9A5B00",
    "LODO, tuned": "#D55E00",
    "AdamW": "#0072B2",
    "SGD": "#777777",
    "Muon": "#009E73",
    "SOAP": "#56B4E9",
    "PSGD-Kron": "#6A51A3",
    "Prodigy": "#8A8A00",
    "schedule-free AdamW": "#3B2F8C",
    "AdEMAMix": "#CC79A7",
    "L-BFGS": "#1B5E20",
}
UNTUNED_LINE = (0, (4, 1.5))  # of what has one setting for all tasks and is not LODO
DPI = 110
ABOVE = 3.0  # losses are shown up to so many times the loss of standing still


def style(name: str) -> dict[str, Any]:
    """How a contender's line looks in every picture: what has one setting is dashed, in the colour of the tuned one."""
    family = name.split(",")[0] if not name.startswith("LODO") else name
    family = "AdamW" if family == "NAdamW" else family
    color = "#000000" if name == CLOCK else COLORS.get(family, "#000000")
    width = 2.4 if name.startswith("LODO") else 1.5
    dashed = {"linestyle": UNTUNED_LINE} if name not in COLORS else {}
    return {"color": color, "linewidth": width, "label": name, **dashed}


def draw(results: Results, out: Path) -> list[str]:
    """The curves of each task and the profiles; returns the names of the curves' files."""
    names = []
    for task in results.tasks:
        names.append(f"curves_{task}.png")
        _curves(results, task, out / names[-1])
    _profiles(results, results.untuned, goal_of(ANCHOR), out / "profile_untuned.png")
    _profiles(results, results.contenders, goal_of(REFERENCE), out / "profile_tuned.png")
    return names


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.6 * panels, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, panels, number + 1) for number in range(panels)]


def _curves(results: Results, task: str, path: Path) -> None:
    """The running mean of the training loss by steps and by seconds, and the validation loss by steps: median over the
    seeds, and their range by steps."""
    is_validated = get_task(task).is_validated
    figure, panels = _figure(3 if is_validated else 2)
    _lines(results, task, TRAINING, panels[0], "step", "training loss, running mean")
    _lines(results, task, TRAINING, panels[1], "seconds", "")
    panels[1].set_xscale("log")
    panels[1].set_xlabel("CPU seconds")
    if is_validated:
        _lines(results, task, VALIDATION, panels[2], "step", "validation loss")
    figure.suptitle(f"{task} ({get_task(task).kind}, {get_task(task).split})")
    _finish(figure, panels[0], path)


def _lines(results: Results, task: str, aim: str, axes: Axes, across: str, label: str) -> None:
    own = {name: results.finals[aim].get((task, name), ()) for name in results.contenders}
    for name, runs in own.items():
        curves = [curve for run in runs if run["score"] is not None and (curve := _curve(run, aim))]
        if not curves:
            continue
        losses = _stacked(curves, "loss")
        at = np.median(_stacked(curves, across), axis=0)
        axes.plot(at, np.median(losses, axis=0), **style(name))
        if across == "step" and name in COLORS:
            color = style(name)["color"]
            axes.fill_between(at, losses.min(0), losses.max(0), color=color, alpha=0.12, linewidth=0)
    level = goal(results.tracks[aim].get((task, REFERENCE), ()))
    if level is not None:
        axes.axhline(level, color="#000000", linewidth=0.8, linestyle=":")
    _scale(axes, results.tracks[aim], task, [run for runs in own.values() for run in runs])
    axes.set_xlabel(across)
    axes.set_ylabel(label)


def _curve(run: Record, aim: str) -> Any:
    curve = run["curve" if aim == TRAINING else "validation"]
    return curve if curve and None not in curve["loss"] else None


def _stacked(curves: Sequence[Mapping[str, Any]], name: str) -> Any:
    return np.array([curve[name] for curve in curves], dtype=float)


def _scale(axes: Axes, found: Any, task: str, runs: Sequence[Record]) -> None:
    ends = [track.lowest[-1] for pair, own in found.items() if pair[0] == task for track in own if len(track.lowest)]
    if ends and min(ends) > 0:
        axes.set_yscale("log")
        axes.set_ylim(min(ends) * 0.8, max(run["idle_loss"] for run in runs) * ABOVE)


def _profiles(results: Results, names: Sequence[str], goals: Goals, path: Path) -> None:
    figure, panels = _figure(4)
    for number, (aim, axis) in enumerate((aim, axis) for aim in AIMS for axis in ("steps", "seconds")):
        axes, found = panels[number], results.tracks[aim]
        every = {name: outcomes(found, name, results.tasks, goals, CLOCK) for name in names}
        most = max((len(own) for own in every.values()), default=0)
        for name, own in ratios(every, axis).items():
            if 2 * len(own) >= max(1, most):  # the share of one task or two says little
                at, share = profile(own)
                axes.step([1.0, *at, 1e9], [0.0, *share, share[-1] if share else 0.0], where="post", **style(name))
        axes.set_xlim(1.0, TAU)
        axes.set_ylim(0, 1.03)
        axes.set_xlabel(f"{axis} over the fastest one's")
        axes.set_title(f"{aim} loss", fontsize=10)
    panels[0].set_ylabel("share of the tasks")
    _finish(figure, panels[0], path)


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
