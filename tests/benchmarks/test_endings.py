"""The comparison of endings: its losses, its records and its report."""

import json
import math

import pytest
import torch

import lodo
from benchmarks import endings
from benchmarks.endings import AVERAGE, BEST, CONSTANT, ENDINGS, LAST, TRAINING, VALIDATION, ratio, run
from benchmarks.shootout.tasks import get_task

TASK = get_task("rosenbrock")
STEPS = 60


@pytest.mark.parametrize("name", [CONSTANT, "cooldown, last 20 %", "cosine"])
def test_losses_are_those_of_a_loop_of_ones_own(name):
    problem = TASK.build(3)
    torch.manual_seed(3)
    optimizer = lodo.AutoLODO(problem.params)
    scheduler, losses, averages, validations = ENDINGS[name].schedule(optimizer, STEPS), [], [], []
    average = [p.detach().clone() for p in problem.params]
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        losses.append(loss.item())
        if step >= STEPS - 6:
            kept = [p.detach().clone() for p in problem.params]
            with torch.no_grad():
                for p, value in zip(problem.params, average, strict=True):
                    p.copy_(value)
                averages.append(problem.evaluate().item())
                for p, value in zip(problem.params, kept, strict=True):
                    p.copy_(value)
        optimizer.step()
        scheduler.step()
        validations.append(problem.validate()[0])
        for own, p in zip(average, problem.params, strict=True):
            own.lerp_(p.detach(), 1 / (1 + endings.SHARE * (step + 1)))
    found = run(TASK, 3, name, steps=STEPS)
    assert found[TRAINING] == pytest.approx({LAST: sum(losses[-6:]) / 6, AVERAGE: sum(averages) / 6}, rel=1e-5)
    assert found[VALIDATION][LAST] == pytest.approx(validations[-1], rel=1e-5)
    assert min(validations) - 1e-5 <= found[VALIDATION][BEST] <= found[VALIDATION][LAST]


def test_ratios_are_medians_over_seeds_and_infinite_where_runs_diverge():
    def record(seed, ending, loss):
        return {"task": "t", "seed": seed, "variant": ending, TRAINING: {} if loss is None else {LAST: loss}}

    records = [record(seed, CONSTANT, 2.0 * (seed + 1)) for seed in range(3)]
    records += [record(0, "cosine", 2.0), record(1, "cosine", 2.0), record(2, "cosine", 2.0)]
    assert ratio(records, "t", ("cosine", LAST), TRAINING) == 0.5
    assert ratio(records, "t", ("linear decay", LAST), TRAINING) is None
    records += [record(0, "linear decay", None), record(1, "linear decay", None), record(2, "linear decay", 1.0)]
    assert ratio(records, "t", ("linear decay", LAST), TRAINING) == math.inf


def test_what_is_on_record_is_not_run_again(tmp_path, monkeypatch, capsys):
    arguments = ["--out", str(tmp_path), "--tasks", "rosenbrock", "--seeds", "1", "--steps", "40"]
    endings.main(arguments)
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [record["variant"] for record in records] == [n for n, each in ENDINGS.items() if not each.options]
    monkeypatch.setattr(endings, "run", lambda *args: pytest.fail("ran again"))
    endings.main(arguments)
    text = (tmp_path / "report.md").read_text()
    assert text.count("\n| cosine |") == 4  # last point and average, training and validation
    assert "| constant rate | best validation |" in text
    assert (tmp_path / "endings.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="no runs"):  # none with a task's own number of steps
        endings.main(["--out", str(tmp_path), "--report-only"])


def test_runs_of_other_code_are_made_again(tmp_path, monkeypatch):
    arguments = ["--out", str(tmp_path), "--tasks", "rosenbrock", "--seeds", "1", "--steps", "20"]
    monkeypatch.setattr(endings, "ENDINGS", {CONSTANT: ENDINGS[CONSTANT]})
    endings.main(arguments)
    path = tmp_path / "runs.jsonl"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "environment": {**record["environment"], "lodo_source": "other"}}) + "\n")
    endings.main(arguments)
    assert len(path.read_text().splitlines()) == 2
