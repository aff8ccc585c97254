"""Training runs of the paper's experiments: what a result says, divergence, resuming, kills, the command."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import lodo
from examples.paper import __main__ as command
from examples.paper import runs as module
from examples.paper.experiments import BOWL, EXPERIMENTS, betas
from examples.paper.optimizers import OPTIMIZERS, defaults, make_optimizer, make_step
from examples.paper.plan import training_jobs
from examples.paper.runs import Job, Place, append_result, read_results, run, run_all
from examples.paper.tasks import NoisyBowl

PLACE = Place()
FAST = ("SGD", "RMSprop", "Adam", "Yogi", "LARS", "O-LBFGS", "BFGS", "LODO")


def job(optimizer="SGD", seed=0, steps=100, **options):
    hyperparameters = options.pop("hyperparameters", None) or defaults(optimizer)
    return Job("bowl", "main", optimizer, "bowl", optimizer, hyperparameters, seed, steps, **options)


def losses_of(a_job):
    """The same run, written out."""
    task = NoisyBowl(a_job.seed, **a_job.task_options)
    optimizer = make_optimizer(a_job.optimizer, task, a_job.hyperparameters, a_job.seed)
    step = make_step(a_job.optimizer, task, optimizer)
    losses = []
    for _ in range(a_job.steps):
        task.draw()
        losses.append(step())
    return np.array(losses)


def without_times(result):
    """What two runs of the same job must have in common: all but the clock and the load of the machine."""
    dropped = ("seconds", "setup_seconds", "steps_per_second", "started", "environment")
    kept = {name: value for name, value in result.items() if name not in dropped}
    return kept | {"curve": {name: values for name, values in result["curve"].items() if name != "seconds"}}


@pytest.mark.parametrize("steps", [1, 9, 100, 1234])
def test_result_says_what_happened(steps):
    a_job = job("Adam", seed=2, steps=steps)
    losses, result = losses_of(a_job), run(a_job, PLACE)
    tail = max(1, steps // 10)
    assert result["status"] == "finished"
    assert result["final_loss"] == pytest.approx(losses[-tail:].mean(), rel=1e-12)
    curve = result["curve"]
    assert curve["step"][-1] == steps
    starts = [0, *curve["step"][:-1]]
    expected = [losses[start:end].mean() for start, end in zip(starts, curve["step"], strict=True)]
    np.testing.assert_allclose(curve["loss"], expected, rtol=1e-5)
    assert curve["seconds"] == sorted(curve["seconds"])
    assert result["environment"]["torch"] == torch.__version__
    assert result["environment"]["lodo"] == lodo.__version__
    assert Job(**result["job"]) == a_job


def test_divergence_is_recorded():
    a_job = job(hyperparameters={"lr": 1e3, "momentum": 0.0}, steps=1000)
    result = run(a_job, PLACE)
    assert result["status"] == "diverged"
    assert result["final_loss"] is None
    losses = losses_of(replace(a_job, steps=result["diverged_at"]))
    assert np.isfinite(losses[:-1]).all()
    assert not np.isfinite(losses[-1])
    json.dumps(result, allow_nan=False)


def test_hessian_error_of_lodo_is_followed():
    result = run(job("LODO", steps=300, hessian_every=100), PLACE)
    assert result["hessian_error"]["step"] == [100, 200, 300]
    task = NoisyBowl(0)
    optimizer = make_optimizer("LODO", task, defaults("LODO"), 0)
    step = make_step("LODO", task, optimizer)
    for _ in range(300):
        task.draw()
        step()
    g = optimizer.preconditioners[0].to_dense()
    exact = torch.linalg.matrix_norm(torch.eye(100) - g @ task.h) / 10
    assert result["hessian_error"]["value"][-1] == pytest.approx(float(exact), rel=0.2)
    assert run(job("SGD", hessian_every=50), PLACE)["hessian_error"] == {}


def test_trajectory_starts_at_the_start():
    rosenbrock = Job("rosenbrock", "main", "SGD", "rosenbrock", "SGD", defaults("SGD"), 0, 20, trajectory=True)
    trajectory = run(rosenbrock, PLACE)["trajectory"]
    assert len(trajectory) == 20
    assert trajectory[0] == [-0.5, 2.0]
    assert trajectory[1] != trajectory[0]


@pytest.mark.parametrize("name", FAST)
def test_every_optimizer_learns_and_resumes(name, tmp_path, monkeypatch):
    """A run that is cut off goes on from its checkpoint to the same result, bit for bit."""
    tuned = {"lr": 0.05} if name in ("SGD", "Adam", "RMSprop", "Yogi", "O-LBFGS") else {}
    a_job = job(name, steps=400, hyperparameters=defaults(name) | tuned, hessian_every=150)
    place = replace(PLACE, checkpoints=tmp_path)
    whole = run(a_job, PLACE)
    done = 0

    def stop_in_the_middle(steps):
        nonlocal done
        done += steps
        if done > 180:  # some checkpoints are enough: each waits for the disk
            monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)
        if done > 200:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(a_job, place, stop_in_the_middle)
    assert (tmp_path / f"{a_job.key}.pt").exists()
    monkeypatch.undo()
    assert without_times(run(a_job, place)) == without_times(whole)
    assert (tmp_path / f"{a_job.key}.pt").exists(), "only who has written the result may remove it"


def test_run_all_resumes_from_checkpoints_and_removes_them(tmp_path, monkeypatch):
    jobs, path = [job("LODO", seed, steps=200) for seed in (0, 1)], tmp_path / "runs.jsonl"
    place = replace(PLACE, checkpoints=tmp_path / "checkpoints")
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)
    first = NoisyBowl.draw
    calls = 0

    def fail_once(task):
        nonlocal calls
        calls += 1
        if calls == 300:
            raise OSError("no more")
        first(task)

    monkeypatch.setattr(NoisyBowl, "draw", fail_once)
    with pytest.raises(RuntimeError, match="1 of 2 runs failed"):
        run_all(jobs, path, place, workers=1)
    assert len(list(place.checkpoints.iterdir())) == 1
    calls = 1000
    results = run_all(jobs, path, place, workers=1)
    assert calls - 1000 < 120, "the second run went on where it was"
    assert not list(place.checkpoints.iterdir())
    assert [without_times(result) for result in results] == [without_times(run(each, PLACE)) for each in jobs]


@pytest.mark.filterwarnings("ignore:LODO skipped a step")
def test_lodo_that_stands_still_has_diverged():
    result = run(job("LODO", hyperparameters={"lr": 1e4, "meta_lr": 1e-3, "beta": 0.9}, steps=1000), PLACE)
    assert result["status"] == "diverged"
    assert result["skipped_steps"] > 10


def test_figures_that_are_not_finite_are_kept_as_none(tmp_path, monkeypatch):
    monkeypatch.setattr(NoisyBowl, "validate", lambda task: {"validation_loss": math.nan})
    monkeypatch.setattr(NoisyBowl, "backward", lambda task: 1e308)
    (result,) = run_all([job("SGD", validate_every=50)], tmp_path / "runs.jsonl", PLACE, workers=1)
    assert result["validation"]["validation_loss"] == [None, None]
    assert result["status"] == "diverged"
    assert result["final_loss"] is None
    assert result["diverged_at"] == 100


def test_seeds_and_settings_make_other_runs():
    assert len({job(seed=seed).key for seed in range(5)} | {job(steps=50).key, job("Adam").key}) == 7
    assert job().key == job().key


def test_finished_runs_are_not_made_again(tmp_path, monkeypatch):
    jobs = [job("SGD", seed) for seed in range(3)]
    path = tmp_path / "runs.jsonl"
    first = run_all(jobs[:2], path, PLACE, workers=1)
    written = path.read_text()
    made = []
    monkeypatch.setattr(module, "run", lambda job, place, progress: made.append(job.seed) or run(job, place))
    everything = run_all(jobs, path, PLACE, workers=1)
    assert made == [2]
    assert path.read_text().startswith(written)
    assert everything[:2] == first
    assert [result["job"]["seed"] for result in everything] == [0, 1, 2]


@pytest.mark.parametrize("cut", [20, 1])
def test_a_torn_last_line_is_dropped_and_written_over(cut, tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    results = [run(job(seed=seed, steps=5), PLACE) for seed in range(3)]
    append_result(path, results[0])
    append_result(path, results[1])
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_results(path) == results[:1]
    assert "cut off" in capsys.readouterr().err
    append_result(path, results[2])
    assert read_results(path) == [results[0], results[2]]


@pytest.mark.parametrize(
    ("line", "match"), [("{broken\n{}\n", "line 1: not a JSON line"), ('{"format": 0}\n', "format must be")]
)
def test_foreign_lines_are_refused(tmp_path, line, match):
    path = tmp_path / "runs.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=match):
        read_results(path)


def test_a_failing_run_leaves_the_others(tmp_path):
    good, bad = job(steps=5), replace(job(steps=5), task="dish")
    with pytest.raises(RuntimeError, match="1 of 2 runs failed"):
        run_all([bad, good], tmp_path / "runs.jsonl", PLACE, workers=1)
    (result,) = read_results(tmp_path / "runs.jsonl")
    assert result["key"] == good.key


def killed_jobs():
    return [job("SGD", seed, steps=2000) for seed in range(8)]


def run_killed_jobs(path):
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    run_all(killed_jobs(), path, PLACE, workers=2)


def signalled_after_two_runs(path, number):
    """The process that made the runs, after it and its workers got the signal and it ended."""
    process = multiprocessing.get_context("spawn").Process(target=run_killed_jobs, args=(path,))
    process.start()
    while len(read_results(path)) < 2:
        assert process.is_alive()
        time.sleep(0.02)
    os.killpg(process.pid, number)
    process.join(timeout=60)
    return process


def test_kill_and_resume_loses_nothing(tmp_path):
    path = tmp_path / "runs.jsonl"
    signalled_after_two_runs(path, signal.SIGKILL)
    kept = read_results(path)
    results = run_all(killed_jobs(), path, PLACE, workers=1)
    assert results[: len(kept)] == kept
    assert sorted(result["job"]["seed"] for result in results) == list(range(8))
    again = run(killed_jobs()[0], PLACE)
    (same,) = (result for result in results if result["job"]["seed"] == 0)
    assert without_times(json.loads(json.dumps(again))) == without_times(same)


def test_an_interrupt_drops_the_runs_that_wait(tmp_path):
    """As Ctrl-C does it: the signal reaches the workers too."""
    path = tmp_path / "runs.jsonl"
    process = signalled_after_two_runs(path, signal.SIGINT)
    assert process.exitcode not in (None, 0)
    assert 2 <= len(read_results(path)) < len(killed_jobs())


def test_transplanted_network_is_frozen_and_learned_elsewhere():
    options = {"lr": 0.5, "meta_lr": 1e-3, "beta": 0.0, "pretrain_steps": 50}
    task = NoisyBowl(0)
    optimizer = make_optimizer("LODO-Transplanted", task, options, 0)
    assert not task.params[0].any()
    assert not task.center.any()
    assert optimizer.param_groups[0]["meta_lr"] == 0.0
    g = optimizer.preconditioners[0].to_dense()
    assert not torch.allclose(g, torch.eye(100, dtype=g.dtype), atol=1e-3)
    step = make_step("LODO-Transplanted", task, optimizer)
    for _ in range(5):
        task.draw()
        step()
    torch.testing.assert_close(optimizer.preconditioners[0].to_dense(), g, rtol=0, atol=0)
    untrained = make_optimizer("LODO-Transplanted", NoisyBowl(0), options | {"pretrain_steps": 0}, 0)
    assert untrained.param_groups[0]["meta_lr"] == 0.0


def test_plans_name_known_optimizers_and_whole_schedules():
    for experiment in EXPERIMENTS.values():
        assert set(experiment.optimizers) <= set(OPTIMIZERS)
        assert len(experiment.schedule) == 10
        assert {point.optimizer for sweep in experiment.sweeps for point in sweep.points} <= set(OPTIMIZERS)
    assert sum(generation.steps for generation in BOWL.schedule) == 71_400
    assert list(betas(3, last=0.99)) == pytest.approx([0.0, 0.9, 0.99])


@pytest.fixture(scope="module")
def commanded(tmp_path_factory):
    """What the command has left of all stages for two optimizers, and its arguments."""
    out = tmp_path_factory.mktemp("paper")
    arguments = ["rosenbrock", "--trials", "4", "--generations", "2", "--runs", "2", "--steps", "50", "--threads", "1"]
    command.main([*arguments, "--optimizers", "SGD,LODO", "--out", str(out)])
    return out, arguments


def test_command_searches_trains_sweeps_and_reports(commanded):
    out, _ = commanded
    tuned = json.loads((out / "tuned.json").read_text())
    assert set(tuned) == {"SGD", "LODO"}
    results = read_results(out / "runs.jsonl")
    assert len(results) == 4
    assert all(result["job"]["hyperparameters"] == tuned[result["job"]["optimizer"]] for result in results)
    assert "LODO" in (out / "report.md").read_text()


def test_searching_one_optimizer_keeps_what_others_found(commanded, tmp_path):
    out, arguments = commanded
    before = json.loads((out / "tuned.json").read_text())
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    command.main([*arguments, "--optimizers", "Adam", "--stages", "search", "--out", str(tmp_path)])
    after = json.loads((tmp_path / "tuned.json").read_text())
    assert set(after) == {"SGD", "LODO", "Adam"}
    assert {name: after[name] for name in before} == before


def test_schedules_are_shortened_evenly():
    plan, _ = command.parse(["bowl", "--generations", "3", "--search-steps", "500", "--trials", "4"])
    assert [(each.std, each.steps) for each in plan.experiment.schedule] == [(3, 500), (1.4, 500), (0.6, 500)]
    assert plan.experiment.population == 4


def test_learning_rates_are_halved_where_the_paper_does():
    plan, _ = command.parse(["generation", "--optimizers", "Adam,LODO", "--runs", "1", "--data-root", "."])
    tuned = {"Adam": {"lr": 0.2, "beta1": 0.9, "beta2": 0.99}, "LODO": {"lr": 1.0, "meta_lr": 0.1, "beta": 0.5}}
    assert [each.hyperparameters["lr"] for each in training_jobs(plan, tuned)] == [0.1, 0.5]
    assert training_jobs(plan, tuned)[1].hyperparameters["meta_lr"] == 0.1


def test_missing_packages_are_named_at_the_start(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "pytorch_optimizer" else 1)
    command.parse(["bowl", "--optimizers", "SGD"])
    with pytest.raises(SystemExit):
        command.parse(["bowl", "--optimizers", "SGD,Yogi"])
    assert "pytorch_optimizer must be installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["bowl", "--stages", "train,rest"], "--stages must be of"),
        (["bowl", "--workers", "0"], "--workers must be at least 1"),
        (["bowl", "--optimizers", "SGDD"], "optimizer must be one of"),
        (["bowl", "--batch-size", "3"], "only the image tasks"),
        (["bowl", "--search-steps", "-5"], "--search-steps must be at least 1"),
        (["bowl", "--trials", "1"], "--trials must be at least 2"),
        (["bowl", "--device", "cuda"], "--device must be cpu for bowl"),
        (["bowl", "--optimizers", "LODO-Transplanted"], "part of the bowl's sweeps"),
        (["generation"], "generation needs --data-root"),
    ],
)
def test_bad_commands(arguments, match, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert match in capsys.readouterr().err
