"""The comparison on many tasks: problems, contenders, runs."""

import importlib.util
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.schedules import factor_at
from benchmarks.shootout import images, running, text
from benchmarks.shootout.contenders import CONTENDERS, RECOMMENDED, get_contender, hidden_matrices
from benchmarks.shootout.problem import SELECTING, Problem
from benchmarks.shootout.running import TUNE, VALIDATIONS, Curve, run
from benchmarks.shootout.spaces import Range
from benchmarks.shootout.tasks import TASKS, Task, get_task
from tests.helpers.shootout_jobs import defaults, job

ELSEWHERE = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("pytorch_optimizer", "opt_einsum")),
    reason="the extra `benchmarks` is not installed",
)
ROSENBROCK = get_task("rosenbrock")
PEERS = {name for name, contender in CONTENDERS.items() if contender.packages}
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


@pytest.fixture(autouse=True)
def few_images_held_out(monkeypatch):
    """Of the folder's images to validate with, half are to choose settings by."""
    monkeypatch.setattr(images, "HELD_OUT", IMAGES["t10k"] // 2)


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


@pytest.mark.parametrize("name", TASKS)
def test_validation_leaves_the_training_as_it_is(name, data_root):
    task = TASKS[name]
    problem, undisturbed = task.build(3, data_root), task.build(3, data_root)
    losses = []
    for each in (problem, undisturbed):
        for _ in range(3):
            if each is problem:
                state = torch.get_rng_state()
                found = each.validate()
                assert each.validate() == found
                assert torch.equal(torch.get_rng_state(), state)
            loss = each.loss()
            for param, grad in zip(each.params, torch.autograd.grad(loss, each.params), strict=True):
                param.data.sub_(grad, alpha=1e-5)
            losses.append(float(loss.detach()))
    assert losses[:3] == losses[3:]
    assert (found is None) == (not task.is_validated)
    assert all(param.grad is None for param in problem.params)
    if found is not None:
        assert 0 < found[0] < 2 * problem.idle_loss  # at the start
        assert found[1] is None or 0 <= found[1] <= 1
        with torch.no_grad():
            for param in problem.params:
                param.add_(0.1 * torch.randn_like(param))
        assert problem.validate() != found


def held_batch(problem):
    """The batch that a problem validates with."""
    validate = problem._validate
    return validate.__closure__[validate.__code__.co_freevars.index("batch")].cell_contents


def test_what_is_validated_with_is_not_trained_on(data_root, monkeypatch):
    monkeypatch.setattr(images, "PIXEL_NOISE", 0.0)  # with noise no two images are the same
    for name in ("mnist_mlp", "mnist_cnn", "autoencoder", "digits_mlp", "scaled_mlp", "vae"):
        problem = TASKS[name].build(0, data_root)
        batches = [problem._draw(torch.Generator().manual_seed(seed), 0) for seed in range(40)]
        trained = torch.cat([batch[0] if isinstance(batch, tuple) else batch for batch in batches])
        batch = held_batch(problem)
        held = batch[0] if isinstance(batch, tuple) else batch
        same = [bool((trained == each).flatten(1).all(1).any()) for each in held]
        assert not any(same), name
        assert bool((trained == trained[:1]).flatten(1).all(1).any())  # the check would see it


def test_settings_are_chosen_on_other_held_out_data_than_are_reported(data_root):
    for name in ("mnist_mlp", "mnist_cnn", "autoencoder", "transformer", "lstm"):
        choosing, reporting = (held_batch(TASKS[name].build(seed, data_root)) for seed in (SELECTING, 4))
        inputs = [batch[0] if isinstance(batch, tuple) else batch for batch in (choosing, reporting)]
        assert inputs[0].shape == inputs[1].shape
        assert not any(bool((inputs[0] == each).flatten(1).all(1).any()) for each in inputs[1][:50]), name
    text_ = text.characters(text.HELD_OUT_MODULES)
    assert (len(text_) - 33) / text.HELD_OUT_WINDOWS / 2 > 33  # windows do not overlap
    assert len(text._words(text.HELD_OUT_MODULES)) / text.HELD_OUT_WORDS / 2 > 3


def test_text_is_validated_on_other_modules():
    assert not set(text.HELD_OUT_MODULES) & {*text.MODULES, *text.OTHERS}
    assert text._source(text.HELD_OUT_MODULES) not in text._source()
    words, others = text._words(), text._words(text.HELD_OUT_MODULES)
    assert len(torch.unique(words)) == text.WORDS
    assert (others == text.WORDS - 1).double().mean() > (words == text.WORDS - 1).double().mean()  # rarer words there


@pytest.mark.parametrize(
    ("name", "share"), [("factorisation", 0.7), ("pinn", 0.7), ("rosenbrock", 0.7), ("logistic", 0.85)]
)
def test_validation_falls_with_training(name, share):
    problem = get_task(name).build(0)
    at_start = problem.validate()[0]
    optimizer = torch.optim.Adam(problem.params, lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        problem.loss().backward()
        optimizer.step()
    assert problem.validate()[0] < 0.85 * at_start


def test_rosenbrock_is_validated_by_its_expectation():
    problem = get_task("rosenbrock").build(0)
    with torch.no_grad():
        problem.params[0].uniform_(0.5, 1.0)
        losses = torch.stack([problem.loss() for _ in range(4000)])
    spread = float(losses.std() / math.sqrt(len(losses)))
    assert abs(float(losses.mean()) - problem.validate()[0]) < 4 * spread


def test_statistics_of_batch_norms_are_renewed_and_put_back():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))

    def draw(generator, step):
        return torch.randn(64, 3, generator=generator)

    problem = Problem(model, draw, lambda model, batch: model(batch).square().mean(), 0)
    problem.loss()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    put_back = problem.renew_statistics()
    hidden = model[0](torch.cat([draw(torch.Generator().manual_seed(9), 0) for _ in range(100)]))
    torch.testing.assert_close(model[1].running_mean, hidden.mean(0).detach(), atol=0.1, rtol=0.1)
    torch.testing.assert_close(model[1].running_var, hidden.var(0).detach(), atol=0.1, rtol=0.1)
    assert not torch.equal(model[1].running_mean, kept["1.running_mean"])
    put_back()
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert model[1].momentum == 0.1


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
    hyperparameters = defaults(contender, task)
    if contender == "SGD":
        hyperparameters["lr"] = 1e-4  # these few steps are without a warm-up
    record = run(job(task, contender, hyperparameters=hyperparameters, steps=3), data_root)
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
    losses, held_out = [], []
    for step in range(250):
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % (250 // VALIDATIONS) == 0:
            held_out.append(problem.validate())
    assert record["score"] == pytest.approx(np.mean(losses[-25:]), rel=1e-6)
    assert record["curve"]["loss"][-1] == pytest.approx(record["score"], rel=1e-6)
    assert len(record["curve"]["step"]) == 100
    assert record["curve"]["loss"][0] == pytest.approx(np.mean(losses[:3]), rel=1e-6)
    assert record["curve"]["seconds"] == sorted(record["curve"]["seconds"])
    assert 0 < record["optimizer_seconds"] < record["seconds"]
    found = record["validation"]
    assert found["step"] == list(range(10, 251, 10))
    assert found["loss"] == pytest.approx([loss for loss, _ in held_out], rel=1e-6)
    assert found["accuracy"] == pytest.approx([accuracy for _, accuracy in held_out])
    trial = run(replace(a_job, stage=TUNE), None)
    assert (trial["score"], trial["curve"]) == (record["score"], None)
    assert (trial["validation"]["step"], trial["validation"]["loss"]) == ([250], found["loss"][-1:])


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


def test_schedules_reach_every_group(monkeypatch):
    rates = []
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: rates.append(self.param_groups[0]["lr"]))
    hyperparameters = {"lr": 2.0, "momentum": 0.9}
    for schedule in ("warmup_cosine", "warmup", "constant"):
        run(job("pinn", "SGD", hyperparameters=hyperparameters, schedule=schedule, steps=100), None)
    cosine, warm, constant = rates[:100], rates[100:200], rates[200:]
    assert cosine == [2.0 * factor_at("warmup_cosine", step, 100) for step in range(100)]
    assert warm[:5] == cosine[:5] == pytest.approx([2 * step / 6 for step in range(1, 6)])
    assert warm[5:] == [2.0] * 95
    assert max(cosine) == cosine[5] == 2.0
    assert cosine[5:] == sorted(cosine[5:], reverse=True)
    assert cosine[5 + 38] == pytest.approx(1 + math.cos(math.pi * 0.4))
    assert 0 < cosine[-1] < 1e-3
    assert constant == [2.0] * 100
    with pytest.raises(ValueError, match=r"schedule must be one of .*, cooldown, got 'steps'"):
        factor_at("steps", 0, 10)


