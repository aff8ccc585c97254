"""What a run of `benchmarks.step_time` leaves behind: a table, CSV, Markdown, a figure, the headline ratios."""

import argparse
import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

FULL = "LODO full"
FULL_SHUFFLE = "LODO full, shuffle"
FULL_RANDOM = "LODO full, random"
LEAN = "LODO lean"
LEAN_SHUFFLE = "LODO lean, shuffle"  # the same, beside the random one
LEAN_RANDOM = "LODO lean, random"
PLAIN = "LODO full, random, plain torch"
COMPILED_SHUFFLE = "LODO full, shuffle, torch.compile"
COMPILED_RANDOM = "LODO full, random, torch.compile"
ADAMW = "AdamW, fused"
MUON = "Muon"
SOAP = "SOAP"
SHAMPOO = "Shampoo"

BFLOAT16 = ", bf16 moments"  # at the end of a network's name
GRAPH = ", graph"  # at the end of the name of what is replayed as a CUDA graph

PAPER_SIZE = 95_000
COLUMNS = (
    "optimizer",
    "n",
    "dtype",
    "median ms",
    "p20",
    "p80",
    "mean",
    "limit ms",
    "ratio",
    "state B/param",
    "peak B/param",
    "peak/state",
    "note",
)
LEFT_ALIGNED = ("optimizer", "dtype", "note")
# Okabe and Ito's palette, which survives colour blindness and greyscale: LODO warm or blue and solid, the others muted.
STYLES: dict[str, dict[str, str]] = {
    FULL_SHUFFLE: {"color": "#D55E00", "marker": "o"},
    FULL_RANDOM: {"color": "#E69F00", "marker": "s"},
    PLAIN: {"color": "#C9A66B", "marker": "v", "linestyle": (0, (4, 1))},  # type: ignore[dict-item]
    LEAN: {"color": "#0072B2", "marker": "o"},
    LEAN_SHUFFLE: {"color": "#0072B2", "marker": "o"},
    LEAN_RANDOM: {"color": "#56B4E9", "marker": "s"},
    SHAMPOO: {"color": "#6A5ACD", "marker": "D"},
    SOAP: {"color": "#009E73", "marker": "D"},
    MUON: {"color": "#999999", "marker": "^"},
    ADAMW: {"color": "#333333", "marker": "^"},
}
BURSTY = (SOAP, SHAMPOO)


@dataclass
class Row:
    """One optimizer at one size: a line of the CSV. Where there is no figure the note says why."""

    date: str
    torch: str
    cpu: str
    threads: int
    optimizer: str
    n: int
    dtype: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    mean_ms: float | None = None
    limit_ms: float | None = None
    ratio_to_limit: float | None = None
    state_bytes_per_param: float | None = None
    peak_bytes_per_param: float | None = None
    note: str = ""
    copy_gb_per_s: float | None = None
    software: str = ""

    @property
    def peak_over_state(self) -> float | None:
        return divide(self.peak_bytes_per_param, self.state_bytes_per_param)


def network_name(size: str, permutation: str, moments: str | None) -> str:
    return f"{size}, {permutation}" + BFLOAT16 * (moments is not None)


def machine(row: Row) -> str:
    """What did the work, with the threads of a processor or the software of an accelerator."""
    return f"{row.cpu}, {row.software or f'{row.threads} thread' + 's' * (row.threads != 1)}"


def command_of(args: argparse.Namespace) -> str:
    """The command line, with what its defaults stood for."""
    sizes = " ".join(str(n) for n in args.sizes if n <= args.max_n)
    options = " ".join(f"--{name} {getattr(args, name):g}" for name in ("rounds", "repetitions", "seconds", "threads"))
    more = f" --device {args.device}" * (args.device != "cpu") + " --compile" * args.compile
    more += " --every-network" * (args.device == "cpu" and args.every_network)
    more += f" --budget {args.budget:g}" * (args.budget < math.inf)
    more += f" --only {' '.join(args.only)}" * (args.only != [""])
    return f"python -m benchmarks.step_time --sizes {sizes} {options}{more}"


