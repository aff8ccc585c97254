"""The comparison on many tasks: ranges and searches."""

import itertools
import json
import math
from dataclasses import replace
from functools import partial

import pytest

from benchmarks.shootout import plan as planning
from benchmarks.shootout import tuning
from benchmarks.shootout.choosing import choice
from benchmarks.shootout.contenders import CONTENDERS, get_contender
from benchmarks.shootout.plan import next_trial, trials
from benchmarks.shootout.spaces import Choice, Range, grid, momentum, rate, second_decay, weight_decay, widen
from benchmarks.shootout.tasks import get_task
from tests.helpers.shootout_jobs import confirmed, fake, on_bowl, plan, searched

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
    confirmed(a_plan, task, contender, records, lambda each: on_bowl(each, best))
    assert choice(a_plan, task, contender, records) is not None


def test_each_schedule_has_a_scan_of_its_own(tmp_path):
    """A constant rate may want another one by decades, as where the loss's minimum moves."""
    a_plan, task, contender, records = plan(tmp_path, trials=None), get_task("bowl"), get_contender("AdamW"), []

    def made(a_job):
        best = 1e3 if a_job.schedule == "warmup_cosine" else 0.5
        ends = 1.5 if a_job.schedule == "warmup_cosine" else 1.0
        return fake(a_job, ends + 0.1 * math.log(a_job.hyperparameters["lr"] / best) ** 2)

    while a_job := next_trial(a_plan, task, contender, records):
        records.append(made(a_job))
    confirmed(a_plan, task, contender, records, made)
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


def cheaper(share, a_job):
    """A record whose loss the option that costs much lowers to this share."""
    record = on_bowl(a_job)
    return record | {"score": record["score"] * (share if "precondition_frequency" in a_job.hyperparameters else 1.0)}


def test_weight_decay_is_scanned_on_top_of_what_validates_best(tmp_path):
    a_plan, task, records = plan(tmp_path, trials=None), get_task("digits_mlp"), []
    for name, high in (("AdamW", 1.0), ("SGD", 1e-2)):
        contender = get_contender(name)
        jobs = searched(a_plan, task, contender, records)
        own = trials(a_plan, task, contender, records)
        best = min(own[:-4], key=lambda record: record["validation"]["loss"][-1])["job"]
        assert [each.hyperparameters["weight_decay"] for each in jobs[-4:]] == pytest.approx(
            [high * 10 ** (-number / 2) for number in (3, 2, 1, 0)]
        )
        for each in jobs[-4:]:
            assert (each.hyperparameters | {"weight_decay": 0}, each.schedule) == (
                best["hyperparameters"] | {"weight_decay": 0},
                best["schedule"],
            )
        search = planning.search_of(a_plan, task, contender)
        for count in range(len(own) + 1):
            assert search.is_done(own[:count]) == (count == len(own))


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
    again = confirmed(a_plan, task, contender, records)
    assert {"precondition_frequency" in each.hyperparameters for each in again} == {False, True}
    chosen = choice(a_plan, task, contender, records)
    assert chosen.hyperparameters == best["hyperparameters"]  # as good, but dearer
    for share, is_taken in ((0.995, False), (0.98, True)):
        own = records[: len(jobs)]
        confirmed(a_plan, task, contender, own, partial(cheaper, share))
        chosen = choice(a_plan, task, contender, own)
        assert ("precondition_frequency" in chosen.hyperparameters) == is_taken
    assert len(trials(a_plan, task, contender, records)) == len(jobs)
    assert next_trial(a_plan, task, contender, records) is None