@ELSEWHERE
@pytest.mark.parametrize("name", [name for name, each in CONTENDERS.items() if each.space])
def test_every_contender_bears_the_ends_of_its_ranges(name):
    """Where ranges can be widened to."""
    contender, task = get_contender(name), get_task("drift")
    if not contender.applies_to(task):
        task = get_task("pinn")
    ranges = {key: each for key, each in contender.space_of(task).items() if isinstance(each, Range)}
    for key, each in ranges.items():
        for place in (each.floor or each.low, min(each.ceiling, 1e9)):
            hyperparameters = defaults(name, task.name) | {key: each.value(place)}
            record = run(job(task.name, name, hyperparameters=hyperparameters, steps=3), None)
            assert len(record["curve"]["step"]) == 3 or record["score"] is None


def test_evaluations_of_l_bfgs_count_as_steps():
    record = run(job("pinn", "L-BFGS", steps=57), None)
    assert record["curve"]["step"][-1] == 57
    assert record["curve"]["loss"] == sorted(record["curve"]["loss"], reverse=True)
    assert record["score"] < 0.9 * record["idle_loss"]
    best = record["curve"]["loss"][-1]
    assert len(set(record["validation"]["loss"])) <= len({loss for loss in record["curve"]["loss"] if loss >= best})


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
    found = []
    validate = running.Problem.validate
    monkeypatch.setattr(
        running.Problem, "validate", lambda self: (found.append(self.params[0].detach().clone()), validate(self))[1]
    )
    run(job("rosenbrock", "schedule-free AdamW", steps=5), None)
    assert torch.equal(found[-2], points[-1])  # where the next loss is taken, before the step
    assert modes == [True] * 5
    assert not torch.equal(points[-1], points[-2])  # the same batch, at the average and where the gradient is taken


