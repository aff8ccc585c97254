"""How a training ends: schedules, averages of the iterates, early stopping and weight decay, all with AutoLODO.

    python -m benchmarks.endings --data-root MNIST [--out DIR] [--seeds N]

On the tasks of the shoot-out on which defaults are chosen. One run gives the point where it ended, the average of its
iterates there, and the point where validation was lowest on the way. Runs are kept in `runs.jsonl` of the folder as
they come; what is there is not run again. The report and its picture are made of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

import lodo
from benchmarks.shootout.problem import Problem, Task
from benchmarks.shootout.running import DIVERGED, TAIL, VALIDATIONS
from benchmarks.shootout.tasks import get_task
from benchmarks.task_runs import TINY, Record, made_of, mean_ratio, new_record, records_of, tasks_of

OUT = Path(__file__).parent / "results" / "endings"
SHARE = 0.1  # of the averages
CONSTANT = "constant rate"
LAST, AVERAGE, BEST = "last point", "average", "best validation"
TRAINING, VALIDATION = "training", "validation"


def cooled(share: float) -> Callable[[Optimizer, int], LRScheduler]:
    return lambda optimizer, steps: lodo.cooldown(optimizer, steps, share)


@dataclass(frozen=True)
class Ending:
    """A schedule, from the optimizer and the number of steps, and options of AutoLODO."""

    schedule: Callable[[Optimizer, int], LRScheduler] = lambda optimizer, steps: LambdaLR(optimizer, lambda step: 1.0)
    options: Mapping[str, Any] = field(default_factory=dict)

    def applies_to(self, task: Task) -> bool:
        """Weight decay is for tasks where the same data come again and again."""
        return not self.options or task.has_finite_data


ENDINGS: dict[str, Ending] = {
    CONSTANT: Ending(),
    "cooldown, last 10 %": Ending(cooled(0.1)),
    "cooldown, last 20 %": Ending(cooled(0.2)),
    "cooldown, last 30 %": Ending(cooled(0.3)),
    "linear decay": Ending(cooled(1)),
    "cosine": Ending(lambda optimizer, steps: CosineAnnealingLR(optimizer, steps)),
    "weight decay .03": Ending(options={"weight_decay": 0.03}),
    "weight decay .1": Ending(options={"weight_decay": 0.1}),
    "weight decay .3": Ending(options={"weight_decay": 0.3}),
}


def validated(problem: Problem, renews: bool = False) -> float | None:
    """The loss on held-out data at the present parameters; None without such data."""
    put_back = problem.renew_statistics() if renews else lambda: None
    found = problem.validate()
    put_back()
    return None if found is None else found[0]


def run(task: Task, seed: int, name: str, data_root: Path | None = None, steps: int | None = None) -> Record:
    """Trains once. A training loss is the mean over the last tenth of the steps; where it is not finite, or far above
    that of standing still, there are no losses in the record."""
    ending, steps = ENDINGS[name], task.steps if steps is None else steps
    problem = task.build(seed, data_root)
    torch.manual_seed(seed)
    optimizer = lodo.AutoLODO(problem.params, average_share=SHARE, **ending.options)
    schedule = ending.schedule(optimizer, steps)
    points = {math.ceil(number * steps / VALIDATIONS) for number in range(1, VALIDATIONS + 1)}
    losses: list[float] = []
    at_average: list[float] = []
    along: list[float] = []
    record = new_record(task, seed, name, steps)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            return record
        if step > steps - max(1, math.floor(TAIL * steps)):
            with optimizer.averaged(), torch.no_grad():
                at_average.append(float(problem.evaluate()))
        optimizer.step()
        schedule.step()
        if step in points and (found := validated(problem)) is not None:
            along.append(found)
    last = fmean(losses[-len(at_average) :])
    if last > DIVERGED * problem.idle_loss:
        return record
    record[TRAINING] = {LAST: last, AVERAGE: fmean(at_average)}
    if along:
        with optimizer.averaged():
            found = validated(problem, renews=True)
        if all(each is not None and math.isfinite(each) for each in (*along, found)):
            record[VALIDATION] = {LAST: along[-1], AVERAGE: found, BEST: min(along)}
    return record


# ---- the report ----------------------------------------------------------------------------------------------------

Row = tuple[str, str]
"""An ending, and which of its points."""


def rows_of(records: Sequence[Record], aim: str) -> list[Row]:
    """Early stopping is shown for a constant rate alone."""
    names = [name for name in ENDINGS if any(record["variant"] == name for record in records)]
    rows = [(name, point) for name in names for point in (LAST, AVERAGE)]
    return [*rows, (CONSTANT, BEST)] if aim == VALIDATION else rows


def ratio(records: Sequence[Record], task: str, row: Row, aim: str) -> float | None:
    """The median over the seeds of the losses over those of a constant rate's last point at the same seed; infinite
    where a run diverged, None where there is none."""
    losses = {(r["seed"], r["variant"]): r[aim] for r in records if r["task"] == task}
    found = []
    for (seed, name), own in losses.items():
        reference = losses.get((seed, CONSTANT), {}).get(LAST)
        if name == row[0] and reference is not None:
            found.append(own[row[1]] / max(reference, TINY) if row[1] in own else math.inf)
    return median(found) if found else None


def table(records: Sequence[Record], tasks: Sequence[str], aim: str) -> list[str]:
    finite = [task for task in tasks if get_task(task).has_finite_data]
    heads = (*tasks, "mean", f"mean of the {len(finite)}")
    lines = [f"| ending | point | {' | '.join(heads)} |", f"|:--|:--|{'--:|' * len(heads)}"]
    for row in rows_of(records, aim):
        found = {task: ratio(records, task, row, aim) for task in tasks}
        if all(each is None for each in found.values()):
            continue
        cells = ["" if each is None else f"{each:.2f}" for each in found.values()]
        means = [mean_ratio([found[task] for task in some]) for some in (tasks, finite)]
        lines.append(f"| {row[0]} | {row[1]} | {' | '.join((*cells, *means))} |")
    return lines


def report(records: Sequence[Record]) -> str:
    """The tables, in Markdown."""
    tasks = tasks_of(records)
    with_validation = [t for t in tasks if any(r[VALIDATION] for r in records if r["task"] == t)]
    losses = {
        task: median(r[TRAINING].get(LAST, math.inf) for r in records if r["task"] == task and r["variant"] == CONSTANT)
        for task in tasks
    }
    seeds = len({record["seed"] for record in records})
    return "\n".join(
        [
            "# How a training ends",
            "",
            f"`python -m benchmarks.endings --data-root MNIST`, {made_of(records)}, {seeds} seeds. AutoLODO without a "
            f"warm-up, its averages over a share of {SHARE} of the steps. Losses over those of the last point of a "
            "constant rate at the same seed, medians over the seeds; means are geometric, over all tasks and over "
            "those whose data come again and again, which weight decay is for. The training loss is the mean of the "
            "last tenth of the steps (at the average: of the same batches there): of a cooldown of 10 % that is all of "
            f'it, of one of 30 % its last third. The validation loss is that at the end; "{BEST}" is the lowest of '
            f"{VALIDATIONS} along the run, which has looked at the held-out data to stop early.",
            "",
            "Training losses of the constant rate: "
            f"{', '.join(f'{name} {loss:.3g}' for name, loss in losses.items())}.",
            "",
            "## Training",
            "",
            *table(records, tasks, TRAINING),
            "",
            "## Validation",
            "",
            *table(records, with_validation, VALIDATION),
            "",
            "![Ratios to the last point of a constant rate](endings.png)",
            "",
        ]
    )


def draw(records: Sequence[Record], path: Path) -> None:
    """A dot for each ending and task, training and validation side by side."""
    from matplotlib import pyplot as plt

    shown = [(CONSTANT, AVERAGE), ("cooldown, last 20 %", LAST), ("linear decay", LAST), ("cosine", LAST)]
    shown.append(("weight decay .1", LAST))
    tasks = tasks_of(records)
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.5 * len(tasks) + 1.6), sharey=True, layout="constrained")
    for axis, aim in zip(axes, (TRAINING, VALIDATION), strict=True):
        for number, (row, marker) in enumerate(zip(shown, "os^Dv", strict=True)):
            found = [(place, ratio(records, task, row, aim)) for place, task in enumerate(tasks)]
            known = [(place + 0.12 * (number - 2), r) for place, r in found if r is not None and math.isfinite(r)]
            label = "average of a constant rate" if row == (CONSTANT, AVERAGE) else row[0]
            axis.plot([r for _, r in known], [place for place, _ in known], marker, label=label, markersize=6)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlabel(f"{aim} loss over that of a constant rate's last point")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(tasks)), tasks)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    records, out = records_of(
        arguments, __doc__, OUT, run, lambda task: [name for name, each in ENDINGS.items() if each.applies_to(task)]
    )
    (out / "report.md").write_text(report(records))
    draw(records, out / "endings.png")


if __name__ == "__main__":
    main()
