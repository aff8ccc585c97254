"""Averages of the iterates: against explicit weighted means, and what training knows of them: nothing."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import lodo
from lodo import scalars
from lodo.parts.average import _weights
from tests.helpers.averages import CALLS, SHARE, assert_at_means, copies, every_call, made, mean, one_step, walk
from tests.helpers.states import assert_same, through_file

# ---- what they are -------------------------------------------------------------------------------------------------


@every_call
@pytest.mark.parametrize("native", ["0", "1"])
def test_they_are_weighted_means_of_all_iterates_and_training_is_as_without(call, native, monkeypatch):
    monkeypatch.setenv("LODO_NATIVE", native)
    params, optimizer = made(call)
    twins, other = made(call, average_share=None)
    iterates = [copies(params)]
    for number in range(25):
        one_step(params, optimizer, number)
        one_step(twins, other, number)
        iterates.append(copies(params))
        assert_same(params, twins)
        assert_at_means(params, optimizer, iterates)
        assert_same(params, twins)
    own = {"average", "averaged"}
    for p, twin in zip(params, twins, strict=True):
        assert_same({name: x for name, x in optimizer.state[p].items() if name not in own}, other.state[twin])


@pytest.mark.parametrize("call", [CALLS["auto"], CALLS["the paper's"]], ids=["auto", "the paper's"])
def test_each_parameter_averages_over_its_own_steps(call):
    """With the paper's networks a parameter without a gradient takes part, once it has had one."""
    params, optimizer = made(call)
    missing = [((2,) if number < 5 else (0, 1) if number % 3 == 0 else ()) for number in range(12)]
    iterates = [[p.detach().clone()] for p in params]
    for number, places in enumerate(missing):
        one_step(params, optimizer, number, places)
        for place, p in enumerate(params):
            had_some = place != 2 or number >= 5
            if place not in places or ("preconditioner" not in call and had_some):
                iterates[place].append(p.detach().clone())
    with optimizer.averaged():
        for p, own in zip(params, iterates, strict=True):
            torch.testing.assert_close(p.double(), mean(own), rtol=1e-6, atol=1e-6)


def test_scalars_that_nobody_reads_give_the_same(monkeypatch):
    monkeypatch.setenv("LODO_NATIVE", "0")
    found = []
    for is_device in (False, True):
        if is_device:
            monkeypatch.setattr(scalars, "is_readable", lambda tensor: False)
        params, optimizer = made(lodo.RECOMMENDED | {"base": "adam"}, torch.float64)
        for number in range(12):
            one_step(params, optimizer, number, (1,) if number < 3 else ())
        with optimizer.averaged():
            found.append(copies(params))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_what_users_make_of_a_step_is_in_them():
    params, optimizer = made(lodo.RECOMMENDED)
    iterates = [copies(params)]
    for number in range(20):
        one_step(params, optimizer, number)
        with torch.no_grad():
            for p in params:
                p.clamp_(min=0.5)
        iterates.append(copies(params))
    assert_at_means(params, optimizer, iterates)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_averaged_in_full_precision_and_rounded_once(dtype):
    params, optimizer = made(lodo.RECOMMENDED, dtype)
    iterates = walk(params, optimizer, 15)
    kept = copies(params)
    for _ in range(3):  # nothing is lost by looking
        with optimizer.averaged():
            for place, p in enumerate(params):
                expected = mean([x[place] for x in iterates])
                ulp = torch.finfo(dtype).eps * expected.abs().clamp(min=1e-3)
                assert bool(((p.double() - expected).abs() <= 0.6 * ulp + 1e-7).all())
        assert_same(params, kept)


@pytest.mark.parametrize("share", [1, 0.5, 0.1, 1e-3])
def test_long_trainings_take_in_fewer_iterates_with_the_same_weights(share):
    """The mean of the numbers 1 to t is that of the full average to a part of the share, with no fewer than some
    hundreds of them."""
    t, average, full, taken = torch.zeros(1, dtype=torch.int64), 0.0, 0.0, []
    for number in range(1, 30_001):
        t += 1
        weight = float(_weights(t, share))
        average += weight * (number - average)
        full += (number - full) / (1 + share * (number - 1))
        if weight > 0:
            taken.append(number)
        if number % 7_500 == 0:
            assert average == pytest.approx(full, abs=0.02 * share * number + 1)
            assert sum(each > (1 - share) * number for each in taken) >= min(share * number, 256)
    assert len(taken) < 30_000 or share * 30_000 < 1_024


