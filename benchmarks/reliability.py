"""Breaks LODO's trainings in every way we could think of, and counts what was lost: it must be nothing.

    python -m benchmarks.reliability                        # all parts, some forty minutes on two CPU cores
    python -m benchmarks.reliability kills corruption       # some of them
    python -m benchmarks.reliability kills --kills 1000 --out out/reliability
    python -m benchmarks.reliability report                 # the table again, from the results that are there

Every result is on the disk once it is there, in --out, and the same command goes on where it was cut off. The exit
code is 1 if anything was lost. docs/reliability.md says what the parts are and what LODO promises.
"""

import argparse
import json
import math
import platform
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import lodo
from benchmarks.faults import bad_gradients, broken_steps, corruption, divergence, kills
from examples.checkpoints import write_whole

OUT = Path(__file__).parent / "results" / "reliability"
Record = dict[str, Any]
Row = tuple[str, str, str, int]


@dataclass(frozen=True)
class Part:
    """One kind of fault.

    Attributes:
        cases: the names of all that is injected.
        run: injects one and says what happened.
        rows: the lines of the table: what was injected, how often, what happened, and how much was lost.
    """

    cases: Callable[[argparse.Namespace], list[str]]
    run: Callable[[str, argparse.Namespace], Record]
    rows: Callable[[dict[str, Record]], list[Row]]


# ---- the lines of the table ------------------------------------------------------------------------------------------


def tally(outcomes: Counter[str]) -> str:
    return ", ".join(f"{outcome}: {count:,}" for outcome, count in sorted(outcomes.items()))


def lost(outcomes: Counter[str], good: Sequence[str]) -> int:
    return sum(count for outcome, count in outcomes.items() if outcome not in good)


def rows_of_kills(found: dict[str, Record]) -> list[Row]:
    outcomes: Counter[str] = Counter()
    for record in found.values():
        outcomes.update(record["outcomes"])
    count, within, parts = (
        sum(record[name] for record in found.values()) for name in ("kills", "within a save", "left a part of a file")
    )
    equal = sum(record["the end is that of a run nobody killed"] for record in found.values())
    what = f"a training process killed (SIGKILL), {within:,} times within a save; {parts:,} kills left a part of a file"
    happened = f"{tally(outcomes)}; {equal} of {len(found)} trainings ended bit for bit as one that nobody killed"
    unseen = count - outcomes.total()  # a kill after which nothing was looked at
    return [(what, f"{count:,}", happened, lost(outcomes, kills.GOOD) + len(found) - equal + unseen)]


def rows_of_corruption(found: dict[str, Record]) -> list[Row]:
    outcomes: dict[str, Counter[str]] = {}
    alone: dict[str, Counter[str]] = {}
    for name, record in found.items():
        kind = name.split("; ")[0]
        outcomes.setdefault(kind, Counter())[record["outcome"]] += 1
        if "torch alone" in record:
            alone.setdefault(kind, Counter())[record["torch alone"]] += 1
    notes = {kind: f" (`torch.load` and `load_state_dict` alone: {tally(counter)})" for kind, counter in alone.items()}
    return [
        (
            f"checkpoint: {kind}",
            f"{counter.total():,}",
            tally(counter) + notes.get(kind, ""),
            lost(counter, corruption.GOOD),
        )
        for kind, counter in outcomes.items()
    ]


def rows_of_bad_gradients(found: dict[str, Record]) -> list[Row]:
    sums: Counter[str] = Counter()
    for record in found.values():
        sums.update({name: value for name, value in record.items() if type(value) is int})
    exact = sum(record["counted exactly"] for record in found.values())
    happened = (
        f"skipped and counted exactly in {exact} of {len(found)} runs; parameters and state looked at "
        f"{sums['checks']:,} times: {sums['checks with NaN or infinity']} with NaN or infinity, "
        f"{sums['checks unlike the twin']} unlike those of a run without the bad steps"
    )
    failures = len(found) - exact + sums["checks with NaN or infinity"] + sums["checks unlike the twin"]
    what = f"gradients with NaN, infinity or huge numbers, in {sums['steps']:,} steps"
    return [(what, f"{sums['bad']:,}", happened, failures)]


def rows_of_broken_steps(found: dict[str, Record]) -> list[Row]:
    outcomes: dict[str, Counter[str]] = {}
    for name, record in found.items():
        fault, moment, *_ = name.split("; ")
        place = {"memory runs out": "every torch operation", "Ctrl-C": "every line of lodo"}[fault]
        call = "load_state_dict" if moment == "load" else moment
        outcomes.setdefault(f"{fault} at {place} of a {call}", Counter()).update(record["outcomes"])
    return [
        (what, f"{counter.total():,}", tally(counter), lost(counter, broken_steps.GOOD))
        for what, counter in outcomes.items()
    ]


