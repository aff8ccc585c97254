"""The comparison on many tasks: searches, calibration, sharing, the command."""

import gzip
import itertools
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
from benchmarks.shootout import plan as planning
from benchmarks.shootout import sharing, tuning
from benchmarks.shootout.changes import CHANGES, EVERYWHERE, NOTHING_CHANGED
from benchmarks.shootout.contenders import (
    ANCHOR,
    CLOCK,
    CONTENDERS,
    RECOMMENDED,
    REFERENCE,
    TUNED,
    UNTUNED,
    Contender,
    get_contender,
)
from benchmarks.shootout.plan import (
    CHANGE_SEED,
    Plan,
    calibration_jobs,
    change_jobs,
    choice,
    final_jobs,
    next_trial,
    robust_jobs,
    trials,
)
from benchmarks.shootout.problem import TRAINING, VALIDATION
from benchmarks.shootout.report import write_report
from benchmarks.shootout.spaces import Choice, Range, grid, momentum, rate, second_decay, weight_decay, widen
from benchmarks.shootout.tasks import SEALED_TASKS, TASKS, get_task
from examples.paper.runs import append_result
from tests.helpers.shootout_jobs import fake, job


def plan(out, **changes):
    fields = {"tasks": ["rosenbrock"], "contenders": ["AdamW", "LODO"], "trials": 4, "steps": 20, "seeds": 1}
    return Plan(out=out, draws=20, **fields | changes)


# Ranges


def test_a_grid_is_half_a_decade_apart_and_has_both_ends():
    assert grid(rate(1e-3, 1e-1, 1e-2)) == pytest.approx([1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1])
    for contender in CONTENDERS.values():
        if contender.space:
            positions = grid(contender.space["lr"])
            ratios = [high / low for low, high in itertools.pairwise(positions)]
            assert ratios == pytest.approx([10**0.5] * len(ratios))
            assert positions[-1] == pytest.approx(contender.space["lr"].high, rel=0.2)
            assert len(positions) >= 5


def test_a_range_widens_where_a_best_setting_stands_at_its_end():
    space = {"lr": rate(1e-3, 1e-1, 1e-2), "beta": momentum(0.9), "way": Choice(("a", "b"))}
    inside = {"lr": 1e-2, "beta": 0.9, "way": "b"}
    assert widen(space, [inside]) is None
    wider = widen(space, [inside, {"lr": 9.9e-2, "beta": 0.99, "way": "a"}])
    assert wider["lr"].high == pytest.approx(10**-0.5)
    assert wider["lr"].low == 1e-3
    assert wider["beta"].low == pytest.approx(1e-2 / 10**0.5)  # 1 minus a higher momentum
    assert wider["beta"].high == 0.5
    assert widen(space, [{"lr": 1.05e-3, "beta": 0.5, "way": "a"}])["lr"].low == pytest.approx(10**-3.5)
    fixed = {"lr": replace(space["lr"], ceiling=1e-1)}
    assert widen(fixed, [{"lr": 1e-1}]) is None


def test_values_of_decays_and_of_what_can_be_off():
    beta = second_decay(0.999)
    assert beta.value(1e-3) == 0.999
    assert beta.position(0.999) == pytest.approx(1e-3)
    off = weight_decay()
    assert (off.value(1e-4), off.value(1e-3), off.default) == (0.0, 1e-3, 0.0)
    assert off.position(0.0) == 1e-4
    assert off.end_of(0.0) is None
    assert off.end_of(1.0) == "high"
    assert Range(1.0, 10.0, 5.0).position(0.999) == 1.0


# Searches


def searched(a_plan, task, contender, records, stop=100, best=0.02):
    """Makes a search's trials on a bowl in log lr instead of runs, and returns all jobs. Validation wants lr x 3."""
    jobs = []
    while len(jobs) < stop and (a_job := next_trial(a_plan, task, contender, records)):
        jobs.append(a_job)
        lr = a_job.hyperparameters["lr"]
        harm = (a_job.schedule == "warmup_cosine") + 0.1 * a_job.hyperparameters.get("nesterov", 0)
        for name, right in (("beta1", 0.1), ("beta2", 1e-2)):  # so that no end is the best
            harm += 0.1 * math.log((1 - a_job.hyperparameters.get(name, 1 - right)) / right) ** 2
        losses = [0.1 + math.log(lr / wanted) ** 2 + harm for wanted in (best, 3 * best)]
        records.append(fake(a_job, None if lr > 5e2 else losses[0], losses[1]))
    return jobs


