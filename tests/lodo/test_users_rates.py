"""Rates that jump, losses of any size, weight decay: each by the value that must come of it."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lodo
from lodo import inner_optimizer
from lodo.parts import second_moment
from tests.helpers.habits import assert_finite, follow, noisy
from tests.helpers.parts import POWERS, state_of
from tests.helpers.states import assert_same

# ---- lr --------------------------------------------------------------------------------------------------------------


def classified(factor_of, steps):
    """The worst batch loss from step 400 on, of a teacher's classification at lr 1e-3 times a factor."""
    torch.manual_seed(0)
    x = torch.randn(1024, 16)
    teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    y = (teacher(x) + 0.1 * torch.randn(1024, 4)).argmax(1)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer, g, worst = lodo.AutoLODO(model.parameters()), torch.Generator().manual_seed(0), 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * factor_of(step)
        i = torch.randint(0, 1024, (64,), generator=g)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[i]), y[i])
        loss.backward()
        optimizer.step()
        worst = max(worst, loss.item()) if step >= 20 else 0.0
    return worst


@pytest.fixture(scope="module")
def worst_at_a_constant_rate():
    return classified(lambda step: 1, 700)


@pytest.mark.parametrize("size", [32, 128])
def test_a_scale_that_was_too_large_comes_back(size):
    """On the mean square of some numbers, without noise: the scale grows until x jumps across the minimum, and what the
    long steps are blamed for must not drive it down for hundreds of steps more (the loss was .36 after 1,000)."""
    torch.manual_seed(0)
    x = nn.Parameter(torch.randn(size))
    optimizer, losses = lodo.AutoLODO([x]), []
    for _ in range(1000):
        optimizer.zero_grad()
        loss = x.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert max(losses[100:300]) > 0.1  # it did jump
    assert losses[-1] < 1e-2


@pytest.mark.parametrize("small", [1e-2, 1e-3])
def test_a_rate_that_rises_at_once_does_no_harm(small, worst_at_a_constant_rate):
    worst = classified(lambda step: small if step < 400 else 1, 700)
    assert worst < 2 * worst_at_a_constant_rate


@pytest.mark.parametrize("lr", [1e-3, 1e-1])
def test_after_a_warm_restart_steps_are_no_larger_than_before(lr, where):
    """By lr * S, up to what is learned in the one step itself."""
    w, target, cycle = nn.Parameter(torch.zeros(6, 6)), noisy((6, 6), 5, torch.float32), 40
    optimizer = lodo.AutoLODO([w], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, cycle)
    largest = 0.0
    for step in follow(optimizer, w, target, 0, 5 * cycle):
        entry = state_of(optimizer)
        size = optimizer.param_groups[0]["lr"] * entry["scale"][0].exp().item()
        if step > 0 and step % cycle == 0:
            assert size <= max(largest, lr) * math.exp(2 * lodo.RECOMMENDED["scale_lr"])
        largest = max(largest, size)
        assert entry["scheduled_lr"].item() == pytest.approx(optimizer.param_groups[0]["lr"])
        schedule.step()
    assert_finite(optimizer)


@pytest.mark.parametrize("base", ["soap", "adam"])
def test_steps_at_lr_0_change_no_parameter_and_training_goes_on(base, where):
    w, target = nn.Parameter(torch.ones(4, 4)), torch.full((4, 4), 1.3)
    optimizer = lodo.AutoLODO([w], lr=0.0, base=base, weight_decay=0.1)
    for _ in follow(optimizer, w, target, 0, 20, noise=0.0):
        assert torch.equal(w.detach(), torch.ones(4, 4))
    optimizer.param_groups[0].update(lr=1e-2, weight_decay=0.0)
    for _ in follow(optimizer, w, target, 20, 220, noise=0.0):
        pass
    assert (w.detach() - target).abs().max() < 0.05
    assert_finite(optimizer)


# ---- the size of the loss --------------------------------------------------------------------------------------------


