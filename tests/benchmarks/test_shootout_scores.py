"""The comparison's figures of merit, on synthetic records."""

import math

import numpy as np
import pytest

from benchmarks.shootout.bootstrap import intervals, resampled
from benchmarks.shootout.problem import TRAINING, VALIDATION
from benchmarks.shootout.scores import (
    at_factors,
    best_goal,
    by_pair,
    geometric_mean,
    goal,
    goal_of,
    loss_ratio,
    outcome,
    outcomes,
    profile,
    profile_score,
    ratios,
    slowdown,
    summarise,
    track,
    tracks,
)


def result(losses, task="a", contender="AdamW", seed=0, seconds=1.0, diverged=False, factor=1.0, held_out=None):
    """A record of a run of 100 steps whose curves have ten points, of `seconds` in all."""
    at = {
        "step": [10.0 * (number + 1) for number in range(10)],
        "seconds": [seconds * (number + 1) / 10 for number in range(10)],
    }
    return {
        "job": {"task": task, "contender": contender, "seed": seed, "steps": 100, "factor": factor},
        "score": None if diverged else losses[-1],
        "curve": {**at, "loss": losses},
        "validation": held_out and {**at, "loss": held_out, "accuracy": [0.5] * 9 + [0.75]},
        "seconds": seconds,
    }


def falling(end, at=10):
    """A curve that falls from 10 to `end` at point number `at`."""
    return [10.0] * (at - 1) + [end] * (11 - at)


def of(*runs):
    return [track(run) for run in runs]


def test_a_goal_is_reached_at_the_first_point_not_above_it():
    assert track(result(falling(1.0, 4))).reached_at(1.0) == (0.4, 0.4)
    assert track(result(falling(1.0, 4))).reached_at(5.0) == (0.4, 0.4)
    assert track(result(falling(1.0, 4))).reached_at(0.9) == (math.inf, math.inf)
    assert track(result(falling(1.0, 4), diverged=True)).reached_at(1.0) == (math.inf, math.inf)
    rounded = result([10.0] * 9 + [1.00001]) | {"score": 1.0}
    assert track(rounded).reached_at(1.0) == (1.0, 1.0)
    back = [10.0, 1.0, *[5.0] * 8]
    assert track(result(back)).reached_at(2.0) == (0.2, 0.2)
    assert track(result(back)).final == 5.0


def test_validation_counts_by_its_own_curve():
    run = result(falling(1.0, 4), held_out=[9.0, 3.0, None, 4.0, 4.0, 2.0, 2.5, 2.5, 2.5, 3.5])
    found = track(run, VALIDATION)
    assert (found.final, found.accuracy) == (3.5, 0.75)
    assert found.reached_at(3.0) == (0.2, 0.2)
    assert found.reached_at(2.0) == (0.6, 0.6)
    assert found.reached_at(1.0) == (math.inf, math.inf)
    blown = track(result(falling(1.0), held_out=[1.0] * 9 + [None]), VALIDATION)
    assert blown.final == math.inf
    early = result(falling(1.0), "pinn", diverged=True)  # before its first validation
    runs = by_pair([run, result(falling(1.0), "b"), early, result(falling(1.0), "bowl", diverged=True)])
    assert list(tracks(runs, VALIDATION)) == [("a", "AdamW"), ("pinn", "AdamW")]
    assert tracks(runs, VALIDATION)["pinn", "AdamW"][0].final == math.inf
    assert outcome(tracks(runs, VALIDATION)["pinn", "AdamW"], 1.0, []).diverged == 1
    del runs["pinn", "AdamW"], runs["bowl", "AdamW"]
    assert list(tracks(runs, TRAINING)) == [("a", "AdamW"), ("b", "AdamW")]


def test_the_goal_is_a_median_that_the_contender_itself_reaches():
    losses = (3.0, 1.0, 2.0)
    runs = of(*(result(falling(loss), seed=seed) for seed, loss in enumerate(losses)))
    assert goal(runs) == 2.0
    assert outcome(runs, goal(runs), runs).is_reached
    assert goal(runs[:2]) == 3.0
    assert outcome(runs[:2], goal(runs[:2]), runs).is_reached
    assert goal([]) is None
    assert goal(of(result(falling(1.0), diverged=True))) is None
    assert outcome(runs, None, runs) is None
    assert outcome([], 1.0, runs) is None


