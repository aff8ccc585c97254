"""The comparison on many tasks: problems, contenders, runs, searches, sharing, report."""

import importlib.util
import json
import math
import multiprocessing
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.shootout import __main__ as command
from benchmarks.shootout import running, sharing
from benchmarks.shootout.contenders import (
    CONTENDERS,
    RECOMMENDED,
    TUNED,
    UNTUNED,
    fixed_options,
    get_contender,
    hidden_matrices,
)
from benchmarks.shootout.plan import Plan, choice, final_jobs, load, robust_jobs
from benchmarks.shootout.report import write_report
from benchmarks.shootout.running import TUNE, Curve, Job, factor_at, run
from benchmarks.shootout.tasks import TASKS, Task, get_task
from benchmarks.shootout.tuning import next_trial, scan
from examples.paper.runs import append_result

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


def defaults(name):
    contender = get_contender(name)
    return fixed_options(name, RECOMMENDED) | {key: each.default for key, each in contender.space.items()}


def job(task="rosenbrock", contender="AdamW", **changes):
    fields = {"schedule": "constant", "seed": 0, "steps": 20, "stage": "final"} | changes
    return Job(
        task=task, contender=contender, hyperparameters=fields.pop("hyperparameters", defaults(contender)), **fields
    )


def plan(out, **changes):
    fields = {"tasks": ["rosenbrock"], "contenders": ["AdamW", "LODO"], "trials": 4, "steps": 20, "seeds": (0,)}
    return Plan(out=out, **fields | changes)


# Tasks


def test_there_are_eight_tasks_to_choose_on_and_more_to_hold_out():
    splits = [task.split for task in TASKS.values()]
    assert splits.count("choose") == 8
    assert splits.count("hold out") >= 4


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


# Searches


def fake(a_job, score):
    """A record as `run` leaves it, without the run."""
    steps = a_job.steps
    at = [float(step) for step in range(1, steps + 1)]
    return {
        "format": 1,
        "key": a_job.key,
        "job": json.loads(json.dumps(running.asdict(a_job))),
        "score": score,
        "curve": {"step": at, "seconds": [step / 100 for step in at], "loss": [score or 9.0] * steps},
        "idle_loss": 9.0,
        "seconds": steps / 100,
        "optimizer_seconds": steps / 300,
        "environment": running.environment(),
    }


def searched(a_plan, task, contender, schedule, records, stop=100):
    """Makes a search's trials on a bowl in log lr instead of runs, and returns all jobs."""
    jobs = []
    while len(jobs) < stop and (a_job := next_trial(a_plan, task, contender, schedule, records)):
        jobs.append(a_job)
        lr = a_job.hyperparameters["lr"]
        records.append(fake(a_job, None if lr > 5 else math.log(lr / 0.02) ** 2 + (schedule == "cosine")))
    return jobs


def test_a_search_scans_then_closes_in_and_resumes_exactly(tmp_path):
    a_plan, task, contender = plan(tmp_path, trials=None), get_task("rosenbrock"), get_contender("AdamW")
    whole, parts = [], []
    jobs = searched(a_plan, task, contender, "constant", whole)
    assert len(jobs) == 12
    first = scan(contender, 5)
    assert [each.hyperparameters["lr"] for each in jobs[:5]] == [each["lr"] for each in first]
    assert all(each.hyperparameters["beta1"] == 0.9 for each in jobs[:5])
    assert all(each.seed >= 1000 for each in jobs)
    assert len({each.hyperparameters["lr"] for each in jobs}) == 12
    for each in jobs:
        assert 1e-4 <= each.hyperparameters["lr"] <= 10
        assert 0.5 <= each.hyperparameters["beta1"] <= 0.99
    searched(a_plan, task, contender, "constant", parts, stop=7)
    read_again = [json.loads(json.dumps(record)) for record in parts]
    searched(a_plan, task, contender, "constant", read_again)
    assert [record["key"] for record in read_again] == [each.key for each in jobs]
    hole = whole[:6] + whole[7:]
    assert next_trial(a_plan, task, contender, "constant", hole).key == jobs[6].key


