"""What a run of `benchmarks.training_throughput` leaves behind: CSV, Markdown, a figure, the headline ratios."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks import report

COLUMNS = (
    "optimizer",
    "mode",
    "steps/s",
    "20 to 80 %",
    "of AdamW's",
    "20 to 80 %",
    "state B/param",
    "peak MB",
    "loss",
    "note",
)


@dataclass
class Row:
    """One optimizer on one network: a line of the CSV. Where there is no figure the note says why."""

    date: str
    torch: str
    device: str
    software: str
    network: str
    params: int
    optimizer: str
    mode: str
    steps_per_s: float | None = None
    p20_steps_per_s: float | None = None
    p80_steps_per_s: float | None = None
    ratio_to_adamw: float | None = None
    p20_ratio: float | None = None
    p80_ratio: float | None = None
    state_bytes_per_param: float | None = None
    peak_mb: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    note: str = ""


def cells(row: Row) -> tuple[str, ...]:
    spread = f"{report.number(row.p20_steps_per_s)} to {report.number(row.p80_steps_per_s)}" if row.steps_per_s else ""
    ratios = f"{report.number(row.p20_ratio)} to {report.number(row.p80_ratio)}" if row.ratio_to_adamw else ""
    losses = f"{report.number(row.first_loss)} to {report.number(row.last_loss)}" if row.steps_per_s else ""
    memory = (report.number(row.state_bytes_per_param), report.number(row.peak_mb))
    speed, ratio = report.number(row.steps_per_s), report.number(row.ratio_to_adamw)
    return (row.optimizer, row.mode, speed, spread, ratio, ratios, *memory, losses, row.note)


def markdown(rows: Sequence[Row], command: str) -> str:
    first = rows[0]
    parts = ["# Training steps per second", f"{first.date}: {first.device}, {first.software or 'no accelerator'}, "]
    parts[-1] += f"torch {first.torch}, `{command}`"
    for network in dict.fromkeys(row.network for row in rows):
        mine = [row for row in rows if row.network == network]
        parts.append(f"## {network}, {mine[0].params:,} parameters")
        marks = [":---" if name in ("optimizer", "mode", "note") else "---:" for name in COLUMNS]
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in (COLUMNS, marks, *map(cells, mine))))
    parts += ["## Headlines", "\n".join(f"- {line}" for line in headlines(rows))]
    return "\n\n".join(parts) + "\n"


def headlines(rows: Sequence[Row]) -> list[str]:
    """Speeds relative to AdamW's, a line for each network and mode."""
    lines = []
    for network, mode in dict.fromkeys((row.network, row.mode) for row in rows):
        mine = [row for row in rows if (row.network, row.mode) == (network, mode) and row.ratio_to_adamw]
        figures = [f"{row.optimizer} {report.number(row.ratio_to_adamw)}" for row in mine]
        lines.append(f"{network}, {mode}, steps per second over those of {report.ADAMW}: " + "; ".join(figures[1:]))
    return lines


def write(rows: Sequence[Row], command: str, folder: Path) -> None:
    """training_throughput.csv, .md and .png."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "training_throughput.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            numbers = {k: f"{v:.6g}" for k, v in asdict(row).items() if isinstance(v, float)}
            writer.writerow(asdict(row) | numbers)
    (folder / "training_throughput.md").write_text(markdown(rows, command))
    panels: dict[str, list[report.Bar]] = {}
    for row in filter(lambda row: row.ratio_to_adamw, rows):
        panels.setdefault(f"{row.network}, {row.mode}", []).append(bar(row))
    label = "training steps per second over those of fused AdamW"
    report.plot_bars(panels, label, folder / "training_throughput.png")


def bar(row: Row) -> report.Bar:
    return row.optimizer, row.ratio_to_adamw or 0, row.p20_ratio or 0, row.p80_ratio or 0