def test_an_outcome_takes_medians_over_seeds():
    clock = of(result(falling(9.0), seconds=4.0))
    runs = of(*(result(falling(2.0, at), contender="LODO", seconds=8.0) for at in (2, 5, 7)))
    found = outcome(runs, 2.0, clock)
    assert (found.steps, found.seconds, found.cost, found.diverged) == (0.5, 1.0, 2.0, 0)
    worse = [*runs[:1], *of(result(falling(3.0)), result(falling(1.0), diverged=True))]
    found = outcome(worse, 2.0, clock)
    assert (found.steps, found.loss, found.diverged, found.runs) == (math.inf, 3.0, 1, 3)
    assert not found.is_reached
    assert not found.ends_below
    lost = outcome(of(result([10.0, 1.0, *[5.0] * 8])), 2.0, clock)
    assert (lost.is_reached, lost.ends_below) == (True, False)


def test_a_summary_shows_the_penalty_and_what_it_hides():
    clock = of(result(falling(2.0), seconds=4.0))
    fast = outcome(of(result(falling(2.0, 2), seconds=4.0)), 2.0, clock)
    slow = outcome(of(result(falling(3.0), seconds=12.0)), 2.0, clock)
    gone = outcome(of(result(falling(1.0), diverged=True)), 2.0, clock)
    summary = summarise([fast, slow, gone])
    assert (summary.tasks, summary.reached, summary.ends_below) == (3, 1, 1)
    assert summary.steps == pytest.approx((0.2 * 2 * 2) ** (1 / 3))
    assert summary.seconds == pytest.approx((0.2 * 6 * 2) ** (1 / 3))
    assert math.isnan(summarise([outcome(of(result(falling(2.0, 2))), 2.0, [])]).seconds)  # no clock, no time
    assert summary.diverged == pytest.approx(1 / 3)
    assert math.isnan(summarise([]).steps)
    assert math.isnan(geometric_mean([]))


def test_tasks_without_a_goal_are_left_out():
    found = tracks(
        by_pair(
            [
                result(falling(2.0), "a"),
                result(falling(1.0, 5), "a", "LODO"),
                result(falling(2.0), "b", diverged=True),
                result(falling(1.0), "b", "LODO"),
                result(falling(2.0), "c"),
            ]
        )
    )
    assert list(outcomes(found, "LODO", ("a", "b", "c"), goal_of("AdamW"), "AdamW")) == ["a"]


def test_a_goal_may_be_the_best_of_several():
    found = tracks(
        by_pair(
            [
                result(falling(2.0), "a", seconds=2.0),
                result(falling(1.0), "a", "SGD"),
                result(falling(2.0), "b", seconds=2.0),
                result(falling(1.0), "b", "SGD", diverged=True),
                *(result(falling(1.5, 5), task, "LODO", seconds=4.0) for task in "ab"),
            ]
        )
    )
    goals = best_goal(["AdamW", "SGD"])
    assert [goals(found, task) for task in "abc"] == [1.0, 2.0, None]
    own = outcomes(found, "LODO", "abc", goals, "AdamW")
    assert (own["a"].is_reached, own["b"].is_reached) == (False, True)
    assert (own["b"].steps, own["b"].seconds) == (0.5, 1.0)  # of AdamW's run, whoever sets the goal


def test_ratios_of_losses_are_of_what_both_finished():
    first = tracks(by_pair([result(falling(2.0), task) for task in "abc"]))
    second = by_pair([result(falling(1.0), "a"), result(falling(4.0), "b"), result(falling(1.0), "c", diverged=True)])
    level = goal_of("AdamW")
    plain = outcomes(first, "AdamW", "abc", level, "AdamW")
    changed = outcomes(tracks(second), "AdamW", "abc", lambda _, task: level(first, task), "AdamW")
    assert loss_ratio(changed, plain) == pytest.approx(1.0)
    assert math.isnan(loss_ratio({}, plain))


