"""The comparison on many tasks: sharing, the command."""

import lzma
import multiprocessing
import warnings
from pathlib import Path

import pytest

from benchmarks.shootout import __main__ as command
from benchmarks.shootout import sharing, tuning
from benchmarks.shootout.changes import CHANGES, EVERYWHERE
from benchmarks.shootout.contenders import ANCHOR, CLOCK, RECOMMENDED, get_contender
from benchmarks.shootout.jobs import final_jobs, left_out
from benchmarks.shootout.plan import trials
from benchmarks.shootout.report import write_report
from benchmarks.shootout.tasks import SEALED_TASKS, TASKS, get_task
from examples.paper.runs import append_result
from tests.helpers.shootout_jobs import fake, plan, searched

# Sharing


def test_runs_that_are_there_are_not_made_again_and_a_torn_line_is(tmp_path, monkeypatch, capsys):
    a_plan = plan(tmp_path, contenders=["AdamW", "LODO"], trials=2)
    made = []
    monkeypatch.setattr(sharing, "run", lambda a_job, root: made.append(a_job) or fake(a_job, 1.0))
    stages = ("tune", "confirm", "final")
    for stage in stages:
        sharing.work_on(a_plan, stage)
    assert len(made) == 2 + 2 * 4 + 1 + 1  # by either aim AdamW's best setting is the same: one final run serves both
    whole = a_plan.records_path.read_bytes()
    a_plan.records_path.write_bytes(whole[:-50])
    for stage in stages:
        sharing.work_on(a_plan, stage)
    assert len(made) == 13
    assert made[-1].key == made[-2].key
    assert {record["key"] for record in a_plan.load()} == {each.key for each in made}
    assert "cut off" in capsys.readouterr().err


def test_a_claimed_unit_is_left_to_its_owner(tmp_path, monkeypatch):
    a_plan = plan(tmp_path, contenders=["LODO"], seeds=2)
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
    a_plan = plan(tmp_path, contenders=["LODO"], seeds=3)
    parents, made = iter(range(100, 200)), []
    monkeypatch.setattr(sharing.os, "getppid", lambda: next(parents))  # another one each time it is asked for
    monkeypatch.setattr(sharing, "run", lambda a_job, root: made.append(a_job) or fake(a_job, 1.0))
    assert sharing.work(a_plan, "final", parent=99) == 0
    assert made == []
    sharing.work_on(a_plan, "final")
    assert len(made) == 3


def test_records_of_another_protocol_do_not_count(tmp_path):
    a_plan = plan(tmp_path, contenders=["SGD"], trials=4)
    task, sgd, records = get_task("rosenbrock"), get_contender("SGD"), []
    searched(a_plan, task, sgd, records)
    old = records[1]["job"]
    old = {**old, "hyperparameters": {key: old["hyperparameters"][key] for key in ("lr", "momentum")}}
    assert len(trials(a_plan, task, sgd, [records[0], {**records[1], "job": old}, *records[2:]])) == 1
    without = {key: value for key, value in records[0].items() if key != "validation"}
    append_result(a_plan.records_path, without)
    assert a_plan.load() == []


def test_a_proposal_that_raises_takes_no_other_with_it(tmp_path, monkeypatch):
    a_plan = plan(tmp_path, contenders=["SGD"], tasks=["bowl", "rosenbrock"], trials=14)
    suggest = tuning.suggest

    def failing(space, aims, done, seed):
        if done[0]["job"]["task"] == "bowl":
            raise RuntimeError("singular")
        return suggest(space, aims, done, seed)

    monkeypatch.setattr(tuning, "suggest", failing)
    monkeypatch.setattr(sharing, "run", lambda a_job, root: fake(a_job, 1.0))
    with pytest.raises(RuntimeError, match="1 units of the stage 'tune' failed"):
        sharing.work_on(a_plan, "tune")
    assert left_out(a_plan, "confirm", a_plan.load()) == ["SGD on bowl"]


def test_a_run_that_raises_takes_no_other_with_it(tmp_path, monkeypatch):
    a_plan = plan(tmp_path, contenders=["LODO"], tasks=["bowl", "rosenbrock"])

    def failing(a_job, root):
        if a_job.task == "bowl":
            raise RuntimeError("no memory")
        return fake(a_job, 1.0)

    monkeypatch.setattr(sharing, "run", failing)
    with pytest.raises(RuntimeError, match="1 units of the stage 'final' failed"):
        sharing.work_on(a_plan, "final")
    assert [record["job"]["task"] for record in a_plan.load()] == ["rosenbrock"]


