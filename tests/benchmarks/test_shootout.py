"""The comparison on many tasks: problems, contenders, runs."""

import importlib.util
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.shootout import __main__ as command
from benchmarks.shootout import running
from benchmarks.shootout.contenders import CONTENDERS, RECOMMENDED, Muon, get_contender, hidden_matrices
from benchmarks.shootout.running import TUNE, Curve, factor_at, run
from benchmarks.shootout.tasks import TASKS, Task, get_task
from tests.helpers.shootout_jobs import defaults, job

ELSEWHERE = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("pytorch_optimizer", "opt_einsum")),
    reason="the extra `benchmarks` is not installed",
)
ROSENBROCK = get_task("rosenbrock")
PEERS = {name for name in CONTENDERS if name in command.ELSEWHERE}
IMAGES = {"t10k": 20, "train": 60}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """A folder with a few random images in MNIST's format."""
    root = tmp_path_factory.mktemp("mnist")
    random = np.random.default_rng(0)
    for part, count in IMAGES.items():
        pixels = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        sizes = b"".join(size.to_bytes(4, "big") for size in pixels.shape)
        (root / f"{part}-images-idx3-ubyte").write_bytes(bytes((0, 0, 8, 3)) + sizes + pixels.tobytes())
        labels = random.integers(0, 10, count, dtype=np.uint8)
        (root / f"{part}-labels-idx1-ubyte").write_bytes(
            bytes((0, 0, 8, 1)) + count.to_bytes(4, "big") + labels.tobytes()
        )
    return root


# Tasks


def test_there_are_eight_tasks_to_choose_on_and_more_to_hold_out():
    splits = [task.split for task in TASKS.values()]
    assert splits.count("choose") == 8
    assert splits.count("hold out") + splits.count("fresh") >= 4


@pytest.mark.parametrize("name", TASKS)
def test_a_problem_follows_from_its_seed_alone(name, data_root):
    task = TASKS[name]
    before = torch.get_rng_state()
    one, same, other = task.build(3, data_root), task.build(3, data_root), task.build(4, data_root)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        for param in (param for problem in (one, same, other) for param in problem.params):
            param.add_(0.01)  # a model that starts at 0 has the same loss everywhere
    losses = [[float(problem.loss().detach()) for _ in range(3)] for problem in (one, same, other)]
    assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    assert (len(set(losses[0])) == 1) == task.is_deterministic
    assert math.isfinite(one.idle_loss)
    assert one.idle_loss > 0


@pytest.mark.parametrize("name", TASKS)
def test_gradients_agree_with_finite_differences(name, data_root):
    problem = TASKS[name].build(0, data_root)
    problem.model.double()
    problem.draw()
    if isinstance(problem.batch, torch.Tensor | tuple):
        parts = problem.batch if isinstance(problem.batch, tuple) else (problem.batch,)
        parts = tuple(part.double() if part.is_floating_point() else part for part in parts)
        problem.batch = parts if isinstance(problem.batch, tuple) else parts[0]
    gradients = torch.autograd.grad(problem.evaluate(), problem.params)
    direction = [
        torch.randn_like(param) * param.detach().square().mean().sqrt().clamp(min=1e-3) for param in problem.params
    ]
    slope = float(sum((gradient * part).sum() for gradient, part in zip(gradients, direction, strict=True)))

    def moved(length):
        with torch.no_grad():
            for param, part in zip(problem.params, direction, strict=True):
                param.add_(part, alpha=length)
        value = float(problem.evaluate().detach())
        with torch.no_grad():
            for param, part in zip(problem.params, direction, strict=True):
                param.sub_(part, alpha=length)
        return value

    difference = (moved(1e-6) - moved(-1e-6)) / 2e-6
    scale = math.sqrt(
        sum(float(g.square().sum()) * float(d.square().sum()) for g, d in zip(gradients, direction, strict=True))
    )
    assert abs(difference - slope) < 1e-5 * scale


@pytest.mark.parametrize("name", TASKS)
def test_tasks_say_whether_they_have_matrices(name, data_root):
    assert bool(hidden_matrices(TASKS[name].build(0, data_root).model)) == TASKS[name].has_matrices