def test_profiles_are_relative_to_the_fastest_on_each_task():
    reach = {"fast": {"a": 2, "b": 5, "c": None}, "slow": {"a": 4, "b": 5}, "never": {"a": None, "b": None, "c": None}}
    clock = of(result(falling(1.0), seconds=10.0))
    every = {
        name: {
            task: outcome(of(result(falling(1.0, at) if at else falling(2.0), seconds=20.0)), 1.0, clock)
            for task, at in own.items()
        }
        for name, own in reach.items()
    }
    found = ratios(every, "steps")
    assert found == {"fast": [1.0, 1.0, math.inf], "slow": [2.0, 1.0], "never": [math.inf] * 3}
    assert ratios(every, "seconds") == found
    assert profile_score(found["fast"]) == pytest.approx(2 / 3)
    assert profile_score(found["slow"]) == pytest.approx((2 / 3 + 1) / 2)
    assert profile_score(found["never"]) == 0
    assert math.isnan(profile_score([]))
    assert profile(found["slow"]) == ([1.0, 2.0], [0.5, 1.0])
    assert profile(found["fast"]) == ([1.0, 1.0], [1 / 3, 2 / 3])
    assert profile([]) == ([], [])
    at, share = (np.array(part) for part in profile(found["slow"]))
    taus = np.linspace(1, 4, 3001)
    height = np.array([share[at <= tau].max(initial=0.0) for tau in taus])
    assert profile_score(found["slow"]) == pytest.approx(np.trapezoid(height, taus) / 3, abs=1e-3)


def test_a_bootstrap_draws_tasks_and_seeds():
    rows = [result(falling(float(seed)), task, seed=seed) for task in "ab" for seed in range(3)]
    rows.append(result(falling(7.0), "a", "LODO"))
    found = tracks(by_pair(rows))
    random = np.random.default_rng(0)
    draws = [resampled(found, ["a", "b"], random) for _ in range(200)]
    assert all(names == ["0", "1"] for _, names in draws)
    assert all(len(drawn["0", "AdamW"]) == 3 for drawn, _ in draws)
    assert {("0", "LODO") in drawn for drawn, _ in draws} == {True, False}  # task a, or b
    assert {tuple(run.final for run in drawn["1", "AdamW"]) for drawn, _ in draws} == {
        (float(i), float(j), float(k)) for i in range(3) for j in range(3) for k in range(3)
    }


def test_intervals_are_those_of_a_mean():
    """Of 40 tasks with one run each: the mean's standard error is known."""
    random = np.random.default_rng(1)
    finals = random.normal(10.0, 2.0, 40)
    names = [str(number) for number in range(40)]
    found = tracks(by_pair([result(falling(loss), task) for task, loss in zip(names, finals, strict=True)]))

    def statistic(some, tasks):
        return {"mean": float(np.mean([some[task, "AdamW"][0].final for task in tasks])), "nothing": math.nan}

    ends = intervals(found, names, statistic, draws=2000)
    assert list(ends) == ["mean"]
    error = finals.std() / math.sqrt(40)
    assert ends["mean"] == pytest.approx(
        (finals.mean() - 1.645 * error, finals.mean() + 1.645 * error), abs=0.1 * error
    )
    assert intervals(found, names, statistic, draws=50) == intervals(found, names, statistic, draws=50)
    assert intervals(found, [], statistic) == {}


def test_wrong_learning_rates_are_compared_at_the_same_seeds():
    finals = [result(falling(loss), seed=seed) for seed, loss in enumerate((1.0, 5.0, 9.0))]
    robust = [result(falling(4.0), factor=factor) for factor in (0.1, 10.0)]
    factors = at_factors(robust, finals)
    assert list(factors) == [0.1, 1.0, 10.0]
    assert goal(of(*factors[1.0]["a", "AdamW"])) == 1.0


def test_a_slowdown_is_the_median_of_the_tasks_that_both_have():
    def found(**steps):
        return {
            task: outcome(of(result(falling(1.0, at) if at else falling(2.0))), 1.0, of(result(falling(1.0))))
            for task, at in steps.items()
        }

    right = found(a=4, b=5, c=8, d=None)
    assert slowdown(found(a=6, b=5, c=None), right) == pytest.approx(1.5)  # of 1.5, 1 and 20 / 8
    assert slowdown(found(c=None, d=None), right) == pytest.approx(1.75)  # of 20 / 8 and 20 / 20
    assert slowdown(found(d=10, e=1), right) == pytest.approx(0.5)
    assert math.isnan(slowdown(found(e=1), right))