# The command


def test_the_command_runs_all_stages_and_reports_from_records_alone(tmp_path, capsys):
    tasks = "rosenbrock,mnist_mlp,pinn"
    contenders = f"AdamW;L-BFGS;{CLOCK};{ANCHOR};LODO"
    arguments = ["--tasks", tasks, "--contenders", contenders, "--trials", "2", "--steps", "12"]
    arguments += ["--out", str(tmp_path), "--seeds", "1", "--draws", "20"]
    command.main(arguments)
    printed = capsys.readouterr().err
    assert "mnist_mlp is skipped: it needs --data-root" in printed
    records = plan(tmp_path).load()
    changes = len(CHANGES) + sum(change.splits == EVERYWHERE for change in CHANGES.values())
    finals = [record for record in records if record["job"]["stage"] == "final"]
    assert 7 <= len(finals) <= 10  # of two tasks, by one or two settings of what is tuned; L-BFGS has one task
    calibration = 2 * 6  # candidates on those tasks to choose on that need no MNIST: it is not finished without
    wrong = 4 * 2 * 2 * 3  # learning rates, contenders, tasks, seeds
    again = [record for record in records if record["job"]["stage"] == "confirm"]
    assert 0 < len(again) <= 3 * 2 * 4  # of each search at most both trials, at four seeds
    assert len(records) == 3 * 2 + len(again) + len(finals) + calibration + wrong + changes
    assert f"not chosen yet: {ANCHOR} on rosenbrock; {ANCHOR} on pinn" in printed
    text = (tmp_path / "report.md").read_text()
    for part in (
        "Without tuning",
        "Tuned on every task",
        "When the learning rate is wrong",
        "Which goals untuned LODO reaches",
        "Whether AdamW was tuned well enough",
        "With one thing changed",
        "`scale_lr=0.1`",
        "held out",
        "By validation loss",
        "rosenbrock",
        "lr x 100",
        "of 2",
        "optuna",
    ):
        assert part in text
    assert "nan" not in text
    assert "inf" not in text.replace("informed", "")
    for name in ("profile_untuned", "profile_tuned", "robustness", "curves_rosenbrock", "curves_pinn"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert f"({name}.png)" in text
    command.main([*arguments, "--stages", "report"])
    assert "**Not run**: mnist_mlp." in (tmp_path / "report.md").read_text()
    assert "of different code" not in (tmp_path / "report.md").read_text()
    assert len(plan(tmp_path).load()) == len(records)
    (tmp_path / "runs.jsonl.xz").write_bytes(lzma.compress((tmp_path / "runs.jsonl").read_bytes()))
    (tmp_path / "runs.jsonl").unlink()
    command.main(arguments)  # makes nothing anew
    assert not (tmp_path / "runs.jsonl").exists()
    assert plan(tmp_path).load() == records
    with pytest.raises(ValueError, match="no final run for these settings"):
        write_report(plan(tmp_path, steps=13))
    with pytest.raises(SystemExit, match="no final run for these settings"):
        command.main([*arguments, "--stages", "report", "--lodo", '{"lr": 0.5}', "--contenders", "LODO"])


def test_final_runs_of_what_is_not_tuned_are_left_out_aloud(tmp_path, capsys):
    command.main(["--tasks", "rosenbrock", "--contenders", "SGD", "--stages", "final", "--out", str(tmp_path)])
    assert "not chosen yet: SGD on rosenbrock" in capsys.readouterr().err
    assert not (tmp_path / "runs.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "nonsense"], "task must be one of"),
        (["--contenders", "nonsense"], "contender must be one of"),
        (
            ["--stages", "tune,cook"],
            "--stages must be of tune, calibrate, confirm, final, robust, change, report, got cook",
        ),
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
    assert (a_plan.seeds, a_plan.redoes) == (None, False)
    assert command.parse(["--redo", "--seeds", "2", "--data-root", "."])[0].redoes


def test_sealed_tasks_open_only_when_asked():
    name = next(iter(SEALED_TASKS))
    with pytest.raises(ValueError, match=f"the task {name!r} is sealed"):
        command._plan(command._parser().parse_args(["--tasks", name]), ["report"])
    a_plan, _ = command.parse(["--sealed", "--data-root", "."])
    assert list(a_plan.tasks) == list(SEALED_TASKS)
    assert not set(TASKS) & set(SEALED_TASKS)
