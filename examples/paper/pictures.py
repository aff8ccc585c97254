"""The pictures of a report: learning curves, validation, Hessian errors, sweeps, trajectories, generated digits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke

from examples.paper.runs import Result
from examples.paper.tasks.rosenbrock import MINIMUM, START, rosenbrock

# Okabe and Ito's palette, which survives colour blindness, and relatives of its colours: LODO and its ablations warm,
# the baselines cold or grey.
COLORS: Mapping[str, str] = {
    "LODO": "#D55E00",
    "LODO-Diagonal": "#E69F00",
    "LODO-Global": "#8C510A",
    "LODO-Residuals": "#CC79A7",
    "LODO-No-Momentum": "#882255",
    "LODO-SGD": "#C2A878",
    "LODO-Transplanted": "#F28E72",
    "SGD": "#777777",
    "RMSprop": "#56B4E9",
    "Adam": "#0072B2",
    "LARS": "#6A51A3",
    "Yogi": "#009E73",
    "L-BFGS": "#8A8A00",
    "O-LBFGS": "#3B2F8C",
    "BFGS": "#5FB8A5",
    "Levenberg-Marquardt": "#9A8CD6",
    "L2L": "#1B5E20",
}
OTHER_COLOR = "#000000"
SECOND_ORDER = ("L-BFGS", "O-LBFGS", "BFGS", "Levenberg-Marquardt", "L2L")
DPI = 110
MANY_BINS = 100  # above which a noisy curve is averaged to about
FEW_BINS = 60
TIME_POINTS = 120
LARGEST = 1e30  # losses are cut off here: the squares of larger ones overflow in the standard deviation
WIDE = 20.0  # an axis whose values span more than this factor is logarithmic
SLOW = 5.0  # the same for the time axis, by the slowest optimizer's time over the fastest's
WINDOW = ((-1.2, 1.5), (-1.0, 2.5))  # of the Rosenbrock function, x and y

Axis = Literal["step", "seconds"]
Array = npt.NDArray[np.float64]


def style(name: str) -> dict[str, Any]:
    """How the optimizer's line looks in every picture."""
    look: dict[str, Any] = {"color": COLORS.get(name, OTHER_COLOR), "linewidth": 1.5, "linestyle": "-"}
    if name == "LODO":
        return look | {"linewidth": 2.6, "zorder": 5}
    if name in SECOND_ORDER:
        return look | {"linestyle": (0, (6, 1.5, 1.2, 1.5))}
    return look | ({"linestyle": (0, (4, 1.5))} if name.startswith("LODO") else {})


def finished(runs: Sequence[Result]) -> list[Result]:
    return [run for run in runs if run["status"] == "finished"]


def final_losses(runs: Sequence[Result]) -> list[float]:
    return [float(run["final_loss"]) for run in finished(runs)]


def mean(values: Sequence[float]) -> float:
    with np.errstate(over="ignore"):
        return float(np.mean(values))


