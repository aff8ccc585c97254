"""What it costs in loss that each rank has eigenbases, scales and momenta for its own shards.

    python -m benchmarks.shards --data-root MNIST [--out DIR] [--seeds N]

On the tasks of the shoot-out on which defaults are chosen. AutoLODO on shards of every parameter's rows, as FSDP2 makes
them of 1, 2, 4 and 8 ranks: one process stands for all, with an AutoLODO for the shards of each rank (which is what
several processes do, bit for bit: `tests/lodo/test_distributed.py`). And a training that half-way goes on from a
checkpoint of 4 ranks on 2, where all but parameters and averages begins anew.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor, nn

import lodo
from benchmarks.shootout.problem import Task
from benchmarks.shootout.running import DIVERGED, TAIL
from benchmarks.task_runs import TINY, Record, made_of, mean_ratio, new_record, records_of, tasks_of

OUT = Path(__file__).parent / "results" / "shards"
ONE, FOUR, RESHARDED = "1", "4", "4, then 2"
VARIANTS: dict[str, tuple[int, int]] = {ONE: (1, 1), "2": (2, 2), FOUR: (4, 4), "8": (8, 8), RESHARDED: (4, 2)}
"""Ranks in the first half of a training, and in the second."""
AFTER = (81, 120)  # the steps after the half whose losses are compared, first and last
TRAINING, VALIDATION, AFTERWARDS = "training", "validation", "after the half"


class Sharded:
    """AutoLODO on so many ranks, each with its rows of every parameter: shards are views of the parameters."""

    def __init__(self, params: Sequence[Tensor], ranks: int) -> None:
        self.params = params
        self.shards: list[list[nn.Parameter]] = []
        for rank in range(ranks):
            own = [nn.Parameter(shard_of(p.detach(), rank, ranks)) for p in params]
            if any(shard.numel() for shard in own):
                self.shards.append(own)
        self.optimizers = [lodo.AutoLODO(own) for own in self.shards]
        self._ranks = ranks

    def step(self) -> None:
        for rank, (shards, optimizer) in enumerate(zip(self.shards, self.optimizers, strict=True)):
            for p, shard in zip(self.params, shards, strict=True):
                assert p.grad is not None
                shard.grad = shard_of(p.grad, rank, self._ranks)
            optimizer.step()


def shard_of(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """The rows that a rank has, some of them none; a number is on the first rank."""
    chunks = tensor.reshape(1).chunk(ranks) if tensor.dim() == 0 else tensor.chunk(ranks)
    return chunks[rank] if rank < len(chunks) else chunks[0][:0]


def run(task: Task, seed: int, variant: str, data_root: Path | None = None, steps: int | None = None) -> Record:
    """Trains once; losses as in the shoot-out, and the mean of the steps AFTER the half."""
    steps = task.steps if steps is None else steps
    problem = task.build(seed, data_root)
    torch.manual_seed(seed)
    before, after = VARIANTS[variant]
    optimizer, losses, half = Sharded(problem.params, before), [], steps // 2
    record = new_record(task, seed, variant, steps) | {"size": sum(p.numel() for p in problem.params)}
    for step in range(steps):
        if step == half and after != before:
            optimizer = Sharded(problem.params, after)
        for p in problem.params:
            p.grad = None
        loss = problem.loss()
        loss.backward()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            return record
        optimizer.step()
    last = fmean(losses[-max(1, math.floor(TAIL * steps)) :])
    if last > DIVERGED * problem.idle_loss:
        return record
    record[TRAINING] = {TRAINING: last}
    if window := losses[half + AFTER[0] - 1 : half + AFTER[1]]:
        record[TRAINING][AFTERWARDS] = fmean(window)
    if (found := problem.validate()) is not None and math.isfinite(found[0]):
        record[VALIDATION] = {VALIDATION: found[0]}
    return record


def ratio(records: Sequence[Record], task: str, variant: str, aim: str, to: str = ONE) -> float | None:
    """The median over the seeds of the losses over those of another variant at the same seed; infinite where a run
    diverged, None where there is none."""
    losses = {(r["seed"], r["variant"]): r[TRAINING] | r[VALIDATION] for r in records if r["task"] == task}
    found = []
    for (seed, name), own in losses.items():
        reference = losses.get((seed, to), {}).get(aim)
        if name == variant and reference is not None:
            found.append(own[aim] / max(reference, TINY) if aim in own else math.inf)
    return median(found) if found else None


def table(
    records: Sequence[Record], tasks: Sequence[str], aim: str, variants: Sequence[str], to: str = ONE
) -> list[str]:
    lines = [f"| ranks | {' | '.join((*tasks, 'mean'))} |", f"|:--|{'--:|' * (len(tasks) + 1)}"]
    for variant in variants:
        found = [ratio(records, task, variant, aim, to) for task in tasks]
        if any(each is not None for each in found):
            cells = ["" if each is None else f"{each:.2f}" for each in found]
            lines.append(f"| {variant} | {' | '.join((*cells, mean_ratio(found)))} |")
    return lines


def report(records: Sequence[Record]) -> str:
    """The tables, in Markdown."""
    tasks = tasks_of(records)
    others = [variant for variant in VARIANTS if variant != ONE]
    validated = [task for task in tasks if any(r[VALIDATION] for r in records if r["task"] == task)]
    counts = {task: len({r["seed"] for r in records if r["task"] == task}) for task in tasks}
    seeds = f"seeds: {', '.join(f'{task} {count}' for task, count in counts.items())}"
    sizes = {record["task"]: record["size"] for record in records}
    return "\n".join(
        [
            "# Eigenbases of shards",
            "",
            f"`python -m benchmarks.shards --data-root MNIST`, {made_of(records)}, "
            f"{seeds}. AutoLODO with the rows of every parameter shared "
            "out among ranks, each of which has eigenbases, scales and momenta for its own shards: losses over those "
            'of one rank at the same seed, medians over the seeds. "4, then 2" goes on from a checkpoint on another '
            "number of ranks half-way, where all but parameters and averages begins anew.",
            "",
            f"Parameters: {', '.join(f'{task} {size:,}' for task, size in sizes.items() if task in tasks)}.",
            "",
            "## Training loss, mean of the last tenth of the steps",
            "",
            *table(records, tasks, TRAINING, others),
            "",
            "## Validation loss at the end",
            "",
            *table(records, validated, VALIDATION, others),
            "",
            f"## Training loss {AFTER[0]} to {AFTER[1]} steps after the half, over that of 4 ranks all along",
            "",
            *table(records, tasks, AFTERWARDS, [RESHARDED], to=FOUR),
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    records, out = records_of(arguments, __doc__, OUT, run, lambda task: list(VARIANTS))
    (out / "report.md").write_text(report(records))


if __name__ == "__main__":
    main()