@ELSEWHERE
def test_muon_has_the_hidden_matrices_and_adamw_the_rest():
    problem = get_task("transformer").build(0)
    model, options = problem.model, defaults("Muon", "transformer")
    muon, adamw = get_contender("Muon").make(problem, options, 0, 10)
    matrices = {param for group in muon.param_groups for param in group["params"]}
    rest = {param for group in adamw.param_groups for param in group["params"]}
    assert matrices | rest == set(problem.params)
    assert not matrices & rest
    assert {model.characters.weight, model.places.weight, model.head.weight} <= rest
    assert all(param.ndim == 2 for param in matrices)
    assert adamw.defaults["betas"] == (0.9, 0.95)
    assert adamw.defaults["lr"] == options["adamw_lr"] != options["lr"]
    muon, adamw = get_contender("Muon").make(problem, options | {"head": "muon"}, 0, 10)
    assert any(param is model.head.weight for group in muon.param_groups for param in group["params"])
    assert not get_contender("Muon").applies_to(get_task("bowl"))
    assert not get_contender("L-BFGS").applies_to(get_task("digits_mlp"))


def test_filters_are_muons_too(data_root):
    model = get_task("mnist_cnn").build(0, data_root).model
    assert [param.ndim for param in hidden_matrices(model)] == [4, 4, 2]
    assert [param.ndim for param in hidden_matrices(model, with_head=False)] == [4, 4]
    factors = get_task("factorisation").build(0).model
    assert len(hidden_matrices(factors, with_head=False)) == 2  # neither is a last layer


@ELSEWHERE
def test_an_average_is_validated_with_statistics_of_its_own():
    """Batch norm's running statistics are those of where the gradients are taken."""
    from pytorch_optimizer import ScheduleFreeAdamW

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))

    def draw(generator, step):
        return torch.randn(64, 3, generator=generator)

    seen = []

    def validate(model, step):
        seen.append([model[0].weight.detach().clone(), model[1].running_mean.clone(), model.training])
        return torch.ones(()), None

    problem = Problem(model, draw, lambda model, batch: model(batch).square().mean(), 0, validate=validate)
    optimizer = ScheduleFreeAdamW(problem.params, lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        problem.loss().backward()
        optimizer.step()
    point, statistics = model[0].weight.detach().clone(), model[1].running_mean.clone()
    running.Validation(20, 1).take(problem, [optimizer], 20, 1.0, is_averaging=True)
    average, mean, is_training = seen[0]
    assert not is_training
    assert not torch.equal(average, point)
    batches = torch.cat([draw(torch.Generator().manual_seed(seed), 0) for seed in range(50)])
    with torch.no_grad():
        expected = (batches @ average.T + model[0].bias).mean(0)
    assert (mean - expected).abs().max() < 0.15
    assert torch.equal(model[0].weight.detach(), point)
    assert torch.equal(model[1].running_mean, statistics)
    assert model.training


def test_nesterovs_adamw_is_the_one_without_a_momentum_schedule():
    """As optax's nadamw: m_hat of the next step from m, and the gradient, both corrected."""
    problem = get_task("pinn").build(0)
    options = {"lr": 1e-2, "beta1": 0.8, "beta2": 0.9, "nesterov": True, "weight_decay": 0.1}
    (optimizer,) = get_contender("AdamW").make(problem, options, 0, 10)
    param = problem.params[2]
    x, m, v = param.detach().clone(), torch.zeros_like(param), torch.zeros_like(param)
    for step in range(1, 6):
        optimizer.zero_grad()
        problem.loss().backward()
        g = param.grad.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g.square()
        ahead = 0.8 * m / (1 - 0.8 ** (step + 1)) + 0.2 * g / (1 - 0.8**step)
        x = x * (1 - 1e-2 * 0.1) - 1e-2 * ahead / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
        torch.testing.assert_close(param.detach(), x, rtol=1e-7, atol=1e-9)


def test_weight_decay_is_searched_where_data_are_finite():
    for contender in CONTENDERS.values():
        assert "weight_decay" not in contender.space_of(get_task("rosenbrock"))
        spaces = contender.space_of(get_task("digits_mlp"))
        assert ("weight_decay" in spaces) == ("weight_decay" in contender.space)
        in_vectors = contender.space_of(get_task("logistic"))
        assert ("weight_decay" in in_vectors) == ("weight_decay" in spaces and contender.name != "PSGD-Kron")
        assert bool(contender.space) + bool(contender.candidates) <= 1
    assert sum("weight_decay" in contender.space for contender in CONTENDERS.values()) >= 8
