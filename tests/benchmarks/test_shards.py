"""What is trained on shards, and the report on it."""

import pytest
import torch

import lodo
from benchmarks import shards
from benchmarks.shards import AFTERWARDS, FOUR, ONE, RESHARDED, TRAINING, VARIANTS, Sharded, ratio, run, shard_of
from benchmarks.shootout.tasks import get_task


def params():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 4), (3,), (1, 6), ())]


def test_shards_are_those_of_separate_optimizers():
    whole, ranks = params(), [[], []]
    for p in params():
        for rank, own in enumerate(ranks):
            own.append(torch.nn.Parameter(shard_of(p.detach(), rank, 2).clone()))
    assert [[tuple(p.shape) for p in own] for own in ranks] == [
        [(3, 4), (2,), (1, 6), (1,)],
        [(2, 4), (1,), (0, 6), (0,)],
    ]
    optimizer, separate = Sharded(whole, 2), [lodo.AutoLODO(own) for own in ranks]
    for _ in range(6):
        for p in (*whole, *ranks[0], *ranks[1]):
            p.grad = p.detach().sin()
        optimizer.step()
        for each in separate:
            each.step()
    for place, p in enumerate(whole):
        assert torch.equal(p.reshape(p.shape or (1,)), torch.cat([own[place] for own in ranks]))


def test_one_rank_is_the_optimizer_itself():
    task = get_task("rosenbrock")
    problem = task.build(0)
    torch.manual_seed(0)
    optimizer, losses = lodo.AutoLODO(problem.params), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert run(task, 0, ONE, steps=30)[TRAINING][TRAINING] == pytest.approx(sum(losses[-3:]) / 3)


def test_ratios_are_of_the_same_seed():
    def record(seed, variant, loss):
        found = {} if loss is None else {AFTERWARDS: loss}
        return {"task": "t", "seed": seed, "variant": variant, "training": found, "validation": {}}

    records = [record(seed, FOUR, seed + 1.0) for seed in range(3)]
    records += [record(seed, RESHARDED, 2 * (seed + 1.0)) for seed in range(3)]
    assert ratio(records, "t", RESHARDED, AFTERWARDS, to=FOUR) == 2
    assert ratio(records, "t", RESHARDED, AFTERWARDS) is None
    records += [record(seed, "8", None) for seed in range(3)]
    assert ratio(records, "t", "8", AFTERWARDS, to=FOUR) == float("inf")


def test_the_report_has_a_row_for_each_number_of_ranks(tmp_path):
    shards.main(["--out", str(tmp_path), "--tasks", "digits_mlp", "--seeds", "1", "--steps", "170"])
    rows = [line.split(" | ")[0] for line in (tmp_path / "report.md").read_text().splitlines() if line[:3] == "| 4"]
    assert rows == ["| 4", "| 4, then 2"] * 2 + ["| 4, then 2"]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(VARIANTS)