def test_a_search_scans_tries_choices_closes_in_and_resumes_exactly(tmp_path):
    a_plan, task, contender = plan(tmp_path, trials=None), get_task("rosenbrock"), get_contender("AdamW")
    whole, parts = [], []
    jobs = searched(a_plan, task, contender, whole)
    assert len(jobs) == 40
    first = grid(contender.space["lr"])
    assert [each.hyperparameters["lr"] for each in jobs[:9]] == first
    assert all(each.hyperparameters["beta1"] == 0.9 for each in jobs[:9])
    assert {each.schedule for each in jobs[:9]} == {"warmup_cosine"}
    assert all(each.seed == planning.TUNING_SEED for each in jobs)
    best = min(first, key=lambda lr: abs(math.log(lr / 0.02)))
    assert [each.hyperparameters["lr"] for each in jobs[9:14]] == first[::2]
    assert {each.schedule for each in jobs[9:14]} == {"warmup"}
    assert {each.hyperparameters["nesterov"] for each in jobs[:14]} == {False}
    choice_ = jobs[14]
    assert choice_.hyperparameters["nesterov"]
    assert (choice_.schedule, choice_.hyperparameters["lr"]) == (
        "warmup",
        first[4],
    )  # on top of what is the best so far
    assert len({each.hyperparameters["lr"] for each in jobs[15:]}) == 25
    for each in jobs[15:]:
        assert best / 30 <= each.hyperparameters["lr"] <= best * 40  # a decade around the best for either aim
        assert 0.5 <= each.hyperparameters["beta1"] <= 0.99
        assert "weight_decay" not in each.hyperparameters  # every batch is fresh
    for wanted in (0.02, 0.06):  # of the two aims
        assert min(abs(math.log(each.hyperparameters["lr"] / wanted)) for each in jobs[15:]) < 0.2
    searched(a_plan, task, contender, parts, stop=17)
    read_again = [json.loads(json.dumps(record)) for record in parts]
    searched(a_plan, task, contender, read_again)
    assert [record["key"] for record in read_again] == [each.key for each in jobs]
    hole = whole[:6] + whole[7:]
    assert next_trial(a_plan, task, contender, hole).key == jobs[6].key


@pytest.mark.parametrize(("best", "extended"), [(1e-5, 3), (30.0, 3), (1e-12, 6)])
def test_a_scan_goes_on_where_the_best_rate_is_at_its_end(tmp_path, best, extended):
    a_plan, task, contender, records = plan(tmp_path, trials=None), get_task("rosenbrock"), get_contender("SGD"), []
    jobs = searched(a_plan, task, contender, records, best=best)
    first = len(grid(contender.space["lr"]))
    tried = [each.hyperparameters["lr"] for each in jobs]
    further = [lr for lr in tried[first : first + 6] if lr < 0.9e-3 or lr > 1.1]
    assert len(further) >= extended
    if best > 1e-6:
        assert min(abs(math.log(lr / best)) for lr in tried) < 0.5
    assert choice(a_plan, task, contender, records) is not None


def test_each_schedule_has_a_scan_of_its_own(tmp_path):
    """A constant rate may want another one by decades, as where the loss's minimum moves."""
    a_plan, task, contender, records = plan(tmp_path, trials=None), get_task("bowl"), get_contender("AdamW"), []
    while a_job := next_trial(a_plan, task, contender, records):
        best = 1e3 if a_job.schedule == "warmup_cosine" else 0.5
        ends = 1.5 if a_job.schedule == "warmup_cosine" else 1.0
        records.append(fake(a_job, ends + 0.1 * math.log(a_job.hyperparameters["lr"] / best) ** 2))
    assert choice(a_plan, task, contender, records).schedule == "warmup"
    assert choice(a_plan, task, contender, records).hyperparameters["lr"] == pytest.approx(0.5, rel=0.5)


