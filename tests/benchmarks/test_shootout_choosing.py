"""The comparison on many tasks: which settings are chosen, and the runs that are made with them."""

import itertools
from dataclasses import replace

import pytest
import torch

import lodo
from benchmarks.schedules import factor_at
from benchmarks.shootout import plan as planning
from benchmarks.shootout.changes import CHANGES, EVERYWHERE, NOTHING_CHANGED
from benchmarks.shootout.choosing import CONFIRMED, Chosen, calibration_jobs, choice, confirmation_jobs, shortlist
from benchmarks.shootout.contenders import (
    ANCHOR,
    CONTENDERS,
    RECOMMENDED,
    REFERENCE,
    TUNED,
    UNTUNED,
    Contender,
    get_contender,
)
from benchmarks.shootout.jobs import FACTORS, change_jobs, final_jobs, left_out, robust_jobs
from benchmarks.shootout.plan import CHANGE_SEED, CONFIRMING_SEEDS, next_trial
from benchmarks.shootout.problem import SELECTING, TRAINING, VALIDATION
from benchmarks.shootout.report import write_report
from benchmarks.shootout.running import CONFIRM, FINAL, run, score_of
from benchmarks.shootout.tasks import TASKS, get_task
from examples.paper.runs import append_result
from tests.helpers.shootout_jobs import confirmed, fake, job, on_bowl, plan, searched, settled


def test_the_best_trials_run_again_at_further_seeds_which_alone_choose(tmp_path):
    a_plan, task, contender, records = plan(tmp_path, trials=20), get_task("rosenbrock"), get_contender("SGD"), []
    a_plan = replace(a_plan, contenders=["SGD"])
    searched(a_plan, task, contender, records, stop=19)
    assert choice(a_plan, task, contender, records) is None
    assert confirmation_jobs(a_plan, records) == final_jobs(a_plan, records) == []
    assert left_out(a_plan, CONFIRM, records) == left_out(a_plan, FINAL, records) == ["SGD on rosenbrock"]
    searched(a_plan, task, contender, records)
    again = confirmation_jobs(a_plan, records)
    assert {each.seed for each in again} == set(CONFIRMING_SEEDS[0])
    every = [planning.TUNING_SEED, CHANGE_SEED, *itertools.chain(*CONFIRMING_SEEDS)]
    assert len(set(every)) == len(every)
    assert min(every) >= SELECTING
    assert {(each.stage, each.contender, each.task, each.trial) for each in again} == {
        ("confirm", "SGD", "rosenbrock", None)
    }
    best = {
        aim: [each["job"] for each in sorted(records, key=lambda record: score_of(record, aim))[:count]]
        for aim, count in CONFIRMED.items()
    }
    expected = [(each["hyperparameters"], each["schedule"]) for each in [*best[TRAINING], *best[VALIDATION]]]
    assert all((each.hyperparameters, each.schedule) in expected for each in again)
    assert len(again) == 2 * len({str(each) for each in expected})
    assert (left_out(a_plan, CONFIRM, records), left_out(a_plan, FINAL, records)) == ([], ["SGD on rosenbrock"])
    assert final_jobs(a_plan, records) == []

    # There the second best trial is the best in training, and the fourth in validation.
    def made(each):
        losses = [
            1.0 if (each.hyperparameters, each.schedule) == (lucky["hyperparameters"], lucky["schedule"]) else 2.0
            for lucky in (best[TRAINING][1], best[VALIDATION][3])
        ]
        return fake(each, *losses)

    first = [made(each) for each in again]
    assert choice(a_plan, task, contender, [*records, *first]) is None
    once_more = [each for each in confirmation_jobs(a_plan, [*records, *first]) if each not in again]
    assert {each.seed for each in once_more} == set(CONFIRMING_SEEDS[1])
    assert len(once_more) == 2 * len({str(each.hyperparameters) + each.schedule for each in once_more}) <= 2 * 4
    assert choice(a_plan, task, contender, [*records, *first, *map(made, once_more[:-1])], VALIDATION) is None
    confirmed(a_plan, task, contender, records, made)
    chosen = {aim: choice(a_plan, task, contender, records, aim) for aim in (TRAINING, VALIDATION)}
    for aim, number in ((TRAINING, 1), (VALIDATION, 3)):
        wanted = best[aim][number]
        assert (chosen[aim].hyperparameters, chosen[aim].schedule) == (wanted["hyperparameters"], wanted["schedule"])
    assert left_out(a_plan, FINAL, records) == []
    finals = final_jobs(a_plan, records)
    assert [each.hyperparameters for each in finals] == [each.hyperparameters for each in chosen.values()]
    assert final_jobs(a_plan, records, (VALIDATION,)) == finals[1:]
    assert {(each.seed, each.stage) for each in finals} == {(0, "final")}


def test_one_setting_that_is_the_best_by_both_aims_runs_once(tmp_path):
    a_plan, task, contender, records = plan(tmp_path), get_task("rosenbrock"), get_contender("SGD"), []
    a_plan = replace(a_plan, contenders=["SGD"])
    while a_job := next_trial(a_plan, task, contender, records):
        records.append(fake(a_job, a_job.hyperparameters["lr"]))
    confirmed(a_plan, task, contender, records, lambda each: fake(each, each.hyperparameters["lr"]))
    assert len(final_jobs(a_plan, records)) == 1


