"""The picture of a report: losses by step and by second."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.larger.contenders import ANCHOR, LODO
from benchmarks.larger.running import Record

# Okabe and Ito's colours, which survive colour blindness; a contender has the same one in all comparisons.
COLORS: Mapping[str, str] = {
    LODO: "#E69F00",
    "AdamW": "#0072B2",
    "Muon": "#009E73",
    "SOAP": "#56B4E9",
    ANCHOR: "#777777",
}
DPI = 110
ABOVE = 2.2  # losses are shown up to so many times the lowest one


def draw(finals: Mapping[str, Sequence[Record]], title: str, path: Path) -> None:
    """Medians over the seeds: of the validation loss, with its range by step, and thin of the training loss."""
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    lowest = float("inf")
    for name, every in finals.items():
        runs = [run for run in every if run["diverged_at"] is None]
        if not runs:
            continue
        for part, line in (("training", {"linewidth": 0.8, "alpha": 0.8}), ("validation", {"label": name})):
            losses = _stacked(runs, part, "loss")
            middle = np.median(losses, axis=0)
            lowest = min(lowest, float(np.nanmin(middle)))
            style = {"color": COLORS[name], "linewidth": 2.6 if name == LODO else 1.7, **line}
            by_step.plot(runs[0][part]["step"], middle, **style)
            by_second.plot(np.median(_stacked(runs, part, "seconds"), axis=0), middle, **style)
        by_step.fill_between(
            runs[0]["validation"]["step"], losses.min(0), losses.max(0), color=COLORS[name], alpha=0.15, linewidth=0
        )
    _finish(figure, by_step, by_second, lowest, title, path)


def _stacked(runs: Sequence[Record], part: str, column: str) -> Any:
    return np.array([run[part][column] for run in runs], dtype=float)  # None becomes NaN


def _finish(figure: Figure, by_step: Axes, by_second: Axes, lowest: float, title: str, path: Path) -> None:
    for axes, label in ((by_step, "step"), (by_second, "seconds of training")):
        axes.set_yscale("log")
        if np.isfinite(lowest):
            axes.set_ylim(lowest * 0.97, lowest * ABOVE)
        axes.yaxis.set_major_locator(_ticks())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_xlim(left=0)
        axes.set_xlabel(label)
        axes.grid(visible=True, which="both", linewidth=0.3)
    by_step.set_ylabel("loss: validation (thick), training (thin)")
    figure.suptitle(title, fontsize=11)
    handles, labels = by_step.get_legend_handles_labels()
    if handles:
        by_second.legend(handles, labels, loc="upper right", fontsize=9, framealpha=0.9)
    figure.savefig(path, dpi=DPI)


def _ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=7, steps=[1, 2, 5, 10])