def test_a_search_whose_best_stands_at_an_end_goes_on_in_wider_ranges(tmp_path, monkeypatch):
    """Whatever the estimator says, here: the lowest beta is the best."""
    a_plan, task, contender, records = plan(tmp_path, trials=None), get_task("rosenbrock"), get_contender("SGD"), []

    def lowest(space, aims, done, seed):
        momentum_ = space["momentum"]
        return {name: each.default for name, each in space.items()} | {"momentum": momentum_.value(momentum_.high)}

    monkeypatch.setattr(tuning, "suggest", lowest)
    while a_job := next_trial(a_plan, task, contender, records):
        scanned = math.log(a_job.hyperparameters["lr"] / 0.02) ** 2 if len(records) < 12 else 0.0
        records.append(fake(a_job, 1 + scanned + a_job.hyperparameters["momentum"]))
    ends = [1 - record["job"]["hyperparameters"]["momentum"] for record in records]
    assert len(records) == 24 + 5
    assert ends[23] == pytest.approx(0.5)
    assert ends[24:] == pytest.approx([0.9] * 5)  # half a decade further would be above the ceiling
    search = planning.search_of(a_plan, task, contender)
    assert [search.is_done(records[:count]) for count in (23, 24, 28, 29)] == [False, False, False, True]


def test_options_that_cost_much_are_tried_last_on_the_best_settings(tmp_path):
    a_plan, task, contender, records = plan(tmp_path, trials=None), get_task("rosenbrock"), get_contender("SOAP"), []
    jobs = searched(a_plan, task, contender, records)
    plain = [each for each in jobs if "precondition_frequency" not in each.hyperparameters]
    last = jobs[len(plain) :]
    assert len(plain) >= 24
    assert 1 <= len(last) <= 2
    best = min(records[: len(plain)], key=lambda record: record["score"])["job"]
    assert last[0].hyperparameters == {**best["hyperparameters"], "precondition_frequency": 1}
    assert last[0].schedule == best["schedule"]
    search = planning.search_of(a_plan, task, contender)
    for count in range(len(records) + 1):
        assert search.is_done(records[:count]) == (next_trial(a_plan, task, contender, records[:count]) is None)
    chosen = choice(a_plan, task, contender, records)
    assert chosen.hyperparameters == best["hyperparameters"]  # as good, but dearer
    better = [*records[:-1], records[-1] | {"score": 0.98 * min(record["score"] for record in records)}]
    assert choice(a_plan, task, contender, better).hyperparameters["precondition_frequency"] == 1
    assert len(trials(a_plan, task, contender, records)) == len(jobs)
    assert next_trial(a_plan, task, contender, records) is None


def test_the_choice_is_the_best_trial_by_each_aim_and_waits_for_all(tmp_path):
    a_plan, task, contender, records = plan(tmp_path, trials=20), get_task("rosenbrock"), get_contender("SGD"), []
    a_plan = replace(a_plan, contenders=["SGD"])
    searched(a_plan, task, contender, records, stop=19)
    assert choice(a_plan, task, contender, records) is None
    assert final_jobs(a_plan, records) == []
    searched(a_plan, task, contender, records)
    chosen = {aim: choice(a_plan, task, contender, records, aim) for aim in (TRAINING, VALIDATION)}
    best = min(records, key=lambda record: record["score"])["job"]
    assert (chosen[TRAINING].hyperparameters, chosen[TRAINING].schedule) == (best["hyperparameters"], best["schedule"])
    assert chosen[VALIDATION].hyperparameters["lr"] > chosen[TRAINING].hyperparameters["lr"]
    finals = final_jobs(a_plan, records)
    assert [each.hyperparameters for each in finals] == [each.hyperparameters for each in chosen.values()]
    assert final_jobs(a_plan, records, (VALIDATION,)) == finals[1:]
    assert {(each.seed, each.stage) for each in finals} == {(0, "final")}
    same = [fake_again(record, validation=record["score"]) for record in records]
    assert len(final_jobs(a_plan, same)) == 1  # one setting is the best by both