def test_the_drifting_task_drifts():
    problem = get_task("drift").build(0)
    problem.draw()
    inputs, early = problem._draw(torch.Generator().manual_seed(1), 0)
    again, late = problem._draw(torch.Generator().manual_seed(1), 5000)
    assert torch.equal(inputs, again)
    assert (early - late).square().mean() > 0.1 * early.var()


def test_layer_scales_leave_the_output_of_the_scaled_network_as_it_is():
    problem = get_task("scaled_mlp").build(0)
    scales = [layer.scale for layer in problem.model if hasattr(layer, "scale")]
    assert max(scales) / min(scales) == 1e4
    problem.draw()
    norms = [
        float(torch.autograd.grad(problem.evaluate(), layer.weight)[0].norm())
        for layer in problem.model
        if hasattr(layer, "scale")
    ]
    assert max(norms) / min(norms) > 1e3
    assert problem.idle_loss < 5  # of ten classes: nothing is amplified


def test_mnist_is_asked_for_by_name():
    with pytest.raises(ValueError, match="'autoencoder' needs --data-root"):
        get_task("autoencoder").build(0)
    with pytest.raises(ValueError, match="task must be one of digits_mlp"):
        get_task("nonsense")
    with pytest.raises(ValueError, match="contender must be one of AdamW"):
        get_contender("nonsense")


# Contenders and runs


@pytest.mark.parametrize(
    "contender", [pytest.param(name, marks=ELSEWHERE) if name in PEERS else name for name in CONTENDERS]
)
@pytest.mark.parametrize("task", ["rosenbrock", "transformer", "mnist_cnn", "pinn"])
def test_every_contender_steps_on_the_same_batches(task, contender, data_root, monkeypatch):
    if not get_contender(contender).applies_to(get_task(task)):
        pytest.skip(f"{contender} does not apply")
    batches, built = [], []
    build = Task.build

    def spied(self, seed, root=None):
        problem = build(self, seed, root)
        draw = problem._draw

        def recorded(generator, step):
            batch = draw(generator, step)
            batches.append(batch)
            return batch

        problem._draw = recorded
        built.append((problem, [param.detach().clone() for param in problem.params]))
        return problem

    monkeypatch.setattr(Task, "build", spied)
    record = run(job(task, contender, steps=3), data_root)
    assert record["score"] is not None
    problem, start = built[0]
    assert any(not torch.equal(param.detach(), old) for param, old in zip(problem.params, start, strict=True))
    expected = build(get_task(task), 0, data_root)
    for batch in batches:
        expected.draw()
        if batch is not None:
            assert all(torch.equal(own, other) for own, other in zip(batch, expected.batch, strict=True))
    assert len(batches) == 3
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_the_score_is_the_mean_of_the_last_tenth_and_the_end_of_the_curve():
    a_job = job("logistic", steps=250)
    record = run(a_job, None)
    problem = get_task("logistic").build(0)
    optimizer = torch.optim.AdamW(problem.params, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    losses = []
    for _ in range(250):
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert record["score"] == pytest.approx(np.mean(losses[-25:]), rel=1e-6)
    assert record["curve"]["loss"][-1] == pytest.approx(record["score"], rel=1e-6)
    assert len(record["curve"]["step"]) == 100
    assert record["curve"]["loss"][0] == pytest.approx(np.mean(losses[:3]), rel=1e-6)
    assert record["curve"]["seconds"] == sorted(record["curve"]["seconds"])
    assert 0 < record["optimizer_seconds"] < record["seconds"]
    trial = run(replace(a_job, stage=TUNE), None)
    assert (trial["score"], trial["curve"]) == (record["score"], None)


def test_a_curve_is_a_running_mean():
    curve = Curve(1000)
    for step in range(1000):
        curve.add(float(step), step / 10)
    assert curve.step == list(range(10, 1001, 10))
    assert curve.loss[4] == np.mean(range(50))
    assert curve.loss[-1] == np.mean(range(900, 1000))


def test_runs_that_blow_up_have_diverged():
    not_finite = run(job("rosenbrock", "SGD", hyperparameters={"lr": 10.0, "momentum": 0.9}), None)
    assert not_finite["score"] is None
    assert 1 < not_finite["diverged_at"] <= 20
    high = run(job("drift", "SGD", hyperparameters={"lr": 3.0, "momentum": 0.9}, steps=10), None)
    assert high["score"] is None
    assert high["diverged_at"] == 10
    assert high["curve"]["loss"][-1] > 2 * high["idle_loss"]
    assert math.isfinite(high["curve"]["loss"][-1])


def test_a_lodo_that_stands_still_since_its_numbers_overflow_has_diverged():
    hyperparameters = {**RECOMMENDED, "lr": 1e-160}  # of a loss whose gradients' squares overflow
    task = replace(get_task("rosenbrock"), make=_steep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "rosenbrock", task)
        record = run(job("rosenbrock", "LODO", hyperparameters=hyperparameters, steps=30), None)
    assert record["skipped_steps"] == 30
    assert record["score"] is None
    assert record["diverged_at"] == 30
    assert math.isfinite(record["curve"]["loss"][-1])


def _steep(seed, root):
    problem = ROSENBROCK.make(seed, root)
    objective = problem._objective
    problem._objective = lambda model, batch: 1e200 * objective(model, batch)
    problem.idle_loss *= 1e200
    return problem


def test_the_cosine_reaches_every_group_and_ends_near_zero(monkeypatch):
    rates = []
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: rates.append(self.param_groups[0]["lr"]))
    run(job("pinn", "SGD", hyperparameters={"lr": 2.0, "momentum": 0.9}, schedule="cosine", steps=10), None)
    assert rates == [2.0 * factor_at("cosine", step, 10) for step in range(10)]
    assert rates[0] == 2.0
    assert rates[5] == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.06
    with pytest.raises(ValueError, match="schedule must be one of constant, cosine, got 'steps'"):
        factor_at("steps", 0, 10)


