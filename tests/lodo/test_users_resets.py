"""`reset`: what it takes back, what it keeps, and how fast a new target is followed."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import lodo
from tests.helpers.habits import follow, noisy
from tests.helpers.parts import state_of
from tests.helpers.states import assert_same


@pytest.fixture(scope="module")
def long_trained():
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(8, 8))
    optimizer = lodo.AutoLODO([w])
    for _ in follow(optimizer, w, noisy((8, 8), 10**6, torch.float32), 0, 3000):
        pass
    return w, optimizer


def steps_to_follow(w, optimizer):
    """Until a new target is half reached."""
    target = w.detach() + 2 * noisy((8, 8), 10**6 + 1, torch.float32)
    half = (w.detach() - target).norm() / 2
    for step in follow(optimizer, w, target, 3000, 6000):
        if (w.detach() - target).norm() < half:
            return step - 2999
    return 3000


def test_reset_takes_back_what_is_learned_and_keeps_what_is_known(long_trained):
    _, optimizer = copy.deepcopy(long_trained)
    before = state_of(optimizer)
    assert before["scale"].any()
    assert before["theta"].any()
    optimizer.reset()
    after = state_of(optimizer)
    assert after["reset_at"].item() == after["step"].item() == 3000
    for name in (
        "scale",
        "step_trace",
        "scale_peak",
        "trace_peak",
        "theta",
        "theta_exp_avg",
        "theta_exp_avg_sq",
        "meta_step",
    ):
        assert not after[name].any(), name
    for name in ("exp_avg_sq", "factors", "eigenbasis", "seen", "momenta", "momentum", "unit", "step", "skipped_steps"):
        assert torch.equal(after[name], before[name]), name
    torch.testing.assert_close(after["mixture"][0].softmax(0)[1].item(), 0.9)


def test_after_a_reset_a_new_target_is_followed_in_two_thirds_of_the_steps(long_trained):
    w, optimizer = copy.deepcopy(long_trained)
    without = steps_to_follow(w, optimizer)
    w, optimizer = copy.deepcopy(long_trained)
    optimizer.reset()
    assert steps_to_follow(w, optimizer) <= without * 2 / 3


def test_after_a_reset_the_rates_are_as_at_the_start(long_trained):
    """Scales move by their whole rate again, which 5 / t had bounded."""
    moved = []
    for is_reset in (False, True):
        w, optimizer = copy.deepcopy(long_trained)
        if is_reset:
            optimizer.reset(0)
        target = w.detach() + 10
        scales = [state_of(optimizer)["scale"][0].item() for _ in follow(optimizer, w, target, 3000, 3040, noise=0.0)]
        moved.append(max(abs(b - a) for a, b in pairwise(scales[20:])))
    assert moved[0] < 5 * 5 / 3000
    assert moved[1] > 0.01


@pytest.mark.parametrize("group", [1, -1, True, False, "0", 0.0])
def test_reset_refuses_groups_that_there_are_not(group, long_trained):
    _, optimizer = copy.deepcopy(long_trained)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"^group must be None or 0 to 0, got "):
        optimizer.reset(group)
    assert_same(optimizer.state_dict(), before)


def test_reset_of_one_group_leaves_the_others():
    params = [nn.Parameter(torch.zeros(4, 4)) for _ in range(2)]
    optimizer = lodo.AutoLODO([{"params": [p]} for p in params])
    optimizer.reset()  # before there is anything
    for step in range(30):
        for p in params:
            p.grad = noisy((4, 4), step, torch.float32)
        optimizer.step()
    before = copy.deepcopy(optimizer.state[params[0]])
    optimizer.reset(1)
    assert_same(dict(optimizer.state[params[0]]), before)
    assert state_of(optimizer, 1)["reset_at"].item() == 30
    assert not state_of(optimizer, 1)["scale"].any()


@pytest.mark.parametrize("base", ["soap", "adam"])
def test_a_run_that_was_reset_is_resumed_bit_for_bit(base, where):
    w, target = nn.Parameter(torch.zeros(5, 6)), noisy((5, 6), 1000, torch.float32)
    optimizer = lodo.AutoLODO([w], base=base)
    for _ in follow(optimizer, w, target, 0, 40):
        pass
    optimizer.reset()
    for after in (0, 7):
        for _ in follow(optimizer, w, target, 40, 40 + after):
            pass
        x = nn.Parameter(w.detach().clone())
        other = lodo.AutoLODO([x], base=base)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        y, kept = copy.deepcopy((w, optimizer))
        for _ in zip(follow(kept, y, target, 50, 80), follow(other, x, target, 50, 80), strict=True):
            assert torch.equal(x.detach(), y.detach())
        assert_same(other.state_dict(), kept.state_dict())