def by_label(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of each curve, the curve with the lowest final loss first; those that always diverged are the last."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result["job"]["label"], []).append(result)

    def rank(name: str) -> float:
        losses = final_losses(groups[name])
        return mean(losses) if losses else float("inf")

    return {name: groups[name] for name in sorted(groups, key=rank)}


def legend_label(name: str, runs: Sequence[Result]) -> str:
    diverged = len(runs) - len(finished(runs))
    return f"{name} ({diverged}/{len(runs)} diverged)" if diverged else name


def drawn(runs: Sequence[Result]) -> list[Result]:
    """The finished runs; where there are none, the diverged one that lasted longest."""
    return finished(runs) or [max(runs, key=lambda run: run["diverged_at"])]


def rebin(ends: Array, values: Array) -> tuple[Array, Array]:
    """Neighbouring bins of a curve merged to about `FEW_BINS`, by the mean of their losses."""
    width = -(-len(ends) // FEW_BINS)
    starts = np.arange(0, len(ends), width)
    counts = np.diff(np.append(starts, len(ends)))
    return ends[starts + counts - 1], np.add.reduceat(values, starts) / counts


def one_line(record: Mapping[str, Sequence[float]], by: Axis, metric: str, smooth: bool) -> tuple[Array, Array]:
    x = np.asarray(record.get(by, ()), dtype=np.float64)
    y = np.clip(np.asarray(record.get(metric, ()), dtype=np.float64), -LARGEST, LARGEST)
    if smooth and len(x) > MANY_BINS:
        x, y = rebin(x, y)
    return x, y


def lines(runs: Sequence[Result], source: str, by: Axis, metric: str, smooth: bool = False) -> tuple[Array, Array]:
    """The runs' record `metric` of `source` on one grid: x (points,), y (runs, points). Both are empty without any."""
    pairs = [one_line(run[source], by, metric, smooth) for run in runs]
    pairs = [(x, y) for x, y in pairs if len(x)]
    if not pairs:
        return np.empty(0), np.empty((0, 0))
    grid = pairs[0][0]
    if by == "seconds" and len(pairs) > 1:
        low, high = max(x[0] for x, _ in pairs), min(x[-1] for x, _ in pairs)
        grid = np.linspace(low, high, TIME_POINTS) if low < high else grid
    return grid, np.stack([np.interp(grid, x, y) for x, y in pairs])


def band(y: Array, log: bool) -> tuple[Array, Array]:
    """One standard deviation to either side of the mean over runs."""
    deviation = y.std(axis=0, ddof=1) if len(y) > 1 else np.zeros(y.shape[1])
    low, high = y.mean(axis=0) - deviation, y.mean(axis=0) + deviation
    # A logarithmic axis cannot show the part below zero: there the band ends at the lowest run.
    return (np.maximum(low, y.min(axis=0)) if log else low), high


def is_off(axes: Axes, y: Array) -> bool:
    """Whether all of the mean over runs lies above the axes."""
    return bool(y.size) and not axes.get_autoscaley_on() and y.mean(axis=0).min() > axes.get_ylim()[1]


def draw_lines(axes: Axes, name: str, runs: Sequence[Result], x: Array, y: Array, log: bool) -> None:
    """Mean and band of one optimizer; a cross where the last of its runs diverged."""
    off = is_off(axes, y)
    label = legend_label(name, runs) + (" (off the top)" if off else "")
    if off or not len(x):
        axes.plot([], [], label=label, **style(name))
        return
    axes.plot(x, y.mean(axis=0), label=label, **style(name))
    if len(y) > 1:
        axes.fill_between(x, *band(y, log), color=COLORS.get(name, OTHER_COLOR), alpha=0.15, linewidth=0)
    if not finished(runs):
        axes.plot(x[-1:], y.mean(axis=0)[-1:], "x", color=COLORS.get(name, OTHER_COLOR), markersize=8, clip_on=False)


def new_figure(width: float = 9.0, height: float = 4.8, count: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes, two to a row. It is not registered with pyplot, so nothing needs closing."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    columns, rows = min(2, count), -(-count // 2)
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def save(figure: Figure, path: Path, legend: bool = True) -> Path:
    """Writes the picture, with the legend of its first axes at the right of all."""
    for each in figure.axes:
        each.grid(which="major", color="#DDDDDD", linewidth=0.8)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    if legend:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9, handlelength=3)
    return write(figure, path)


def write(figure: Figure, path: Path) -> Path:
    """A PNG of at most 256 colours, which has a third of the size and looks the same."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = PIL.Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    # The lines' own colours are added to the most frequent ones: some are in the legend alone.
    own = np.rint(255 * to_rgba_array(list(COLORS.values()))[:, :3]).astype(np.uint8)
    frequent = np.reshape(image.quantize(256 - len(own)).getpalette() or [], (-1, 3))[: 256 - len(own)]
    # Pillow matches colours roughly: white stays white where no other is near.
    frequent[frequent.min(axis=1) > 247] = 255
    palette = PIL.Image.new("P", (1, 1))
    palette.putpalette([*frequent.ravel().tolist(), *own.ravel().tolist()])
    image.quantize(palette=palette, dither=PIL.Image.Dither.NONE).save(path, optimize=True)
    return path


def count_runs(groups: Mapping[str, Sequence[Result]]) -> str:
    """What the lines of a picture are, for its title."""
    most = max(len(drawn(runs)) for runs in groups.values())
    return "one run each" if most == 1 else f"mean and standard deviation of {most} runs"


def set_axes(axes: Axes, by: Axis, groups: Mapping[str, Sequence[Result]], title: str) -> None:
    axes.set_xlabel("step" if by == "step" else "seconds of training")
    axes.set_title(title, fontsize=11)
    if by == "step" and axes.get_xscale() == "linear":
        axes.xaxis.set_major_formatter("{x:,.0f}")
    times = [run["seconds"] for runs in groups.values() for run in drawn(runs)]
    if by == "seconds" and max(times) > SLOW * min(times) > 0:
        axes.set_xscale("log")


def loss_limits(losses: Sequence[float], floor: float | None) -> tuple[float, float]:
    """A linear axis around the losses at the end, that the start and the failures do not flatten."""
    known = [*losses, floor] if floor is not None else losses
    low, typical = min(known), float(np.median(losses))
    return low - 0.1 * abs(low), low + 2.5 * max(typical - low, 0.2 * abs(low))


def learning_curves(
    results: Sequence[Result],
    path: Path,
    by: Axis = "step",
    floor: float | None = None,
    common_time: float | None = None,
) -> Path:
    """The loss of every optimizer.

    Args:
        floor: the lowest loss that can be reached, a dotted line.
        common_time: where the losses of the same time are read off, a dotted line.
    """
    groups = by_label(results)
    exact = results[0]["job"]["task"] == "rosenbrock"
    losses = [loss for runs in groups.values() for loss in final_losses(runs)]
    spans = bool(losses) and max(losses) > WIDE * min(losses) > 0
    log = exact or (spans and floor is None)
    series = {name: lines(drawn(runs), "curve", by, "loss", smooth=not exact) for name, runs in groups.items()}
    figure, (axes,) = new_figure()
    if log:
        axes.set_yscale("log")
    elif losses:
        low, high = loss_limits(losses, floor)
        lowest = min(float(np.nanmin(y.mean(axis=0))) for _, y in series.values() if y.size)
        axes.set_ylim(min(low, lowest - 0.02 * (high - lowest)), high)
    for name, runs in groups.items():
        draw_lines(axes, name, runs, *series[name], log)
    if floor is not None:
        axes.axhline(floor, color="black", linestyle=":", linewidth=1.4, label=f"floor, {floor:.4g}")
    if common_time is not None and by == "seconds":
        axes.axvline(common_time, color="black", linestyle=":", linewidth=0.9, label=f"T = {common_time:.3g} s")
    set_axes(axes, by, groups, f"Training loss, {count_runs(groups)}")
    axes.set_ylabel("loss")
    return save(figure, path)


def metrics(results: Sequence[Result]) -> list[str]:
    """The names of the validation's figures."""
    names = dict.fromkeys(name for result in results for name in result["validation"])
    return [name for name in names if name not in ("step", "seconds")]


def validation_curves(results: Sequence[Result], path: Path, by: Axis = "step") -> Path:
    """Every figure on held-out data."""
    groups, names = by_label(results), metrics(results)
    figure, all_axes = new_figure(9.0 if len(names) == 1 else 11.5, 0.9 + 3.4 * -(-len(names) // 2), len(names))
    for axes, metric in zip(all_axes, names, strict=True):
        series = {name: lines(drawn(runs), "validation", by, metric) for name, runs in groups.items()}
        last = [float(y[:, -1].mean()) for x, y in series.values() if len(x)]
        log = min(last) > 0 and max(last) > WIDE * min(last)
        if log:
            axes.set_yscale("log")
        elif limits := metric_limits([y.mean(axis=0) for x, y in series.values() if len(x)]):
            axes.set_ylim(*limits)
        for name, runs in groups.items():
            draw_lines(axes, name, runs, *series[name], log)
        off = [name for name, (_, y) in series.items() if is_off(axes, y)]
        set_axes(axes, by, groups, metric.replace("_", " ") + (f"; off the top: {', '.join(off)}" if off else ""))
    figure.suptitle(f"Validation, {count_runs(groups)}", fontsize=11)
    return save(figure, path)


def metric_limits(curves: Sequence[Array]) -> tuple[float, float] | None:
    """Limits that a few failures do not stretch, or None where they stretch nothing."""
    last = np.array([curve[-1] for curve in curves])
    low = min(float(curve.min()) for curve in curves)
    top = float(np.median(last)) + 2 * (float(np.median(last)) - low)
    highest = max(float(curve.max()) for curve in curves)
    return (low - 0.05 * (top - low), top) if highest > top > low else None


def hessian_error(results: Sequence[Result], path: Path) -> Path:
    """||I - G H||_F / sqrt(n) over the steps, of every optimizer that has a G."""
    groups = {name: runs for name, runs in by_label(results).items() if any(run["hessian_error"] for run in runs)}
    series = {name: lines(drawn(runs), "hessian_error", "step", "value") for name, runs in groups.items()}
    means = np.concatenate([y.mean(axis=0) for _, y in series.values()])
    log = bool(np.nanmax(means) > 10 * np.nanmin(means))
    figure, (axes,) = new_figure(height=4.2)
    axes.set(xscale="log", yscale="log" if log else "linear", ylabel="||I - G H|| / sqrt(n)")
    for name, runs in groups.items():
        draw_lines(axes, name, runs, *series[name], log=log)
    set_axes(axes, "step", groups, f"Hessian error, {count_runs(groups)}")
    return save(figure, path)


def sweep(
    points: Mapping[float, Sequence[Result]],
    path: Path,
    name: str,
    axis: str,
    floor: float | None = None,
    scales: Mapping[float, float] | None = None,
    ylabel: str = "loss",
) -> Path:
    """The final loss over a swept quantity.

    Args:
        points: the runs at each value.
        scales: what the losses are divided by, by value; nothing unless given.
    """
    values = sorted(points)
    scaled = {
        value: [loss / (scales or {}).get(value, 1.0) for loss in final_losses(points[value])] for value in values
    }
    kept = [value for value in values if scaled[value]]
    means = np.array([mean(scaled[value]) for value in kept])
    deviations = [deviation(scaled[value]) or 0.0 for value in kept]
    figure, (axes,) = new_figure(width=7.5, height=4.2)
    set_value_axis(axes, values)
    log = len(means) > 0 and means.max() > WIDE * means.min() > 0
    if log:
        axes.set_yscale("log")
        deviations = [min(std, 0.9 * each) for std, each in zip(deviations, means, strict=True)]
    axes.errorbar(kept, means, deviations, color=COLORS["LODO"], marker="o", markersize=5, linewidth=1.8, capsize=4)
    if floor is not None:
        axes.axhline(floor, color="black", linestyle=":", linewidth=1.4)
        place = axes.get_yaxis_transform()
        axes.annotate(
            f"floor, {floor:.4g}", (0.01, floor), (0, 4), xycoords=place, textcoords="offset points", fontsize=9
        )
    mark_diverged(axes, points, {value: mean(scaled[value]) for value in kept})
    axes.set(xlabel=axis, ylabel=ylabel)
    counts = [len(runs) for runs in points.values()]
    runs_text = "one run" if max(counts) == 1 else f"mean and standard deviation of {max(counts)} runs"
    axes.set_title(f"Sweep: {name}, {runs_text} at each point", fontsize=11)
    return save(figure, path, legend=False)


def deviation(values: Sequence[float]) -> float | None:
    """The sample standard deviation; None of a single value."""
    if len(values) < 2:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.std(values, ddof=1))


def set_value_axis(axes: Axes, values: Sequence[float]) -> None:
    """A tick at every value, logarithmic where they span much; zero then has a place of its own."""
    positive = [value for value in values if value > 0]
    if min(values) >= 0 and positive and max(positive) > WIDE * min(positive):
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.5)
        axes.set_xlim((-0.25 if min(values) == 0 else 0.8) * min(positive), 1.3 * max(positive))
    axes.set_xticks(values, [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in values])
    axes.minorticks_off()


def mark_diverged(axes: Axes, points: Mapping[float, Sequence[Result]], heights: Mapping[float, float]) -> None:
    """Writes at each value how many of its runs diverged; on the upper edge where all did."""
    side = {min(points): "left", max(points): "right"}
    for value, runs in points.items():
        count = len(runs) - len(finished(runs))
        if not count:
            continue
        text = f"{count}/{len(runs)} diverged"
        if value in heights:
            axes.annotate(text, (value, heights[value]), (0, 12), textcoords="offset points", ha="center", fontsize=8)
        else:
            edge = axes.get_xaxis_transform()
            axes.plot([value], [1.0], "x", color=COLORS["LODO"], transform=edge, clip_on=False, markersize=8)
            axes.annotate(
                text,
                (value, 1.0),
                (0, -16),
                xycoords=edge,
                textcoords="offset points",
                ha=side.get(value, "center"),
                fontsize=8,
            )


def trajectories(results: Sequence[Result], path: Path) -> Path:
    """Each optimizer's way over the Rosenbrock function: its run of the lowest seed that has one."""
    figure, (axes,) = new_figure(width=8.4, height=5.8)
    draw_rosenbrock(figure, axes)
    for name, runs in by_label(results).items():
        kept = sorted((run for run in runs if run["trajectory"]), key=lambda run: int(run["job"]["seed"]))
        if kept:
            way = np.clip(np.asarray(kept[0]["trajectory"], dtype=np.float64), -LARGEST, LARGEST)
            label = legend_label(name, runs) + ("" if inside(way[-1]) else " (ends outside)")
            look = style(name) | {"linestyle": "-"}
            look["path_effects"] = [Stroke(linewidth=look["linewidth"] + 2.5, foreground="white"), Normal()]
            axes.plot(way[:, 0], way[:, 1], label=label, **look)
            axes.plot(way[:, 0], way[:, 1], "o", markersize=3.2, color=look["color"], zorder=look.get("zorder", 2))
    axes.plot(*START, "s", color="black", markersize=7, label="start", zorder=6)
    axes.plot(*MINIMUM, "*", color="black", markersize=15, markeredgecolor="white", label="minimum", zorder=6)
    axes.set(xlim=WINDOW[0], ylim=WINDOW[1], xlabel="x", ylabel="y")
    axes.set_title("Trajectories, one run each", fontsize=11)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return write(figure, path)


def draw_rosenbrock(figure: Figure, axes: Axes) -> None:
    """log10 f in steps, light enough for lines on it."""
    x, y = np.meshgrid(np.linspace(*WINDOW[0], 300), np.linspace(*WINDOW[1], 300))
    f = rosenbrock(torch.from_numpy(x), torch.from_numpy(y)).numpy()
    levels = np.arange(-4.0, 1.51, 0.5)
    greys = LinearSegmentedColormap.from_list("pale greys", ["#FFFFFF", "#B4B4B4"])
    filled = axes.contourf(x, y, np.log10(np.maximum(f, 1e-300)), levels, cmap=greys, extend="both")
    figure.colorbar(filled, ax=axes, label="log10 f", shrink=0.8, pad=0.02)


def inside(point: Array) -> bool:
    return all(low <= value <= high for value, (low, high) in zip(point, WINDOW, strict=True))


def image_grid(images: npt.NDArray[np.uint8], path: Path, zoom: int = 2) -> Path:
    """Grey images, (count, height, width), row by row in a grid about as high as wide, with a thin border between."""
    count, height, width = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    cells = np.full((rows * columns, height + 1, width + 1), 96, dtype=np.uint8)
    cells[:count, :height, :width] = images
    sheet = cells.reshape(rows, columns, height + 1, width + 1).swapaxes(1, 2).reshape(rows * (height + 1), -1)
    sheet = sheet[:-1, :-1].repeat(zoom, axis=0).repeat(zoom, axis=1)
    PIL.Image.fromarray(sheet).save(path, optimize=True)
    return path