def test_the_choice_is_the_best_trial_over_both_schedules_and_waits_for_them(tmp_path):
    a_plan, task, contender, records = plan(tmp_path), get_task("rosenbrock"), get_contender("SGD"), []
    a_plan = replace(a_plan, contenders=["SGD"])
    searched(a_plan, task, contender, "cosine", records)
    assert choice(a_plan, task, contender, records) is None
    assert final_jobs(a_plan, records) == []
    jobs = searched(a_plan, task, contender, "constant", records)
    best = min(jobs, key=lambda each: abs(math.log(each.hyperparameters["lr"] / 0.02)))
    assert choice(a_plan, task, contender, records) == (best.hyperparameters, "constant")
    (final,) = final_jobs(a_plan, records)
    assert (final.hyperparameters, final.seed, final.stage) == (best.hyperparameters, 0, "final")
    factors = {
        each.factor: each.hyperparameters["lr"] / best.hyperparameters["lr"] for each in robust_jobs(a_plan, records)
    }
    assert factors == pytest.approx({0.01: 0.01, 0.1: 0.1, 10.0: 10.0, 100.0: 100.0})


def test_another_recommended_call_is_another_run_and_another_search(tmp_path):
    before = plan(tmp_path, contenders=["LODO", "LODO, tuned"])
    after = replace(before, recommended={**RECOMMENDED, "max_step_norm": 0.03})
    task, tuned, records = get_task("rosenbrock"), get_contender(TUNED), []
    for schedule in tuned.schedules:
        searched(before, task, tuned, schedule, records)
    assert choice(before, task, tuned, records) is not None
    assert choice(after, task, tuned, records) is None
    (one,) = final_jobs(replace(before, contenders=[UNTUNED]), [])
    (other,) = final_jobs(replace(after, contenders=[UNTUNED]), [])
    assert one.key != other.key
    assert other.hyperparameters == {**RECOMMENDED, "max_step_norm": 0.03}
    only_lr = replace(before, recommended={**RECOMMENDED, "lr": 1.0})
    assert choice(only_lr, task, tuned, records) is not None  # what is searched anyway


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"steps": 21}, {"schedule": "cosine"}, {"version": 2}, {"factor": 10.0}]
)
def test_every_field_is_part_of_the_key(change):
    assert replace(job(), **change).key != job().key
    assert job(hyperparameters={"lr": 1.0}).key != job(hyperparameters={"lr": 2.0}).key
    assert job(hyperparameters={"lr": 1.0, "a": 2.0}).key == job(hyperparameters={"a": 2.0, "lr": 1.0}).key


# Sharing


def test_runs_that_are_there_are_not_made_again_and_a_torn_line_is(tmp_path, monkeypatch, capsys):
    a_plan = plan(tmp_path, contenders=["AdamW", "LODO"], trials=2)
    made = []
    monkeypatch.setattr(sharing, "run", lambda a_job, root: made.append(a_job) or fake(a_job, 1.0))
    sharing.work_on(a_plan, "tune")
    sharing.work_on(a_plan, "final")
    assert len(made) == 2 * 2 + 2
    whole = a_plan.records_path.read_bytes()
    a_plan.records_path.write_bytes(whole[:-50])
    sharing.work_on(a_plan, "tune")
    sharing.work_on(a_plan, "final")
    assert len(made) == 7
    assert made[-1].key == made[-2].key
    assert {record["key"] for record in load(a_plan.records_path)} == {each.key for each in made}
    assert "cut off" in capsys.readouterr().err


def test_a_claimed_unit_is_left_to_its_owner(tmp_path, monkeypatch):
    a_plan = plan(tmp_path, contenders=["LODO"], seeds=(0, 1))
    first, second = final_jobs(a_plan, [])
    made = []
    monkeypatch.setattr(sharing, "run", lambda a_job, root: made.append(a_job) or fake(a_job, 1.0))
    with sharing.claim(tmp_path / "claims", first.key) as is_ours:
        assert is_ours

        def owner_ends(seconds):
            append_result(a_plan.records_path, fake(first, 1.0))

        monkeypatch.setattr(sharing.time, "sleep", owner_ends)
        assert sharing.work(a_plan, "final") == 0
    assert made == [second]


