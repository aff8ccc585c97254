"""The comparison's figures of merit, on synthetic records."""

import math

import pytest

from benchmarks.shootout.scores import (
    at_factors,
    best_levels,
    by_pair,
    geometric_mean,
    goal,
    loss_ratio,
    outcome,
    outcomes,
    profile,
    reached_at,
    slowdown,
    summarise,
)


def result(losses, task="a", contender="AdamW", seed=0, seconds=1.0, diverged=False, factor=1.0):
    """A record of a run of 100 steps whose curve has ten points, of `seconds` in all."""
    return {
        "job": {"task": task, "contender": contender, "seed": seed, "steps": 100, "factor": factor},
        "score": None if diverged else losses[-1],
        "curve": {
            "step": [10.0 * (number + 1) for number in range(10)],
            "seconds": [seconds * (number + 1) / 10 for number in range(10)],
            "loss": losses,
        },
        "seconds": seconds,
    }


def falling(end, at=10):
    """A curve that falls from 10 to `end` at point number `at`."""
    return [10.0] * (at - 1) + [end] * (11 - at)


def test_a_goal_is_reached_at_the_first_point_not_above_it():
    assert reached_at(result(falling(1.0, 4)), 1.0) == (40.0, 0.4)
    assert reached_at(result(falling(1.0, 4)), 0.9) is None
    assert reached_at(result(falling(1.0, 4), diverged=True), 1.0) is None
    rounded = result([10.0] * 9 + [1.00001]) | {"score": 1.0}
    assert reached_at(rounded, 1.0) == (100.0, 1.0)


def test_the_goal_is_a_median_that_the_reference_itself_reaches():
    losses = (3.0, 1.0, 2.0)
    runs = [result(falling(loss), seed=seed) for seed, loss in enumerate(losses)]
    assert goal(runs) == 2.0
    assert outcome(runs, runs).is_reached
    assert goal(runs[:2]) == 3.0
    assert outcome(runs[:2], runs[:2]).is_reached
    assert goal([]) is None
    assert goal([result(falling(1.0), diverged=True)]) is None
    assert outcome(runs, []) is None
    assert outcome([], runs) is None


def test_an_outcome_takes_medians_over_seeds():
    reference = [result(falling(2.0), seconds=4.0)]
    runs = [result(falling(2.0, at), contender="LODO", seconds=8.0) for at in (2, 5, 7)]
    found = outcome(runs, reference)
    assert (found.steps, found.seconds, found.cost, found.diverged) == (0.5, 1.0, 2.0, 0)
    worse = [*runs[:1], result(falling(3.0)), result(falling(1.0), diverged=True)]
    found = outcome(worse, reference)
    assert (found.steps, found.loss, found.diverged, found.runs) == (math.inf, 3.0, 1, 3)
    assert (found.lowest, found.highest) == (2.0, math.inf)
    assert not found.is_reached


def test_a_summary_shows_the_penalty_and_what_it_hides():
    reference = [result(falling(2.0), seconds=4.0)]
    fast = outcome([result(falling(2.0, 2), seconds=4.0)], reference)
    slow = outcome([result(falling(3.0), seconds=12.0)], reference)
    gone = outcome([result(falling(1.0), diverged=True)], reference)
    summary = summarise([fast, slow, gone])
    assert (summary.tasks, summary.reached) == (3, 1)
    assert summary.steps == pytest.approx((0.2 * 2 * 2) ** (1 / 3))
    assert summary.seconds == pytest.approx((0.2 * 6 * 2) ** (1 / 3))
    assert summary.steps_if_reached == summary.seconds_if_reached == pytest.approx(0.2)
    assert summary.diverged == pytest.approx(1 / 3)
    assert math.isnan(summarise([]).steps)
    assert math.isnan(geometric_mean([]))


def test_tasks_without_a_goal_are_left_out():
    runs = by_pair(
        [
            result(falling(2.0), "a"),
            result(falling(1.0, 5), "a", "LODO"),
            result(falling(2.0), "b", diverged=True),
            result(falling(1.0), "b", "LODO"),
            result(falling(2.0), "c"),
        ]
    )
    found = outcomes(runs, runs, "LODO", ("a", "b", "c"), "AdamW")
    assert list(found) == ["a"]
    assert profile(found.values(), "steps") == ([0.5], [1.0])


def test_a_goal_may_be_the_best_of_several():
    runs = by_pair(
        [
            result(falling(2.0), "a", seconds=2.0),
            result(falling(1.0), "a", "SGD"),
            result(falling(2.0), "b", seconds=2.0),
            result(falling(1.0), "b", "SGD", diverged=True),
            *(result(falling(1.5, 5), task, "LODO", seconds=4.0) for task in "ab"),
        ]
    )
    levels = best_levels(runs, "abc", ["AdamW", "SGD"])
    assert levels == {"a": 1.0, "b": 2.0}
    found = outcomes(runs, runs, "LODO", "abc", "AdamW", levels)
    assert (found["a"].is_reached, found["b"].is_reached) == (False, True)
    assert (found["b"].steps, found["b"].seconds) == (0.5, 1.0)  # of AdamW's run, whoever sets the goal


def test_ratios_of_losses_are_of_what_both_finished():
    first = by_pair([result(falling(2.0), task) for task in "abc"])
    second = by_pair([result(falling(1.0), "a"), result(falling(4.0), "b"), result(falling(1.0), "c", diverged=True)])
    plain, changed = (outcomes(runs, first, "AdamW", "abc", "AdamW") for runs in (first, second))
    assert loss_ratio(changed, plain) == pytest.approx(1.0)
    assert math.isnan(loss_ratio({}, plain))


def test_profiles_are_of_all_tasks_that_the_contender_ran_on():
    lost, half, whole = (result(falling(loss, at), "a", "LODO") for loss, at in ((3.0, 10), (1.0, 5), (2.0, 10)))
    reference = by_pair([result(falling(2.0), "a")])[("a", "AdamW")]
    found = [outcome([run], reference) for run in (whole, lost, half)]
    assert profile(found, "steps") == ([0.5, 1.0], [1 / 3, 2 / 3])
    assert profile([], "steps") == ([], [])


def test_wrong_learning_rates_are_compared_at_the_same_seeds():
    finals = [result(falling(loss), seed=seed) for seed, loss in enumerate((1.0, 5.0, 9.0))]
    robust = [result(falling(4.0), factor=factor) for factor in (0.1, 10.0)]
    factors = at_factors(robust, finals)
    assert list(factors) == [0.1, 1.0, 10.0]
    assert goal(factors[1.0]["a", "AdamW"]) == 1.0


def test_a_slowdown_is_the_median_of_the_tasks_that_both_have():
    def found(**steps):
        reference = [result(falling(1.0))]
        return {
            task: outcome([result(falling(1.0, at) if at else falling(2.0))], reference) for task, at in steps.items()
        }

    right = found(a=4, b=5, c=8, d=None)
    assert slowdown(found(a=6, b=5, c=None), right) == pytest.approx(1.5)  # of 1.5, 1 and 20 / 8
    assert slowdown(found(c=None, d=None), right) == pytest.approx(1.75)  # of 20 / 8 and 20 / 20
    assert slowdown(found(d=10, e=1), right) == pytest.approx(0.5)
    assert math.isnan(slowdown(found(e=1), right))
