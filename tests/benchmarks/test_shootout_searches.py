"""The comparison on many tasks: searches, sharing, the command."""

import gzip
import json
import math
import multiprocessing
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lodo
from benchmarks.shootout import __main__ as command
from benchmarks.shootout import running, sharing
from benchmarks.shootout.changes import CHANGES, EVERYWHERE, NOTHING_CHANGED
from benchmarks.shootout.contenders import RECOMMENDED, TUNED, UNTUNED, get_contender
from benchmarks.shootout.plan import CHANGE_SEED, Plan, change_jobs, choice, final_jobs, load, robust_jobs
from benchmarks.shootout.report import write_report
from benchmarks.shootout.tasks import TASKS, get_task
from benchmarks.shootout.tuning import next_trial, scan
from examples.paper.runs import append_result
from tests.helpers.shootout_jobs import job


def plan(out, **changes):
    fields = {"tasks": ["rosenbrock"], "contenders": ["AdamW", "LODO"], "trials": 4, "steps": 20, "seeds": (0,)}
    return Plan(out=out, **fields | changes)


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


def test_a_command_outlives_its_shell_and_a_worker_not_its_command(tmp_path, monkeypatch):
    a_plan = plan(tmp_path, contenders=["LODO"], seeds=(0, 1, 2))
    parents, made = iter(range(100, 200)), []
    monkeypatch.setattr(sharing.os, "getppid", lambda: next(parents))  # another one each time it is asked for
    monkeypatch.setattr(sharing, "run", lambda a_job, root: made.append(a_job) or fake(a_job, 1.0))
    assert sharing.work(a_plan, "final", parent=99) == 0
    assert made == []
    sharing.work_on(a_plan, "final")
    assert len(made) == 3


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


def test_changes_are_made_one_at_a_time_at_a_seed_of_their_own(tmp_path):
    jobs = change_jobs(plan(tmp_path, tasks=["rosenbrock", "pinn"]))
    assert list(jobs) == list(CHANGES)
    for name, own in jobs.items():
        assert {each.task for each in own} == {"pinn"} | (
            {"rosenbrock"} if CHANGES[name].splits == EVERYWHERE else set()
        )
        for each in own:
            assert (each.seed, each.contender, each.steps) == (CHANGE_SEED, UNTUNED, 20)
            kept = {key: value for key, value in RECOMMENDED.items() if key not in CHANGES[name].options}
            changed = {key: value for key, value in CHANGES[name].options.items() if value is not None}
            assert each.hyperparameters == {**kept, **changed}
            lodo.LODO([torch.ones(2, 2, requires_grad=True)], **each.hyperparameters)
    assert len({each.key for own in jobs.values() for each in own}) == sum(map(len, jobs.values()))
    assert jobs[NOTHING_CHANGED][0].hyperparameters == RECOMMENDED
    assert not any(change_jobs(plan(tmp_path, contenders=["AdamW"])).values())


def test_reports_say_where_runs_are_of_different_code(tmp_path):
    a_plan = plan(tmp_path, contenders=["LODO"], seeds=(0, 1))
    records = [fake(each, 1.0) for each in final_jobs(a_plan, [])]
    records[1]["environment"] = {**records[1]["environment"], "lodo_source": "another"}
    for record in records:
        append_result(a_plan.records_path, record)
    assert "**LODO's runs are of different code**: " in write_report(a_plan).read_text()


# The command


def test_the_command_runs_all_stages_and_reports_from_records_alone(tmp_path, capsys):
    tasks = "rosenbrock,mnist_mlp,pinn"
    arguments = ["--tasks", tasks, "--contenders", "AdamW;L-BFGS;LODO", "--trials", "2", "--steps", "12"]
    arguments += ["--out", str(tmp_path), "--seeds", "1"]
    command.main(arguments)
    printed = capsys.readouterr().err
    assert "mnist_mlp is skipped: it needs --data-root" in printed
    records = load(tmp_path / "runs.jsonl")
    changes = len(CHANGES) + sum(change.splits == EVERYWHERE for change in CHANGES.values())
    assert len(records) == (2 * 4 + 2) + 5 * (2 * 2 + 1) + changes  # pinn is to choose on, rosenbrock is not
    text = (tmp_path / "report.md").read_text()
    for part in (
        "In one table",
        "When the learning rate is wrong",
        "When the goal is the best of the others",
        "With one thing changed",
        "`scale_lr=0.1`",
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
    assert "of different code" not in (tmp_path / "report.md").read_text()
    assert len(load(tmp_path / "runs.jsonl")) == len(records)
    (tmp_path / "runs.jsonl.gz").write_bytes(gzip.compress((tmp_path / "runs.jsonl").read_bytes()))
    (tmp_path / "runs.jsonl").unlink()
    command.main(arguments)  # makes nothing anew
    assert not (tmp_path / "runs.jsonl").exists()
    assert load(tmp_path / "runs.jsonl") == records
    with pytest.raises(ValueError, match="no final run for these settings"):
        write_report(plan(tmp_path, steps=13))
    with pytest.raises(SystemExit, match="no final run for these settings"):
        command.main([*arguments, "--stages", "report", "--lodo", '{"lr": 0.5}', "--contenders", "LODO"])


def test_final_runs_of_what_is_not_tuned_are_left_out_aloud(tmp_path, capsys):
    command.main(["--tasks", "rosenbrock", "--contenders", "SGD", "--stages", "final", "--out", str(tmp_path)])
    assert "not tuned yet: SGD on rosenbrock" in capsys.readouterr().err
    assert not (tmp_path / "runs.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "nonsense"], "task must be one of"),
        (["--contenders", "nonsense"], "contender must be one of"),
        (["--stages", "tune,cook"], "--stages must be of tune, final, robust, change, report, got cook"),
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