def rows_of_divergence(found: dict[str, Record]) -> list[Row]:
    losses: dict[str, list[float]] = {}
    for name, record in found.items():
        value = math.inf if record["diverged"] else record["final loss"]
        losses.setdefault(name.rsplit("; ", 1)[0], []).append(value)
    rows: list[Row] = []
    for what, values in losses.items():
        diverged = values.count(math.inf)
        ended = f"diverged: {diverged}"
        if finished := sorted(value for value in values if value < math.inf):
            ended += f", final loss: {finished[0]:.2g} to {finished[-1]:.2g}"
        rows.append((what.replace("; ", ", "), f"{len(values):,}", ended, 0))
    return rows


PARTS = {
    "kills": Part(
        lambda options: kills.cases(options.kills), lambda name, options: kills.run(name, options.seed), rows_of_kills
    ),
    "corruption": Part(
        lambda options: corruption.cases(options.corruptions),
        lambda name, options: corruption.run(name, options.seed),
        rows_of_corruption,
    ),
    "bad_gradients": Part(
        lambda options: bad_gradients.cases(),
        lambda name, options: bad_gradients.run(name, options.seed, options.steps),
        rows_of_bad_gradients,
    ),
    "broken_steps": Part(
        lambda options: broken_steps.cases(), lambda name, options: broken_steps.run(name), rows_of_broken_steps
    ),
    "divergence": Part(
        lambda options: divergence.cases(), lambda name, options: divergence.run(name), rows_of_divergence
    ),
}


# ---- results ---------------------------------------------------------------------------------------------------------


class Book:
    """The results of a part, in a JSON file that every new one replaces in one go.

    Raises:
        ValueError: if the file has results of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"settings": settings, "results": {}}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
            if self.content["settings"] != settings:
                raise ValueError(f"{path} has results of {self.content['settings']}, asked for is {settings}")

    @property
    def results(self) -> dict[str, Record]:
        return self.content["results"]

    def add(self, name: str, record: Record) -> None:
        self.results[name] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.content, indent=1) + "\n"
        write_whole(self.path, lambda part: part.write_text(text, encoding="utf-8"))


def settings_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What the results depend on; results of others are not mixed with them."""
    counts = {"kills": ("kills", "seed"), "corruption": ("corruptions", "seed"), "bad_gradients": ("steps", "seed")}
    versions = {"lodo": lodo.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {name: vars(options)[name] for name in counts.get(name, ())} | versions | {"machine": platform.machine()}


def table(rows: Sequence[Row]) -> str:
    lines = ["| what was injected | times | what happened | silent losses |", "|:--|--:|:--|--:|"]
    lines += [f"| {what} | {times} | {happened} | {losses} |" for what, times, happened, losses in rows]
    return "\n".join(lines)


def run_part(name: str, options: argparse.Namespace) -> None:
    part = PARTS[name]
    book = Book(options.out / f"{name}.json", settings_of(name, options))
    todo = [case for case in part.cases(options) if case not in book.results]
    for case in tqdm(todo, desc=name):
        book.add(case, part.run(case, options))


def report(out: Path) -> int:
    """Prints the table of all results in a folder and keeps it there; returns how much was lost."""
    rows: list[Row] = []
    for name, part in PARTS.items():
        path = out / f"{name}.json"
        if path.exists():
            rows += part.rows(json.loads(path.read_text(encoding="utf-8"))["results"])
    text = table(rows)
    print(text)
    if rows:
        write_whole(out / "table.md", lambda part: part.write_text(text + "\n", encoding="utf-8"))
    return sum(losses for *_, losses in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}, or report for the table alone (default: all)")
    add("--seed", type=int, default=0, help="of what is injected where (default: 0)")
    add("--kills", type=int, default=300, help="of processes, by tens (default: 300)")
    add("--corruptions", type=int, default=50, help="checkpoints of each kind (default: 50)")
    add("--steps", type=int, default=10_000, help="of each training with bad gradients (default: 10000)")
    add("--out", type=Path, default=OUT, metavar="DIR", help="where the results are")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - {*PARTS, "report"}:
        parser.error(f"PART must be one of {', '.join(PARTS)}, report, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    try:
        for name in options.parts or PARTS:
            if name != "report":
                run_part(name, options)
    except ValueError as error:
        parser.error(str(error))
    losses = report(options.out)
    print(f"\nsilent losses: {losses}")
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main())