def test_the_second_round_has_a_say_as_the_first_has(tmp_path):
    """Of the two best of the first round the better one over both wins."""
    a_plan, task, contender, records = plan(tmp_path), get_task("bowl"), get_contender("SGD"), []
    searched(a_plan, task, contender, records)
    order = [each["job"]["hyperparameters"] for each in sorted(records, key=score_of)]

    def made(each):
        place = order.index(each.hyperparameters)
        is_first = each.seed in CONFIRMING_SEEDS[0]
        return fake(
            each, {0: 1.0 if is_first else 4.0, 1: 1.5 if is_first else 2.0}.get(place, 1.6 if is_first else 1e-3)
        )

    confirmed(a_plan, task, contender, records, made)
    assert choice(a_plan, task, contender, records).hyperparameters == order[1]


def test_a_setting_that_diverges_at_one_of_the_further_seeds_is_not_chosen(tmp_path):
    a_plan, task, contender, records = plan(tmp_path), get_task("bowl"), get_contender("SGD"), []
    searched(a_plan, task, contender, records)
    best = min(records, key=lambda record: record["score"])["job"]["hyperparameters"]

    def made(each):
        gone = each.hyperparameters == best and each.seed == CONFIRMING_SEEDS[-1][-1]
        return fake(each, None) if gone else on_bowl(each)

    confirmed(a_plan, task, contender, records, made)
    assert choice(a_plan, task, contender, records).hyperparameters != best
    failed = [fake(each, None) for each in searched(a_plan, task, contender, [])]
    first = choice(a_plan, task, contender, [*failed])
    assert first.hyperparameters == failed[0]["job"]["hyperparameters"]  # all diverged: nothing to run again
    assert confirmation_jobs(replace(a_plan, tasks=["bowl"], contenders=["SGD"]), failed) == []


def test_a_relatives_one_setting_is_among_those_that_run_again(tmp_path, monkeypatch):
    monkeypatch.setitem(CONTENDERS, "two", two_candidates())
    monkeypatch.setitem(CONTENDERS, "SGD", replace(get_contender("SGD"), relative="two"))
    a_plan, task, contender, records = plan(tmp_path), get_task("rosenbrock"), get_contender("SGD"), []
    searched(a_plan, task, contender, records)
    without = shortlist(a_plan, task, contender, records, VALIDATION)
    records += [fake(each, each.hyperparameters["lr"]) for each in calibration_jobs(a_plan, get_contender("two"))]
    found = shortlist(a_plan, task, contender, records, VALIDATION)
    assert found == [*without, Chosen({"lr": 1.0}, "warmup")]
    confirmed(a_plan, task, contender, records, lambda each: fake(each, each.hyperparameters.get("momentum", 0.1)))
    assert choice(a_plan, task, contender, records, VALIDATION) == found[-1]
    assert {each.relative for each in CONTENDERS.values()} - {"", "two"} == {
        "NAdamW, calibrated",
        "Prodigy, calibrated",
        "schedule-free AdamW, calibrated",
    }


def test_a_search_needs_no_validation_where_there_is_none(tmp_path):
    a_plan, task, contender, records = plan(tmp_path, tasks=["bowl"]), get_task("bowl"), get_contender("SGD"), []
    settled(a_plan, task, contender, records)
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
        settled(a_plan, get_task("rosenbrock"), get_contender(name), records)
    found = robust_jobs(a_plan, records)
    assert {each.contender for each in found} == {REFERENCE, UNTUNED}
    right = {each.contender: each.hyperparameters["lr"] for each in final_jobs(a_plan, records, (TRAINING,))}
    ratios = {(each.contender, each.factor): each.hyperparameters["lr"] / right[each.contender] for each in found}
    wanted = itertools.product(("AdamW", "LODO"), FACTORS)
    assert ratios == {(name, factor): pytest.approx(factor) for name, factor in wanted}


def test_another_recommended_call_is_another_run_and_another_search(tmp_path):
    before = plan(tmp_path, contenders=["LODO", "LODO, tuned"])
    after = replace(before, recommended={**RECOMMENDED, "max_step_norm": 0.03})
    task, tuned, records = get_task("rosenbrock"), get_contender(TUNED), []
    settled(before, task, tuned, records)
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
    settled(a_plan, get_task("pinn"), get_contender("L-BFGS"), trials_)
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


def test_lodo_with_an_end_is_the_recommended_call_with_averages_or_a_cooldown(tmp_path):
    contenders = ["LODO", "LODO, averages", "LODO, cooldown"]
    a_plan = replace(plan(tmp_path), tasks=["rosenbrock"], contenders=contenders, seeds=1, steps=50)
    own, averages, cooled = final_jobs(a_plan, [])
    assert averages.hyperparameters == {**own.hyperparameters, "average_share": 0.1}
    assert cooled.hyperparameters == own.hyperparameters
    assert (own.schedule, averages.schedule, cooled.schedule) == ("constant", "constant", "cooldown")
    runs = [run(each, None) for each in (own, averages, cooled)]
    assert len({record["score"] for record in runs}) == 3
    assert len({record["validation"]["loss"][-1] for record in runs}) == 3


def test_the_cooldown_of_the_schedules_is_lodos():
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=1.0)
    scheduler = lodo.cooldown(optimizer, 40)
    for step in range(40):
        assert factor_at("cooldown", step, 40) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
