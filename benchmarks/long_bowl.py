"""How LODO does without tuning on the paper's noisy bowl, over a long run: its loss, and how near G comes to 1 / H.

    python -m benchmarks.long_bowl    # 100,000 steps, three walks of the centre, some ten minutes on one thread

Writes long_bowl.jsonl, a line for each run, and made of these long_bowl.md and long_bowl.png. Goes on with what the
first lacks; delete a line, or the file, to measure anew.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from tqdm import tqdm

import lodo
from examples.paper.tasks.bowl import NoisyBowl

CALLS: dict[str, Callable[[list[torch.Tensor]], lodo.LODO]] = {
    "lodo.AutoLODO": lodo.AutoLODO,
    'with preconditioner="identity"': partial(lodo.LODO, **{**lodo.RECOMMENDED, "preconditioner": "identity"}),
}
WALKS = (0, 1, 2)
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the steps, after which G is looked at
COLORS = ("#0072B2", "#D55E00")

Record = dict[str, Any]


def hessian_error(optimizer: lodo.LODO, h: torch.Tensor) -> float:
    """||I - G H||_F / sqrt(n), exactly: `lodo.hessian_error` estimates it."""
    g = optimizer.preconditioners[0]
    assert g is not None
    error = torch.eye(len(h), dtype=h.dtype) - optimizer.param_groups[0]["lr"] * g.to_dense() @ h
    return float(torch.linalg.matrix_norm(error)) / len(h) ** 0.5


def run(call: str, walk: int, steps: int) -> Record:
    """One training: the mean loss over the last tenth of the steps, and the Hessian error on the way."""
    task = NoisyBowl(seed=0, walk_seed=walk)
    optimizer = CALLS[call](task.params)
    losses, errors, at = [], [], sorted({max(1, round(share * steps)) for share in SHARES})
    for step in tqdm(range(1, steps + 1), desc=f"{call}, walk {walk}", leave=False):
        task.draw()
        losses.append(task.backward())
        optimizer.step()
        if step in at:
            errors.append(hessian_error(optimizer, task.h))
    last = losses[-max(1, steps // 10) :]
    return {"call": call, "walk": walk, "steps": steps, "loss": sum(last) / len(last), "at": at, "errors": errors}


def measured(path: Path, steps: int) -> list[Record]:
    """All runs of so many steps: those on record, and those that were missing, which are put on record."""
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for call in CALLS:
        for walk in WALKS:
            if not any((own["call"], own["walk"], own["steps"]) == (call, walk, steps) for own in records):
                records.append(run(call, walk, steps))
                with path.open("a") as file:
                    file.write(json.dumps(records[-1]) + "\n")
    return [own for own in records if own["steps"] == steps]


def report(records: Sequence[Record], steps: int) -> str:
    floor = NoisyBowl(seed=0).floor
    at = records[0]["at"]
    lines = [
        f"# Without tuning on the noisy bowl, {steps:,} steps",
        "",
        f"The paper's task (section 5.1, n = 100, float64), {len(WALKS)} walks of the centre; median and range over "
        f"them. Made by `python -m benchmarks.long_bowl --steps {steps}`.",
        "",
        f"Mean loss over the last tenth of the steps; the floor, with the true Hessian, is {floor:.2f}:",
        "",
        "| call | loss | range |",
        "|:--|--:|--:|",
    ]
    for call in CALLS:
        losses = [own["loss"] for own in records if own["call"] == call]
        lines.append(f"| {call} | {statistics.median(losses):.2f} | {min(losses):.2f} to {max(losses):.2f} |")
    lines += ["", "Hessian error, the Frobenius norm of I - G H over sqrt(n):", ""]
    lines += [f"| step | {' | '.join(CALLS)} |", "|--:|" + "--:|" * len(CALLS)]
    for index, step in enumerate(at):
        cells = []
        for call in CALLS:
            errors = [own["errors"][index] for own in records if own["call"] == call]
            cells.append(f"{statistics.median(errors):.3f} ({min(errors):.3f} to {max(errors):.3f})")
        lines.append(f"| {step:,} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "![Hessian error over the steps](long_bowl.png)", ""])


def draw(records: Sequence[Record], path: Path) -> None:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for call, color in zip(CALLS, COLORS, strict=True):
        for walk, own in enumerate(record for record in records if record["call"] == call):
            axes.loglog(own["at"], own["errors"], ".-", color=color, alpha=0.7, label=call if walk == 0 else None)
    axes.set(xlabel="step", ylabel="Hessian error")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    folder = Path(__file__).parent / "results" / "long_bowl"
    parser.add_argument("--steps", type=int, default=100_000, help="of a run (default: 100,000)")
    parser.add_argument("--out", type=Path, default=folder, metavar="DIR", help=f"(default: {folder})")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    torch.set_num_threads(1)  # a small task, which gains nothing from more
    options.out.mkdir(parents=True, exist_ok=True)
    records = measured(options.out / "long_bowl.jsonl", options.steps)
    text = report(records, options.steps)
    (options.out / "long_bowl.md").write_text(text)
    draw(records, options.out / "long_bowl.png")
    print(f"{text}\nIn {options.out}.")


if __name__ == "__main__":
    main()