def test_an_average_of_many_noisy_iterates_is_not_lost_in_rounding():
    """With a weight of 1e-5 a step of float32 would stand still this near."""
    generator = np.random.default_rng(0)
    average, t = torch.full((64,), 1000.0), torch.tensor([1_000_000])
    target = torch.full((64,), 1000.5)
    for _ in range(200_000 // 64):
        t += 64  # 64 steps at once: as many as are left out
        weight = float(_weights(t, 0.1))
        if weight > 0:
            average.lerp_(target + torch.from_numpy(generator.normal(0, 0.01, 64)).float(), weight)
    assert bool(((average - target).abs() < 0.2).all())


# ---- showing them --------------------------------------------------------------------------------------------------


def test_steps_wait_until_the_parameters_are_back():
    params, optimizer = made(lodo.RECOMMENDED)
    one_step(params, optimizer, 0)
    one_step(params, optimizer, 1)
    kept = copies(params)
    optimizer.eval()
    optimizer.eval()
    shown, state = copies(params), copy.deepcopy(optimizer.state_dict())
    assert not torch.equal(shown[0], kept[0])
    with pytest.raises(RuntimeError, match=r"at their averages.*LODO\.train"):
        optimizer.step(lambda: pytest.fail("the model was evaluated"))
    assert_same(params, shown)
    assert_same(optimizer.state_dict(), state)
    with optimizer.averaged():  # inside it is as it was, and so it is afterwards
        assert_same(params, shown)
    assert_same(params, shown)
    optimizer.train()
    assert_same(params, kept)
    optimizer.train()
    assert_same(params, kept)
    one_step(params, optimizer, 2)


def test_before_there_are_any_nothing_happens():
    params, optimizer = made(lodo.RECOMMENDED)
    kept = copies(params)
    with optimizer.averaged():
        assert_same(params, kept)
    one_step(params, optimizer, 0)
    others, without = made(lodo.RECOMMENDED, average_share=None)
    one_step(others, without, 0)
    kept, state = copies(others), copy.deepcopy(without.state_dict())
    without.eval()
    assert_same(others, kept)
    without.train()
    assert_same((others, without.state_dict()), (kept, state))
    with pytest.raises(ValueError, match="average_share must be a number in some param group"):
        without.averaged()
    with pytest.raises(ValueError, match="model must be given for batches, got None"):
        optimizer.averaged(batches=[torch.ones(1)])


def test_parameters_come_back_after_an_error():
    params, optimizer = made(lodo.RECOMMENDED)
    walk(params, optimizer, 3)
    kept = copies(params)
    with pytest.raises(KeyError), optimizer.averaged():
        raise KeyError
    assert_same(params, kept)


def test_frozen_parameters_and_groups_without_averages_stay_as_they_are():
    mask = nn.Parameter(torch.tensor([0.0, -math.inf]), requires_grad=False)
    params, others = [nn.Parameter(torch.randn(3)), mask], [nn.Parameter(torch.randn(2))]
    optimizer = lodo.AutoLODO([{"params": params, "average_share": 0.1}, {"params": others}])
    for number in range(5):
        one_step([params[0], *others], optimizer, number)
    kept = copies([*params, *others])
    with optimizer.averaged():
        assert not torch.equal(params[0], kept[0])
        assert_same([mask, *others], kept[1:])
    assert_same([*params, *others], kept)


def test_a_group_may_come_to_ask_for_them_and_cease_to():
    params, optimizer = made(lodo.RECOMMENDED, average_share=None)
    walk(params, optimizer, 10)
    for _ in range(2):  # of old iterates nothing is left the second time
        optimizer.param_groups[0]["average_share"] = SHARE
        assert_at_means(params, optimizer, walk(params, optimizer, 6))
        optimizer.param_groups[0]["average_share"] = None
        kept = copies(params)
        optimizer.eval()
        assert_same(params, kept)
        one_step(params, optimizer, 9)


@pytest.mark.parametrize("call", [CALLS["auto"], CALLS["the paper's"]], ids=["auto", "the paper's"])
def test_reset_begins_them_anew(call):
    params, optimizer = made(call)
    walk(params, optimizer, 10)
    optimizer.reset()
    assert_at_means(params, optimizer, walk(params, optimizer, 6))


# ---- saved and resumed ---------------------------------------------------------------------------------------------


@every_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_at_the_averages_goes_on_from_the_iterates(call, dtype):
    params, optimizer = made(call, dtype)
    walk(params, optimizer, 6)
    optimizer.eval()
    saved = through_file({"model": copies(params), "optimizer": optimizer.state_dict()})
    optimizer.train()
    twins, other = made(call, dtype)
    with torch.no_grad():
        for twin, value in zip(twins, saved["model"], strict=True):
            twin.copy_(value)
    other.load_state_dict(saved["optimizer"])
    with pytest.raises(RuntimeError, match="at their averages"):
        one_step(twins, other, 6)
    other.train()
    assert_same(twins, params)
    for number in range(6, 12):
        one_step(params, optimizer, number)
        one_step(twins, other, number)
    assert_same(twins, params)
    assert_same(other.state_dict(), optimizer.state_dict())


def test_a_loaded_state_says_whether_averages_are_shown():
    params, optimizer = made(lodo.RECOMMENDED)
    walk(params, optimizer, 4)
    saved, kept = copy.deepcopy(optimizer.state_dict()), copies(params)
    optimizer.eval()
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip(params, kept, strict=True):
            p.copy_(value)
    optimizer.train()
    assert_same(params, kept)
    one_step(params, optimizer, 4)