def test_evaluations_of_l_bfgs_count_as_steps():
    record = run(job("pinn", "L-BFGS", steps=57), None)
    assert record["curve"]["step"][-1] == 57
    assert record["curve"]["loss"] == sorted(record["curve"]["loss"], reverse=True)
    assert record["score"] < 0.9 * record["idle_loss"]


@ELSEWHERE
def test_schedule_free_is_judged_at_its_average(monkeypatch):
    points, modes = [], []
    from pytorch_optimizer import ScheduleFreeAdamW

    evaluate = running.Problem.evaluate

    def spied(problem):
        points.append(problem.params[0].detach().clone())
        return evaluate(problem)

    monkeypatch.setattr(running.Problem, "evaluate", spied)
    step = ScheduleFreeAdamW.step
    monkeypatch.setattr(
        ScheduleFreeAdamW, "step", lambda self: (modes.append(self.param_groups[0]["train_mode"]), step(self))
    )
    run(job("rosenbrock", "schedule-free AdamW", steps=5), None)
    assert modes == [True] * 5
    assert not torch.equal(points[-1], points[-2])  # the same batch, at the average and where the gradient is taken


def test_muon_has_the_matrices_and_adamw_the_rest():
    problem = get_task("transformer").build(0)
    muon, adamw = get_contender("Muon").make(problem, defaults("Muon"), 0)
    matrices = {param for group in muon.param_groups for param in group["params"]}
    rest = {param for group in adamw.param_groups for param in group["params"]}
    assert matrices | rest == set(problem.params)
    assert not matrices & rest
    assert problem.model.characters.weight in rest
    assert all(param.ndim == 2 for param in matrices)
    assert not get_contender("Muon").applies_to(get_task("bowl"))
    assert not get_contender("L-BFGS").applies_to(get_task("digits_mlp"))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_muon_orthogonalises_in_the_dtype_of_the_parameters(shape):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    param.grad = torch.randn(shape, dtype=torch.float64)
    Muon([param], lr=1.0, momentum=0.0, weight_decay=0.0, nesterov=False).step()
    # The same five iterations on the singular values alone, which they change without the singular vectors.
    left, values, right = torch.linalg.svd(param.grad, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    expected = -(max(1, shape[0] / shape[1]) ** 0.5) * (left * values) @ right
    torch.testing.assert_close(param.detach(), expected, rtol=1e-10, atol=1e-12)  # bfloat16: 1e-2