def test_the_unit_of_gradients_is_1_or_a_power_of_two_below_their_norm():
    for size in (2.0**-8, 0.3, 1.0, 5.0, 2.0**8):
        assert second_moment.next_unit(0.0, size) == 1
    assert second_moment.next_unit(0.0, 2.0**8 + 1) == 2.0**8
    assert second_moment.next_unit(0.0, 1.99 * 2.0**-9) == 2.0**-9
    assert second_moment.next_unit(0.0, 1e-300) == 2.0**-96
    assert second_moment.next_unit(0.0, 1e300) == 2.0**96
    for unit in (0.0, 2.0**-30, 1.0, 2.0**30):
        for size in (0.0, math.inf, math.nan):
            assert second_moment.next_unit(unit, size) == unit
    for unit in (2.0**-30, 1.0, 2.0**30):
        assert second_moment.next_unit(unit, 1e-12 * unit) == unit
        assert second_moment.next_unit(unit, 2.0**20 * unit) == unit
        assert second_moment.next_unit(unit, 3 * 2.0**20 * unit) == 2.0**21 * unit


def scaled_run(scale, dtype=torch.float32, steps=150, norm=None, **options):
    """Parameters, and loss over `scale`, of a regression whose first gradient has norm `norm`, if that is given."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
    x = torch.randn(128, 6, dtype=dtype)
    optimizer = lodo.AutoLODO(model.parameters(), **options)

    def loss_of():
        return (model(x) - x[:, :3].sin() * x[:, 3:]).square().mean()

    if norm is not None:
        found = torch.autograd.grad(loss_of(), list(model.parameters()))
        scale = scale * 2.0 ** round(math.log2(norm / torch.cat([g.flatten() for g in found]).norm().item()))
    for _ in range(steps):
        optimizer.zero_grad()
        (loss_of() * scale).backward()
        optimizer.step()
    assert optimizer.skipped_steps == 0
    assert_finite(optimizer)
    return [p.detach() for p in model.parameters()], loss_of().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [-66, -20, 20, 66])
def test_powers_of_two_on_the_loss_change_no_bit_if_gradients_start_between_1_and_2(k, dtype, kernel):
    expected = scaled_run(1.0, dtype, 40, norm=2**0.5)
    assert_same(scaled_run(2.0**k, dtype, 40, norm=2**0.5), expected)


@pytest.mark.parametrize("k", [-66, -20, 20, 66])
@pytest.mark.parametrize("norm", [90.0, 1 / 90.0])
def test_powers_of_two_on_the_loss_change_no_bit_but_for_what_is_added_to_roots(norm, k, monkeypatch):
    """Lest they be zero. Here the unit is 1 without the power, and not the power with it."""
    monkeypatch.setenv("LODO_NATIVE", "0")
    close = scaled_run(2.0**k, torch.float64, 40, norm=norm)[0], scaled_run(1.0, torch.float64, 40, norm=norm)[0]
    for found, expected in zip(*close, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.25 * 40 * 1e-3)
    monkeypatch.setattr(second_moment, "EPS", 1e-300)
    monkeypatch.setattr(inner_optimizer, "EPS", 1e-300)
    assert_same(scaled_run(2.0**k, torch.float64, 40, norm=norm), scaled_run(1.0, torch.float64, 40, norm=norm))


@pytest.fixture(scope="module")
def unscaled_loss():
    return scaled_run(1.0)[1]


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
def test_the_loss_may_be_of_any_size(scale, unscaled_loss, where):
    assert scaled_run(scale)[1] == pytest.approx(unscaled_loss, rel=0.25)


@pytest.mark.parametrize("base", ["soap", "adam"])
@pytest.mark.parametrize("growth", [1e12, 1e25])
def test_gradients_that_grow_out_of_all_proportion_are_taken(growth, base, kernel):
    w = nn.Parameter(torch.zeros(6, 6))
    optimizer = lodo.AutoLODO([w], base=base)
    for step in range(80):
        w.grad = noisy((6, 6), step, torch.float32) * (growth if step >= 40 else 1)
        before = w.detach().clone()
        optimizer.step()
        assert not torch.equal(w.detach(), before)
        assert (w.detach() - before).norm() < 0.1
        assert_finite(optimizer)
    assert optimizer.skipped_steps == 0
    assert state_of(optimizer)["step"].item() == 80
    assert state_of(optimizer)["unit"].item() >= growth / 2**10


def change_unit(optimizer, w, unit):
    """As if gradients had always been divided by it, in place of by 1."""
    entry = optimizer.state[w]
    assert entry["unit"].item() == 1
    entry["unit"].fill_(unit)
    for name in POWERS.keys() & entry.keys():
        powers = POWERS[name]
        for row, power in zip(entry[name].unbind() if len(powers) > 1 else [entry[name]], powers, strict=True):
            row.mul_(unit**-power)


@pytest.mark.parametrize("base", ["soap", "adam"])
@pytest.mark.parametrize("unit", [2.0**5, 2.0**-5])
def test_another_unit_of_gradients_changes_no_bit(unit, base, monkeypatch):
    """But for what is added to roots lest they be zero, which is left out here."""
    monkeypatch.setenv("LODO_NATIVE", "0")
    monkeypatch.setattr(second_moment, "EPS", 1e-300)
    monkeypatch.setattr(inner_optimizer, "EPS", 1e-300)
    w, target = nn.Parameter(torch.zeros(6, 6, dtype=torch.float64)), noisy((6, 6), 1000)
    optimizer = lodo.AutoLODO([w], base=base)
    for _ in follow(optimizer, w, target, 0, 25):
        pass
    x, other = copy.deepcopy((w, optimizer))
    change_unit(other, x, unit)
    for _ in zip(follow(optimizer, w, target, 25, 60), follow(other, x, target, 25, 60), strict=True):
        assert torch.equal(w.detach(), x.detach())
    assert state_of(other)["unit"].item() == unit
    change_unit(optimizer, w, unit)
    assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])


def test_another_unit_of_gradients_changes_little_with_compiled_kernels(kernel):
    w, target = nn.Parameter(torch.zeros(6, 6, dtype=torch.float64)), noisy((6, 6), 1000)
    optimizer = lodo.AutoLODO([w])
    for _ in follow(optimizer, w, target, 0, 25):
        pass
    x, other = copy.deepcopy((w, optimizer))
    change_unit(other, x, 2.0**5)
    for _ in zip(follow(optimizer, w, target, 25, 60), follow(other, x, target, 25, 60), strict=True):
        torch.testing.assert_close(x.detach(), w.detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("base", ["soap", "adam"])
@pytest.mark.parametrize(("jump", "beta"), [(1e3, 0.9), (1e6, 0.9), (1e3, 0.0)])
def test_a_jump_of_the_loss_makes_no_long_steps(jump, beta, base, kernel):
    w, target = nn.Parameter(torch.zeros(8, 8)), noisy((8, 8), 1000, torch.float32)
    optimizer, norms = lodo.AutoLODO([w], base=base, beta=beta), []
    for step in range(240):
        scale = jump if step >= 200 else 1.0
        w.grad = scale * (w.detach() - target + 0.3 * noisy((8, 8), step, torch.float32))
        before = w.detach().clone()
        optimizer.step()
        norms.append((w.detach() - before).norm().item())
    assert max(norms[200:]) <= 9 * max(norms[150:200])


@pytest.mark.parametrize("base", ["soap", "adam"])
@pytest.mark.parametrize("trained", [60])
def test_parameters_coast_no_farther_than_a_dozen_steps(trained, base, where):
    w, target = nn.Parameter(torch.zeros(8, 8)), noisy((8, 8), 1000, torch.float32)
    optimizer, before = lodo.AutoLODO([w], base=base), w.detach().clone()
    for _ in follow(optimizer, w, 10 * target, 0, trained):
        last, before = (w.detach() - before).norm().item(), w.detach().clone()
    for _ in range(500):
        w.grad = torch.zeros(8, 8)
        optimizer.step()
    assert (w.detach() - before).norm().item() <= 15 * last
    assert_finite(optimizer)


# ---- weight decay ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["soap", "adam"])
@pytest.mark.parametrize("steps", [0, 100])
def test_weight_decay_is_in_proportion_to_the_scaled_rate(steps, base, where):
    lr, decay = 0.01, 0.3
    params = [nn.Parameter(noisy(shape, 7)) for shape in ((4, 5), (6,))]
    optimizer = lodo.AutoLODO(params, lr=lr, base=base)
    for step in range(steps):
        for p in params:
            p.grad = p.detach() - 1 + 0.3 * noisy(p.shape, step)
        optimizer.step()
    before = [p.detach().clone() for p in params]
    others, other = copy.deepcopy((params, optimizer))
    other.param_groups[0]["weight_decay"] = decay
    for own, each in ((params, optimizer), (others, other)):
        each.param_groups[0]["scale_lr"] = 1e-30  # the decay judges scales too
        for p in own:
            p.grad = noisy(p.shape, 9)
        each.step()
    scales = state_of(other)["scale"][0].exp()
    assert bool((scales != 1).all()) == (steps > 0)
    for p, decayed, x, scale in zip(params, others, before, scales, strict=True):
        torch.testing.assert_close(p.detach() - decayed.detach(), lr * scale * decay * x, rtol=1e-9, atol=1e-14)