def divide(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def write(rows: Sequence[Row], command: str, folder: Path) -> None:
    """step_time.csv, step_time.md and step_time.png of one run."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "step_time.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            numbers = {name: f"{value:.6g}" for name, value in asdict(row).items() if isinstance(value, float)}
            writer.writerow(asdict(row) | numbers)
    (folder / "step_time.md").write_text(markdown(rows, command))
    plot(rows, folder / "step_time.png")


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits where that needs no exponent, nothing for None."""
    if value is None:
        return ""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 4
    return f"{value:.{decimals}f}{unit}"


def cells(row: Row) -> tuple[str, ...]:
    times = (row.median_ms, row.p20_ms, row.p80_ms, row.mean_ms, row.limit_ms, row.ratio_to_limit)
    memory = (row.state_bytes_per_param, row.peak_bytes_per_param, row.peak_over_state)
    notes = [row.note] if row.note else []
    if row.dtype == "float64" and row.median_ms:
        notes.insert(0, f"{1000 / row.median_ms:,.0f} steps/s")
    return (row.optimizer, f"{row.n:,}", row.dtype, *map(number, times), *map(number, memory), "; ".join(notes))


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, sizes set apart by an empty line."""
    lines = [cells(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *lines, strict=True)]
    pad = [str.ljust if name in LEFT_ALIGNED else str.rjust for name in COLUMNS]
    text = ["  ".join(p(c, w) for p, c, w in zip(pad, line, widths, strict=True)) for line in (COLUMNS, *lines)]
    sizes = [(row.n, row.dtype) for row in rows]
    gaps = ["", *("\n" if index == 0 or sizes[index - 1] != size else "" for index, size in enumerate(sizes))]
    return "\n".join(gap + line.rstrip() for gap, line in zip(gaps, text, strict=True))


def markdown(rows: Sequence[Row], command: str) -> str:
    first = rows[0]
    marks = [":---" if name in LEFT_ALIGNED else "---:" for name in COLUMNS]
    lines = ["| " + " | ".join(line) + " |" for line in (COLUMNS, marks, *map(cells, rows))]
    header = f"{first.date}: {machine(first)}, torch {first.torch}, `{command}`"
    parts = (
        "# Time of one optimizer step",
        header,
        "\n".join(lines),
        "![Step time](step_time.png)",
        "## Headlines",
        "\n".join(f"- {line}" for line in headlines(rows)),
    )
    return "\n\n".join(parts) + "\n"


def headlines(rows: Sequence[Row]) -> list[str]:
    """The ratios that the project is judged by, as far as their rows were measured."""
    found = {(row.optimizer, row.n, row.dtype): row for row in rows if row.median_ms is not None}

    def get(name: str, n: int = PAPER_SIZE, dtype: str = "float32") -> Row | None:
        return found.get((name, n, dtype))

    shuffle, random, plain, lean, soap = map(get, (FULL_SHUFFLE, FULL_RANDOM, PLAIN, LEAN, SOAP))
    lines = [
        (f"n = {PAPER_SIZE:,}: full, shuffle / copy limit", shuffle and number(shuffle.ratio_to_limit, "x")),
        (f"n = {PAPER_SIZE:,}: full, random / copy limit", random and number(random.ratio_to_limit, "x")),
    ]
    if shuffle and plain:
        ratio = divide(plain.median_ms, shuffle.median_ms)
        lines.append((f"n = {PAPER_SIZE:,}: plain torch, random / full, shuffle", number(ratio, "x")))
    if lean and soap:
        means = f"{number(divide(lean.mean_ms, soap.mean_ms))} by the mean over whole cycles"
        medians = f"{number(divide(lean.median_ms, soap.median_ms))} by the median"
        lines.append((f"n = {PAPER_SIZE:,}: lean / SOAP step", f"{means}, {medians}"))
    largest = max((row.n for row in found.values() if row.optimizer == LEAN), default=0)
    wide, base = get(LEAN, largest), get(LEAN, 100_000)
    if wide and base and largest > 100_000:
        ratio = divide(wide.ratio_to_limit, base.ratio_to_limit)
        lines.append((f"lean: ratio to the limit at n = {largest:,} / at n = 100,000", number(ratio)))
    for row in rows:
        if row.optimizer in (FULL_SHUFFLE, FULL_RANDOM) and row.dtype == "float64" and row.median_ms:
            lines.append((f"n = {row.n:,}, float64: {row.optimizer}", f"{1000 / row.median_ms:,.0f} steps/s"))
        if row.optimizer in (FULL_SHUFFLE, FULL_RANDOM, LEAN) and row.n == 1_000_000 and row.peak_over_state:
            lines.append((f"n = {row.n:,}: {row.optimizer}, peak memory / state", number(row.peak_over_state)))
    return [f"{what}: {figure}" for what, figure in lines if figure] + network_headlines(found)


def network_headlines(found: dict[tuple[str, int, str], Row]) -> list[str]:
    """For each size, where every network was measured: ratios to the copy limit, and to AdamW by the median."""
    lines = []
    for suffix in (GRAPH, ""):
        for n in sorted({n for name, n, dtype in found if name == LEAN_SHUFFLE + suffix and dtype == "float32"}):
            parts = []
            adamw = found.get((ADAMW + suffix, n, "float32"))
            for network in (FULL_SHUFFLE, LEAN_SHUFFLE, LEAN_SHUFFLE + BFLOAT16):
                row = found.get((network + suffix, n, "float32"))
                if row:
                    ratio = divide(row.median_ms, adamw.median_ms if adamw else None)
                    parts.append(f"{network} {number(row.ratio_to_limit, 'x')} its copy limit")
                    parts[-1] += f" and {number(ratio, 'x')} {ADAMW}" if ratio else ""
            lines.append(f"n = {n:,}, {'replayed graphs' if suffix else 'eager'}: " + "; ".join(parts))
    speeds = [row.copy_gb_per_s for (name, *_), row in found.items() if row.copy_gb_per_s and LEAN_SHUFFLE in name]
    if speeds:
        lines.append(f"copy bandwidth: {min(speeds):,.0f} to {max(speeds):,.0f} GB/s, read and written")
    return lines


def plot(rows: Sequence[Row], path: Path) -> None:
    """Step time against n, float32, with the spread as a band and the copy limits dashed; graphs in a second panel."""
    plt.switch_backend("Agg")
    # The paper's size and 100,000 would lie on each other.
    crowded = {row.n for row in rows} >= {PAPER_SIZE, 100_000}
    measured = [row for row in rows if row.dtype == "float32" and row.median_ms is not None]
    measured = [row for row in measured if not (crowded and row.n == 100_000)]
    if not measured:
        return
    suffixes = ["", GRAPH] if any(row.optimizer.endswith(GRAPH) for row in measured) else [""]
    size = (9.5, 5.6) if len(suffixes) == 1 else (14.5, 5.6)
    figure, panels = plt.subplots(1, len(suffixes), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes, suffix in zip(panels[0], suffixes, strict=True):
        _draw_panel(axes, measured, suffix)
        axes.set(xscale="log", yscale="log", xlabel="number of parameters n")
        axes.grid(which="major", color="#DDDDDD", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("time of one step, ms")
    title = f"One optimizer step, float32, {machine(measured[0])}"
    if len(suffixes) == 1:
        panels[0, 0].set_title(title, fontsize=11)
    else:
        figure.suptitle(title, fontsize=11)
        panels[0, 0].set_title("called from Python", fontsize=10)
        panels[0, 1].set_title("replayed as a CUDA graph", fontsize=10)
    order = sorted(zip(*panels[0, 0].get_legend_handles_labels(), strict=True), key=lambda pair: -_last(pair[0]))
    handles, labels = zip(*order, strict=True)
    panels[0, -1].legend(handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_panel(axes: Axes, measured: Sequence[Row], suffix: str) -> None:
    """The lines of the optimizers whose names end in `suffix`; bfloat16 moments are dotted."""
    dotted = {name + BFLOAT16: {**style, "linestyle": ":", "mfc": "none"} for name, style in STYLES.items()}
    for name, style in (STYLES | dotted).items():
        points = [row for row in measured if row.optimizer == name + suffix]
        if points:
            ns = [row.n for row in points]
            times = [row.mean_ms if name in BURSTY else row.median_ms for row in points]
            label = f"{name} (mean of whole cycles)" if name in BURSTY else name
            axes.plot(ns, times, label=label, linewidth=1.8, markersize=5, **style)  # type: ignore[arg-type]
            if name not in BURSTY:
                low, high = [row.p20_ms for row in points], [row.p80_ms for row in points]
                axes.fill_between(ns, low, high, color=style["color"], alpha=0.18, linewidth=0)  # type: ignore[arg-type]
    limits_of = ((FULL_SHUFFLE, "full"), (LEAN, "lean"), (LEAN_SHUFFLE, "lean"))
    for name, size in limits_of:
        limits = [(row.n, row.limit_ms) for row in measured if row.optimizer == name + suffix and row.limit_ms]
        if limits:
            color, label = STYLES[name]["color"], f"copy limit, {size} network"
            axes.plot(*zip(*limits, strict=True), "--", color=color, linewidth=1.2, alpha=0.8, label=label)


def _last(line: object) -> float:
    """Height of a line at its right end, relative to n, so that the legend follows the order of the lines."""
    x, y = line.get_data()  # type: ignore[attr-defined]
    return float(y[-1] / x[-1])


Bar = tuple[str, float, float, float]  # name, height, ends of the spread


def plot_bars(panels: dict[str, list[Bar]], label: str, path: Path) -> None:
    """Horizontal bars with their spreads, a panel for each title."""
    plt.switch_backend("Agg")
    panels = {title: bars for title, bars in panels.items() if bars}
    if not panels:
        return
    rows = (len(panels) + 1) // 2
    figure, grid = plt.subplots(
        rows, min(2, len(panels)), figsize=(14, 3.4 * rows), layout="constrained", squeeze=False
    )
    for axes, (title, bars) in zip(grid.flat, panels.items(), strict=False):
        names, heights, low, high = zip(*bars, strict=True)
        colors = [STYLES.get(name.removesuffix(BFLOAT16), {"color": "#999999"})["color"] for name in names]
        axes.barh(names, heights, color=colors, alpha=0.85)
        axes.hlines(names, low, high, color="black", linewidth=1.2)
        axes.axvline(1, color="#333333", linewidth=0.8, linestyle="--")
        axes.invert_yaxis()
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(label, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
