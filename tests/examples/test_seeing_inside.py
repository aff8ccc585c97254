"""What shows what LODO learns: TensorBoard's log, the picture of the learned spectrum, the long run on the bowl."""

import json
import sys

import numpy as np
import pytest
import torch

import lodo
from benchmarks import long_bowl, part_costs, untuned_costs
from examples import learned_spectrum
from examples.paper.tasks.bowl import NoisyBowl


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_picture_and_its_figures(tmp_path, capsys):
    learned_spectrum.main(["--bowl-steps", "120", "--digits-steps", "30", "--out", str(tmp_path)])
    assert (tmp_path / "learned_spectrum.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "learned_spectrum.json").read_text())
    for name, steps, lr in (("bowl", 120, 0.108), ("digits", 30, 3.0)):
        assert results[name]["steps"][0] == 1
        assert results[name]["steps"][-1] == steps
        values = np.array(results[name]["eigenvalues"])
        assert values.shape == (len(results[name]["steps"]), len(learned_spectrum.LEVELS))
        assert (np.diff(values, axis=1) >= 0).all()
        np.testing.assert_allclose(values[0], lr, rtol=1e-4)  # G = lr * I before anything is learned
        assert values[-1, -1] > 1.2 * values[-1, 0]


def test_quantiles_are_those_of_the_weighted_values():
    eigenvalues = torch.arange(1.0, 101.0, dtype=torch.float64)
    even = learned_spectrum.quantiles(eigenvalues, torch.full_like(eigenvalues, 0.01))
    assert even == [1, 10, 25, 50, 75, 90, 100]
    weights = torch.tensor([0.5, 0.5] + 98 * [0.0], dtype=torch.float64)
    assert learned_spectrum.quantiles(eigenvalues, weights) == [1, 1, 1, 1, 2, 2, 2]


def test_diagnostics_reach_tensorboard(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from examples import tensorboard_logging

    monkeypatch.setattr(sys, "argv", ["tensorboard_logging", "--steps", "45", "--out", str(tmp_path)])
    tensorboard_logging.main()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 20, 40]
    steps = events.Scalars("group 0/steps")
    assert [(event.step, event.value) for event in steps] == [(20, 20), (40, 40)]
    assert events.Scalars("group 0/hypergradient_norm")[0].value > 0


def test_the_long_bowl_is_measured_once_and_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(long_bowl, "WALKS", (0, 1))
    command = ["--steps", "60", "--out", str(tmp_path)]
    long_bowl.main(command)
    runs = (tmp_path / "long_bowl.jsonl").read_text()
    records = [json.loads(line) for line in runs.splitlines()]
    assert [(own["call"], own["walk"]) for own in records] == [
        (call, walk) for call in long_bowl.CALLS for walk in (0, 1)
    ]
    assert all(own["errors"][0] > own["errors"][-1] for own in records)
    assert (tmp_path / "long_bowl.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "long_bowl.md").read_text()
    assert f"| 60 | {(records[0]['errors'][-1] + records[1]['errors'][-1]) / 2:.3f} (" in report
    (tmp_path / "long_bowl.jsonl").write_text("".join(line + "\n" for line in runs.splitlines()[1:]))
    long_bowl.main(command)
    again = [json.loads(line) for line in (tmp_path / "long_bowl.jsonl").read_text().splitlines()]
    assert again == [*records[1:], records[0]]


def test_the_exact_hessian_error_is_the_estimated_one():
    task = NoisyBowl(seed=0)
    optimizer = lodo.LODO(task.params, **lodo.RECOMMENDED)
    for _ in range(200):
        task.draw()
        task.backward()
        optimizer.step()
    exact = long_bowl.hessian_error(optimizer, task.h)
    g, generator = optimizer.preconditioners[0], torch.Generator().manual_seed(0)
    estimated = lodo.hessian_error(g, lambda v: task.h @ v, lr=1e-3, samples=2000, generator=generator)
    assert abs(estimated / exact - 1) < 0.05


def test_what_each_part_costs_is_told_in_state_and_time(tmp_path):
    part_costs.main(["--sizes", "300", "--rounds", "2", "--out", str(tmp_path)])
    lines = (tmp_path / "part_costs.md").read_text().splitlines()
    rows = {cells[1].strip(): cells[2:-1] for cells in (line.split("|") for line in lines if line.startswith("| "))}
    assert rows.keys() >= part_costs.WAYS.keys()
    size = {name: float(rows[name][-1]) for name in part_costs.WAYS}
    assert size["AdamW, fused"] < 9 < size['no eigenbases: `base="adam"`'] < size["all parts"]
    assert size["all parts"] - size["one momentum: `momentum_decays=None`"] == pytest.approx(16, abs=3)
    assert size["all parts"] - size["no trace: `trace_decay=0.0`"] == pytest.approx(4, abs=0.2)
    assert float(rows["all parts"][1]) == 1


def test_what_a_step_costs_is_told_beside_the_peers(tmp_path, monkeypatch):
    pytest.importorskip("pytorch_optimizer")
    monkeypatch.setattr(untuned_costs, "WARM", 2)
    monkeypatch.setattr(untuned_costs, "BATCH", 4)
    untuned_costs.main(["--only", "3,000 parameters", "--rounds", "2", "--out", str(tmp_path)])
    lines = (tmp_path / "untuned_costs.md").read_text().splitlines()
    rows = {cells[1].strip(): cells[2:-1] for cells in (line.split("|") for line in lines if line.startswith("| "))}
    assert rows.keys() >= untuned_costs.WAYS.keys()
    time, of_adamw, of_soap, longest, memory = (cell.strip() for cell in rows["AutoLODO"])
    assert min(float(time), float(longest)) > 0
    assert all(float(cell.split()[0]) > 0 for cell in (of_adamw, of_soap))
    assert 49 < float(memory) < 69
    assert rows["SOAP, frequency 10"][2].split()[0] == "1.00"
    with pytest.raises(SystemExit):
        untuned_costs.main(["--only", "no such model"])