def fake_again(record, validation):
    return record | {"validation": record["validation"] | {"loss": [validation]}}


def test_a_search_needs_no_validation_where_there_is_none(tmp_path):
    a_plan, task, contender, records = plan(tmp_path, tasks=["bowl"]), get_task("bowl"), get_contender("SGD"), []
    searched(a_plan, task, contender, records)
    assert all(record["validation"] is None for record in records)
    a_plan = replace(a_plan, contenders=["SGD"])
    assert len(final_jobs(a_plan, records)) == 1
    assert final_jobs(a_plan, records, (VALIDATION,)) == []


def test_seeds_are_the_contenders_own(tmp_path):
    a_plan = plan(tmp_path, contenders=["LODO"], seeds=None)
    assert [each.seed for each in final_jobs(a_plan, [])] == [0, 1, 2, 3, 4]
    assert {name for name, each in CONTENDERS.items() if each.seeds == 5} >= {"AdamW", "LODO", ANCHOR}
    assert get_contender("SOAP").seeds == 3


def test_wrong_rates_are_those_of_the_reference_and_of_lodo(tmp_path):
    a_plan, records = plan(tmp_path, contenders=["AdamW", "SGD", "LODO"]), []
    for name in ("AdamW", "SGD"):
        searched(a_plan, get_task("rosenbrock"), get_contender(name), records)
    found = robust_jobs(a_plan, records)
    assert {each.contender for each in found} == {REFERENCE, UNTUNED}
    right = {each.contender: each.hyperparameters["lr"] for each in final_jobs(a_plan, records, (TRAINING,))}
    ratios = {(each.contender, each.factor): each.hyperparameters["lr"] / right[each.contender] for each in found}
    wanted = itertools.product(("AdamW", "LODO"), planning.FACTORS)
    assert ratios == {(name, factor): pytest.approx(factor) for name, factor in wanted}


def test_another_recommended_call_is_another_run_and_another_search(tmp_path):
    before = plan(tmp_path, contenders=["LODO", "LODO, tuned"])
    after = replace(before, recommended={**RECOMMENDED, "max_step_norm": 0.03})
    task, tuned, records = get_task("rosenbrock"), get_contender(TUNED), []
    searched(before, task, tuned, records)
    assert choice(before, task, tuned, records) is not None
    assert choice(after, task, tuned, records) is None
    (one,) = final_jobs(replace(before, contenders=[UNTUNED]), [])
    (other,) = final_jobs(replace(after, contenders=[UNTUNED]), [])
    assert one.key != other.key
    assert other.hyperparameters == {**RECOMMENDED, "max_step_norm": 0.03}
    only_lr = replace(before, recommended={**RECOMMENDED, "lr": 1.0})
    assert choice(only_lr, task, tuned, records) is not None  # what is searched anyway


def test_runs_of_other_code_of_lodo_are_made_again_when_asked(tmp_path):
    a_plan = plan(tmp_path, contenders=["LODO", "L-BFGS"], tasks=["pinn"], trials=5)
    trials_ = []
    searched(a_plan, get_task("pinn"), get_contender("L-BFGS"), trials_)
    records = [fake(each, 1.0) for each in final_jobs(a_plan, trials_)]
    for record in records:
        append_result(a_plan.records_path, record | {"environment": {**record["environment"], "lodo_source": "old"}})
    assert len(a_plan.load()) == 2
    again = replace(a_plan, redoes=True)
    assert [record["job"]["contender"] for record in again.load()] == ["L-BFGS"]
    ours = next(record for record in records if record["job"]["contender"] == "LODO")
    append_result(a_plan.records_path, ours | {"score": 0.5})
    assert {record["job"]["contender"]: record["score"] for record in again.load()}["LODO"] == 0.5
    assert len(again.load()) == len(a_plan.load()) == 2  # of each run the last record counts


# Calibration


