"""The time of a step with this checkout of lodo, relative to that with another: what a change costs.

    git worktree add ../before COMMIT
    python -m benchmarks.step_against ../before

Both run in processes of their own, one after the other in turns, on one thread; of each the minimum of the medians of
its stretches of steps counts, and the ratio's spread is over the turns. Gradients are given: there is no model.
Writes step_against.md and its .csv to --out.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "3,000 in 6": [(32, 40), (32,), (32, 48), (32,), (4, 32), (4,)],
    "95,000 in 20": [(64, 64), (64,)] * 8 + [(240, 200), (240,), (60, 240), (60,)],
    "600,000 in 12": [(256, 256), (256,)] * 4 + [(512, 512), (512,), (128, 512), (128,)],
}
CALLS = ("AutoLODO", 'AutoLODO, base="adam"', "the paper's method, lean", "the paper's method")
STRETCHES, BUDGET = 10, 0.15  # of steps, and seconds that each takes


def optimizer_of(call: str, params: list[torch.nn.Parameter]) -> Any:
    import lodo

    if call.startswith("AutoLODO"):
        return lodo.AutoLODO(params, base="adam" if "adam" in call else "soap")
    lean: dict[str, Any] = {"depth": 4, "expansion": 1, "permutation": "shuffle"} if "lean" in call else {}
    return lodo.LODO(params, lr=1e-3, **lean)


def seconds(call: str, shapes: Sequence[tuple[int, ...]]) -> float:
    """The least median over the stretches."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = optimizer_of(call, params)
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(8)]

    def step(index: int) -> float:
        for p, g in zip(params, gradients[index % 8], strict=True):
            p.grad = g
        begin = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - begin

    first = min(step(index) for index in range(20))
    count = max(20, min(2000, int(BUDGET / first)))
    return min(statistics.median(step(index) for index in range(count)) for _ in range(STRETCHES))


def in_checkout(folder: Path, call: str, sizes: str) -> float:
    """`seconds` with the lodo of a folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", call, sizes]
    found = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout
    return float(json.loads(found))


def compare(before: Path, turns: int, report: Callable[[str], None]) -> list[dict[str, Any]]:
    after, rows = Path(__file__).resolve().parents[1], []
    for sizes in SHAPES:
        for call in CALLS:
            if call.startswith("the paper") and sizes.startswith("600"):
                continue  # up to a second a step
            pairs = [(in_checkout(before, call, sizes), in_checkout(after, call, sizes)) for _ in range(turns)]
            ratios = [new / old for old, new in pairs]
            best = [min(column) for column in zip(*pairs, strict=True)]
            rows.append(
                {
                    "call": call,
                    "parameters": sizes,
                    "before_us": round(best[0] * 1e6, 1),
                    "after_us": round(best[1] * 1e6, 1),
                    "ratio_of_minima": round(best[1] / best[0], 3),
                    "ratio_median": round(statistics.median(ratios), 3),
                    "ratio_min": round(min(ratios), 3),
                    "ratio_max": round(max(ratios), 3),
                }
            )
            report(str(rows[-1]))
    return rows


def write(rows: list[dict[str, Any]], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "step_against.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| call | parameters | before, us | after, us | ratio of the minima | of turns: median (least to most) |"]
    lines.append("|:--|--:|--:|--:|--:|--:|")
    for row in rows:
        spread = f"{row['ratio_median']} ({row['ratio_min']} to {row['ratio_max']})"
        numbers = (row["before_us"], row["after_us"], row["ratio_of_minima"], spread)
        lines.append(f"| {row['call']} | {row['parameters']} | {' | '.join(map(str, numbers))} |")
    (out / "step_against.md").write_text(f"torch {torch.__version__}, one thread.\n\n" + "\n".join(lines) + "\n")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(seconds(sys.argv[2], SHAPES[sys.argv[3]])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="folder of the other checkout")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step_against"))
    arguments = parser.parse_args()
    write(compare(arguments.before.resolve(), arguments.turns, lambda line: print(line, flush=True)), arguments.out)


if __name__ == "__main__":
    main()
