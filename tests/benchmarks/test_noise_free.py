"""The comparison on small losses without noise: its baseline, and its report."""

import math

import pytest
import torch

import lodo
from benchmarks import noise_free
from benchmarks.noise_free import PROBLEMS, best_adamw, losses_of, quadratic, typical


def test_losses_are_those_of_a_loop_of_ones_own():
    torch.manual_seed(3)
    x = torch.nn.Parameter(torch.randn(16))
    optimizer, expected = lodo.AutoLODO([x]), []
    for _ in range(30):
        optimizer.zero_grad()
        expected.append(x.square().mean().item())
        x.square().mean().backward()
        optimizer.step()
    found = losses_of(PROBLEMS["mean square of 16 numbers"], lambda params: lodo.AutoLODO(params), "constant", 3, 30)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_run_that_diverges_counts_as_infinite_to_its_end():
    found = losses_of(quadratic(4, 0), lambda params: torch.optim.SGD(params, lr=1e6), "constant", 0, 50)
    assert len(found) == 50
    assert found[-1] == math.inf
    assert math.isfinite(found[0])


def test_adamw_has_its_best_rate():
    name, runs = best_adamw(quadratic(4, 0), [0, 1], 150)
    ends = [
        losses_of(
            quadratic(4, 0), lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0), "constant", seed, 150
        )
        for seed in (0, 1)
    ]
    assert typical([run[-1] for run in runs]) <= typical([run[-1] for run in ends])
    assert name.split(", ")[1] in ("constant", "cosine")


def test_the_report_has_a_row_for_each_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(noise_free, "PROBLEMS", dict(list(PROBLEMS.items())[:2]))
    noise_free.main(["--out", str(tmp_path), "--seeds", "1", "--steps", "110"])
    rows = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| mean")]
    assert len(rows) == 2
    assert all(len(row.split("|")) == 6 for row in rows)  # one column for each, after 100 steps