def two_candidates():
    return Contender("two", lambda *_: [], candidates=[{"schedule": "warmup", "lr": lr} for lr in (1.0, 2.0, 3.0)])


@pytest.fixture
def calibration(tmp_path, monkeypatch):
    monkeypatch.setitem(CONTENDERS, "two", two_candidates())
    a_plan = plan(tmp_path, contenders=["two"], trials=None)
    return a_plan, calibration_jobs(a_plan, get_contender("two"))


def test_candidates_run_on_the_tasks_to_choose_on_whatever_the_plans_tasks(calibration):
    a_plan, jobs = calibration
    assert {each.task for each in jobs} == {name for name, task in TASKS.items() if task.split == "choose"}
    assert len(jobs) == 8 * 3
    assert {(each.stage, each.schedule, each.seed) for each in jobs} == {("calibrate", "warmup", planning.TUNING_SEED)}
    assert {name for name, each in CONTENDERS.items() if each.candidates} >= {ANCHOR, "Prodigy, calibrated"}
    assert calibration_jobs(a_plan, get_contender("AdamW, torch's defaults")) == []  # nothing to choose


def test_the_calibrated_setting_has_the_lowest_mean_of_capped_ratios(calibration):
    a_plan, jobs = calibration
    two, task = get_contender("two"), get_task("rosenbrock")

    def scores(job):
        """1 is far the best on one task, 2 by a factor of 1.5 on all others; 3 diverges on one."""
        lr = job.hyperparameters["lr"]
        if job.task == "pinn":
            return {1.0: 1e-9, 2.0: 1.0, 3.0: None}[lr]
        return {1.0: 1.5, 2.0: 1.0, 3.0: 1.0}[lr]

    records = [fake(each, scores(each), 1.0 if each.hyperparameters["lr"] == 3 else 2.0) for each in jobs]
    assert choice(a_plan, task, two, records[:-1]) is None
    assert choice(a_plan, task, two, records).hyperparameters == {"lr": 2.0}  # 1.5^7 > 10
    assert choice(a_plan, task, two, records, VALIDATION).hyperparameters == {"lr": 3.0}
    assert [each.schedule for each in final_jobs(a_plan, records)] == ["warmup", "warmup"]
    fewer = replace(a_plan, trials=2)
    assert {each.hyperparameters["lr"] for each in calibration_jobs(fewer, two)} == {1.0, 2.0}


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"steps": 21}, {"schedule": "warmup"}, {"version": 2}, {"factor": 10.0}]
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
    assert len(made) == 2 + 1 + 1  # by either aim AdamW's best setting is the same, so one final run serves both
    whole = a_plan.records_path.read_bytes()
    a_plan.records_path.write_bytes(whole[:-50])
    sharing.work_on(a_plan, "tune")
    sharing.work_on(a_plan, "final")
    assert len(made) == 5
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
    assert choice(a_plan, get_task("rosenbrock"), get_contender("SGD"), a_plan.load()) is not None


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
    a_plan = plan(tmp_path, contenders=["LODO"], seeds=2)
    records = [fake(each, 1.0) for each in final_jobs(a_plan, [])]
    records[1]["environment"] = {**records[1]["environment"], "lodo_source": "another"}
    for record in records:
        append_result(a_plan.records_path, record)
    assert "**LODO's runs are of different code**: " in write_report(a_plan).read_text()


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
    assert (
        len(records) == 3 * 2 + len(finals) + calibration + wrong + changes
    )  # pinn is to choose on, rosenbrock is not
    assert f"not tuned yet: {ANCHOR} on rosenbrock; {ANCHOR} on pinn" in printed
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
    (tmp_path / "runs.jsonl.gz").write_bytes(gzip.compress((tmp_path / "runs.jsonl").read_bytes()))
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
    assert "not tuned yet: SGD on rosenbrock" in capsys.readouterr().err
    assert not (tmp_path / "runs.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "nonsense"], "task must be one of"),
        (["--contenders", "nonsense"], "contender must be one of"),
        (["--stages", "tune,cook"], "--stages must be of tune, calibrate, final, robust, change, report, got cook"),
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