def _hold(folder, ready):
    with sharing.claim(folder, "unit"):
        ready.set()
        ready.wait(60)
        while True:
            pass


def test_a_claim_ends_with_its_process(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: the child only holds a lock
        process = context.Process(target=_hold, args=(tmp_path, ready))
        process.start()
    assert ready.wait(30)
    with sharing.claim(tmp_path, "unit") as is_ours:
        assert not is_ours
    process.kill()
    process.join()
    with sharing.claim(tmp_path, "unit") as is_ours:
        assert is_ours


def test_a_run_that_raises_takes_no_other_with_it(tmp_path, monkeypatch):
    a_plan = plan(tmp_path, contenders=["LODO"], tasks=["bowl", "rosenbrock"])

    def failing(a_job, root):
        if a_job.task == "bowl":
            raise RuntimeError("no memory")
        return fake(a_job, 1.0)

    monkeypatch.setattr(sharing, "run", failing)
    with pytest.raises(RuntimeError, match="1 units of the stage 'final' failed"):
        sharing.work_on(a_plan, "final")
    assert [record["job"]["task"] for record in load(a_plan.records_path)] == ["rosenbrock"]


# The command


def test_the_command_runs_all_stages_and_reports_from_records_alone(tmp_path, capsys):
    tasks = "rosenbrock,mnist_mlp,pinn"
    arguments = ["--tasks", tasks, "--contenders", "AdamW;L-BFGS;LODO", "--trials", "2", "--steps", "12"]
    arguments += ["--out", str(tmp_path), "--seeds", "1"]
    command.main(arguments)
    printed = capsys.readouterr().err
    assert "mnist_mlp is skipped: it needs --data-root" in printed
    records = load(tmp_path / "runs.jsonl")
    assert len(records) == (2 * 4 + 2) + 5 * (2 * 2 + 1)
    text = (tmp_path / "report.md").read_text()
    for part in (
        "In one table",
        "When the learning rate is wrong",
        "Held out",
        "rosenbrock",
        "lr x 100",
        "of 2",
        "optuna",
    ):
        assert part in text
    assert "nan" not in text
    assert "inf" not in text.replace("informed", "")
    for name in ("profile", "robustness", "curves_rosenbrock", "curves_pinn"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert f"({name}.png)" in text
    command.main([*arguments, "--stages", "report"])
    assert "**Not run**: mnist_mlp." in (tmp_path / "report.md").read_text()
    assert len(load(tmp_path / "runs.jsonl")) == len(records)
    with pytest.raises(ValueError, match="no final run for these settings"):
        write_report(plan(tmp_path, steps=13))


def test_final_runs_of_what_is_not_tuned_are_left_out_aloud(tmp_path, capsys):
    command.main(["--tasks", "rosenbrock", "--contenders", "SGD", "--stages", "final", "--out", str(tmp_path)])
    assert "not tuned yet: SGD on rosenbrock" in capsys.readouterr().err
    assert not (tmp_path / "runs.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "nonsense"], "task must be one of"),
        (["--contenders", "nonsense"], "contender must be one of"),
        (["--stages", "tune,cook"], "--stages must be of tune, final, robust, report, got cook"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--lodo", "[1]"], "--lodo must be a JSON object"),
        (["--lodo", "{"], "--lodo must be JSON"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.parse(arguments)
    assert message in capsys.readouterr().err


def test_options_of_lodo_come_from_the_command_line():
    a_plan, _ = command.parse(["--lodo", '{"lr": 0.5, "depth": null}', "--data-root", "."])
    assert a_plan.recommended == {**{k: v for k, v in RECOMMENDED.items() if k != "depth"}, "lr": 0.5}
    assert a_plan.data_root == Path(".")
    assert list(a_plan.tasks) == list(TASKS)
