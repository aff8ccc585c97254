"""Losses without noise: where they end, and the two rules that they need, against plain forms of their own.

What a long momentum holds of gradients that have long become small, and what a trace of the steps praises or blames for
what lies behind, would carry parameters across their minima and keep them there.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import lodo
from benchmarks.noise_free import PROBLEMS, losses_of
from lodo import inner_optimizer
from lodo.parts import mixture, tensor_scale
from tests.helpers.habits import noisy
from tests.helpers.parts import flat, state_of

# ---- where losses end ----------------------------------------------------------------------------------------------


GOALS = {  # after so many steps: a hundred times what they come to, or more
    "mean square of 16 numbers": (500, 1e-9),
    "mean square of 1,024 numbers": (500, 1e-9),
    "quadratic, 16 numbers, condition 100": (500, 1e-9),
    "quadratic, 128 numbers, condition 10,000": (1000, 1e-5),
    "sparse quadratic, 52 of 512 numbers": (500, 1e-9),
    "sum of fourth powers of 16 numbers": (500, 0.1),
    "sum of absolute values of 8 numbers": (1000, 1e-4),
    "Rosenbrock's function of 2 numbers": (500, 0.1),
    "linear regression, 160 inputs in 12 directions": (500, 1e-5),
    "linear regression, 20 inputs": (1000, 1e-4),
    "factorisation of rank 4": (500, 1e-8),
    "network of two layers": (1000, 1e-6),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("title", GOALS)
def test_where_there_is_no_noise_losses_go_to_zero(title, seed):
    steps, goal = GOALS[title]
    losses = losses_of(PROBLEMS[title], lambda params: lodo.AutoLODO(params), "constant", seed, steps)
    assert max(losses[-20:]) < goal  # and stay there


# ---- momenta that outlive their gradients ----------------------------------------------------------------------------

DECAYS = (0.0, 0.9, 0.99, 0.999)


def momenta_of(gradients, base):
    """Those that an optimizer keeps of some gradients of two parameters, and those by their definition."""
    params = [nn.Parameter(torch.zeros_like(g)) for g in gradients[0]]
    options = {"momentum_decays": DECAYS, "base": base, "meta_lr": 0.0}
    optimizer = lodo.LODO(params, lr=1e-3, preconditioner="identity", **options)
    kept = [[torch.zeros_like(g) for _ in DECAYS] for g in gradients[0]]
    recent, coasted = [None, None], [0, 0]
    for step, pair in enumerate(gradients):
        for place, (p, g) in enumerate(zip(params, pair, strict=True)):
            p.grad = g.clone()
            energy = g.square().sum()
            before = recent[place]
            recent[place] = energy if before is None else mixture.RECENT * before + (1 - mixture.RECENT) * energy
            for m, decay in zip(kept[place], DECAYS, strict=True):
                start = 1 - decay ** max(step, 1)
                is_stale = decay > mixture.COAST and m.norm() > mixture.LONG * start * recent[place].sqrt()
                m.mul_(decay).add_(g, alpha=1 - decay).mul_(mixture.COAST / decay if is_stale else 1.0)
                coasted[place] += bool(is_stale)
        optimizer.step()
    expected = torch.cat([torch.stack(own).reshape(len(DECAYS), -1) for own in kept], dim=1)
    return state_of(optimizer)["momenta"], expected, coasted


@pytest.mark.parametrize("base", [None, "adam"])
def test_what_momenta_hold_of_longer_gradients_is_forgotten(base, where):
    """Of a parameter whose gradients shrink, and of its neighbour whose gradients are noise nothing."""
    gradients = [(0.9**step * noisy((3, 4), 1), noisy((5, 6), step)) for step in range(200)]
    found, expected, coasted = momenta_of(gradients, base)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert coasted[0] > 20
    assert coasted[1] <= 4  # in the first steps: two equal gradients are no noise yet


def test_a_momentum_of_equal_gradients_leaves_averaging_to_a_shorter_one(where):
    """Whatever the roundings: it is as long as they are, and is forgotten on every path alike."""
    found, expected, coasted = momenta_of([(noisy((3, 4), 1), noisy((5,), 2))] * 30, None)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert min(coasted) > 0
    assert found[3].norm() < 0.95 * (1 - DECAYS[3] ** 30) * found[1].norm()


# ---- what the last steps tell of a scale -----------------------------------------------------------------------------


def steps_of(base, gradient_of, count, **options):
    """Steps with scales on gradients that are made of where the parameters are; for each what it did, its gradient, and
    the state after it."""
    params = [nn.Parameter(noisy(shape, place)) for place, shape in enumerate(((4, 6), (5,), ()))]
    optimizer = lodo.LODO(params, lr=0.02, preconditioner="identity", base=base, scale_lr=0.03, **options)
    found, last = [], [torch.zeros_like(p) for p in params]
    for step in range(count):
        before, given = [p.detach().clone() for p in params], []
        for place, p in enumerate(params):
            p.grad = gradient_of(p.detach(), last[place], step)
            given.append(p.grad.clone())
        optimizer.step()
        last = [old - p.detach() for old, p in zip(before, params, strict=True)]
        found.append((last, given, state_of(optimizer)))
    return found


@pytest.mark.parametrize("base", [None, "adam", "soap"])
def test_progress_is_the_mean_cosine_of_gradients_with_the_steps_before_them(base, where):
    """In the coordinates of the parameters, by what the steps did to them."""
    taken = steps_of(base, lambda x, last, step: x + 0.5 * noisy(x.shape, step), 30, momentum_decays=(0.0, 0.9))
    p = torch.zeros(3, dtype=torch.float64)
    for (steps, _, _), (_, gradients, entry) in pairwise(taken):
        cosines = [torch.cosine_similarity(g.flatten(), d.flatten(), 0) for g, d in zip(gradients, steps, strict=True)]
        p = tensor_scale.AGE * p + (1 - tensor_scale.AGE) * torch.stack(cosines)
        torch.testing.assert_close(entry["progress"], p, rtol=1e-7, atol=1e-7)
    assert p.abs().min() > 0.01


@pytest.mark.parametrize("base", [None, "adam", "soap"])
def test_a_scale_is_not_lowered_while_all_steps_go_down(base, where):
    """However much the trace blames it for what lies behind: here for one gradient in ten against all steps so far."""

    def gradient_of(x, last, step):
        return (-1e3 if step == 30 else 1.0) * torch.ones_like(x)

    taken = steps_of(base, gradient_of, 60)
    s = torch.stack([entry["scale"][0] for _, _, entry in taken])
    p = torch.stack([entry["progress"] for _, _, entry in taken])
    falls, is_sure = s[1:] < s[:-1], p[:-1] >= tensor_scale.SURE
    assert falls.any()
    # What the last step before tells counts, and this one may brake.
    assert not falls[is_sure & (p[1:] > -tensor_scale.CLEAR_FALL)].any()


@pytest.mark.parametrize("base", [None, "adam", "soap"])
def test_steps_that_all_go_too_far_lower_a_scale_at_once(base, where, monkeypatch):
    """By the excess of their mean cosine; what the trace tells is held here."""
    monkeypatch.setattr(inner_optimizer, "RATE_CAP", 0.0)
    taken = steps_of(base, lambda x, last, step: -last / last.norm() if step else x, 40, beta=0.0)
    rate = tensor_scale.BRAKE * 0.03
    for (_, _, former), (_, _, entry) in pairwise(taken[10:]):
        excess = (-tensor_scale.CLEAR_FALL - entry["progress"]) / (1 - tensor_scale.CLEAR_FALL)
        assert (excess > 0).all()
        fall = former["scale"][0] - entry["scale"][0]
        torch.testing.assert_close(fall, rate * excess, rtol=1e-9, atol=1e-12)
    assert taken[-1][2]["scale"][0].max() < -1


@pytest.mark.parametrize("base", [None, "adam", "soap"])
def test_progress_counts_weight_decay_as_the_trace_does(base, where):
    """By the gradient with the decay, in the size of the gradients, and by what was subtracted in all."""
    params = [nn.Parameter(noisy(shape, place)) for place, shape in enumerate(((4, 6), (5,)))]
    optimizer = lodo.LODO(params, lr=0.02, preconditioner="identity", base=base, scale_lr=0.03, weight_decay=0.5)
    p, last, far = torch.zeros(2, dtype=torch.float64), None, 0.0
    for step in range(30):
        before = [x.detach().clone() for x in params]
        for x in params:
            x.grad = x.detach() + 0.5 * noisy(x.shape, step) - 2
        if last is not None:
            sizes = [torch.ones((), dtype=torch.float64)] * 2
            if base is not None:
                v, scale = state_of(optimizer)["exp_avg_sq"].split([24, 5]), 1 - 0.999**step
                sizes = [(own.mean() / scale).sqrt() * optimizer.state[params[0]]["unit"] for own in v]
            judged = [x.grad + 0.5 * size * x.detach() for x, size in zip(params, sizes, strict=True)]
            cosines = [torch.cosine_similarity(*map(torch.flatten, pair), 0) for pair in zip(judged, last, strict=True)]
            bare = [
                torch.cosine_similarity(x.grad.flatten(), d.flatten(), 0) for x, d in zip(params, last, strict=True)
            ]
            far = max(far, *(abs(float(one - other)) for one, other in zip(cosines, bare, strict=True)))
            p = tensor_scale.AGE * p + (1 - tensor_scale.AGE) * torch.stack(cosines)
        optimizer.step()
        last = [old - x.detach() for old, x in zip(before, params, strict=True)]
        torch.testing.assert_close(state_of(optimizer)["progress"], p, rtol=1e-7, atol=1e-7)
    assert far > 0.05


@pytest.mark.parametrize("size", [1e-25, 1e-10, 1.0, 1e4])
def test_gradients_of_any_size_tell_the_same_or_nothing(size, kernel):
    """Whose products with steps may be no numbers of float32."""
    found = []
    for own in (1.0, size):
        x = nn.Parameter(torch.zeros(2000))
        optimizer = lodo.LODO([x], lr=1e-3, preconditioner="identity", scale_lr=0.03)
        for step in range(20):
            x.grad = own * (1 + 0.1 * noisy(x.shape, step, torch.float32))
            optimizer.step()
        found.append(state_of(optimizer)["progress"].item())
    assert found[1] == pytest.approx(found[0], rel=1e-4) or found[1] == 0.0
    assert found[0] > 0.8


def test_steps_that_are_taken_back_praise_no_scale(where):
    """As by a projection onto a box, at whose side the gradient points out for ever."""
    x = nn.Parameter(torch.full((6,), 0.9, dtype=torch.float64))
    optimizer, before = lodo.AutoLODO([x], lr=0.01), 0.0
    for step in range(400):
        optimizer.zero_grad()
        (-x.sum()).backward()
        optimizer.step()
        with torch.no_grad():
            x.clamp_(max=1.0)
        if step == 60:
            before = state_of(optimizer)["scale"][0].item()
    assert flat([x]).eq(1).all()
    assert state_of(optimizer)["scale"][0].item() < before + math.log(1.1)
