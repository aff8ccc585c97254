"""The learned mixture of momenta, against plain forms of its own in float64."""

import copy

import pytest
import torch
from torch import nn

import lodo
from lodo import inner_optimizer
from lodo.parts.mixture import FIRST_SHARE
from tests.helpers.parts import NETWORKS, backward, built, flat, loss_of, made, rotated_back, scales, state_of, trained

DECAYS = (0.0, 0.9, 0.99)
SHAPES = ((3, 4), (5,), ())


def weights(optimizer):
    """The present ones, (decays, tensors)."""
    return state_of(optimizer)["mixture"][0].softmax(0)


def mixed(w, momenta, params, steps):
    """sum_b w_b m_b / (1 - b^t) on each tensor."""
    corrected = momenta / (1 - torch.tensor(DECAYS, dtype=torch.float64) ** steps)[:, None]
    parts = corrected.split([p.numel() for p in params], dim=1)
    return torch.cat([(w[:, j, None] * part).sum(0) for j, part in enumerate(parts)])


def test_a_mixture_starts_near_the_momentum_of_beta():
    _, optimizer = trained(shapes=SHAPES, steps=1, momentum_decays=DECAYS, beta=0.92, mix_lr=0.0)
    rest = (1 - FIRST_SHARE) / 2
    expected = torch.tensor([rest, FIRST_SHARE, rest], dtype=torch.float64)[:, None].expand(3, 3)
    torch.testing.assert_close(weights(optimizer), expected)


@pytest.mark.parametrize("base", [None, "adam", "soap"])
def test_one_decay_alone_is_the_corrected_momentum(base):
    one, _ = trained(shapes=SHAPES, steps=20, momentum_decays=(0.9,), base=base)
    other = made(SHAPES)
    optimizer = lodo.LODO(other, preconditioner="identity", lr=0.05, base=base)
    for step in range(1, 21):
        backward(other)
        if base is None:  # where there is a base LODO corrects by itself
            optimizer.param_groups[0]["lr"] = 0.05 / (1 - 0.9**step)
        optimizer.step()
    torch.testing.assert_close(flat(one), flat(other), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["identity", "log_diagonal", "block_permutation"])
@pytest.mark.parametrize("base", [None, "adam", "soap"])
def test_the_hypergradient_of_the_weights_is_that_of_autograd(kind, base):
    """Over lr, and with what the step did to a tensor divided by its scale."""
    params, optimizer = trained(kind, SHAPES, steps=7, momentum_decays=DECAYS, base=base, scale_lr=0.05, mix_lr=0.05)
    lr = optimizer.param_groups[0]["lr"]
    backward(params)
    start = flat(params)
    optimizer.param_groups[0].update(mix_lr=0.0, meta_lr=0.0)
    optimizer.step()
    dense, entry = optimizer.preconditioners[0].to_dense(), state_of(optimizer)
    u = entry["mixture"][0].clone().requires_grad_()
    momenta = rotated_back(optimizer, entry["momenta"])
    landed = start - lr * dense @ mixed(u.softmax(0), momenta, params, 8)
    torch.testing.assert_close(landed.detach(), flat(params), rtol=1e-12, atol=1e-12)
    backward(params)
    optimizer.step()
    s = scales(params, optimizer)
    assert (s - 1).abs().min() > 0.05
    (h,) = torch.autograd.grad(loss_of(landed.detach() + (landed - landed.detach()) / s) / lr, u)
    before, after = entry["mixture"][1], state_of(optimizer)["mixture"][1]
    found = (after - inner_optimizer.BETA1 * before) / (1 - inner_optimizer.BETA1)
    torch.testing.assert_close(found, h, rtol=1e-9, atol=1e-12)


def test_weights_move_as_documented():
    params, optimizer = trained(shapes=SHAPES, steps=4, momentum_decays=DECAYS, mix_lr=0.02)
    before = state_of(optimizer)["mixture"]
    backward(params)
    optimizer.step()
    after = state_of(optimizer)["mixture"]
    fall = after[1] / (1 - inner_optimizer.BETA1**5) / (after[2] / (1 - inner_optimizer.TABLE_BETA2**5)).sqrt()
    torch.testing.assert_close(after[0], before[0] - 0.02 * fall)
    late = 1000
    for p in params:
        optimizer.state[p]["step"].fill_(late - 1)
    optimizer.param_groups[0]["mix_lr"] = 1.0
    before = state_of(optimizer)["mixture"]
    backward(params)
    optimizer.step()
    after = state_of(optimizer)["mixture"]
    fall = after[1] / (1 - inner_optimizer.BETA1**late) / (after[2] / (1 - inner_optimizer.TABLE_BETA2**late)).sqrt()
    torch.testing.assert_close(after[0], before[0] - inner_optimizer.RATE_CAP / late * fall)


@pytest.mark.parametrize("base", [None, "adam", "soap"])
def test_weights_wait_for_two_steps_and_for_one_that_moved(base, kernel):
    """Nothing can be learned of them before, nor from the gradient after a step of lr = 0."""
    params, optimizer = built("log_diagonal", SHAPES, momentum_decays=DECAYS, base=base, scale_lr=0.05, mix_lr=0.05)
    group, tables = optimizer.param_groups[0], []
    for step in range(1, 10):
        group["lr"] = 0.0 if step in (5, 6) else 0.05
        backward(params)
        optimizer.step()
        tables.append(state_of(optimizer)["mixture"])
    for step in range(2, 10):
        is_still = step in (2, 6, 7)
        assert torch.equal(tables[step - 2], tables[step - 1]) == is_still
        assert not ((tables[step - 2] == tables[step - 1]).any() and not is_still)
    assert not tables[1][1:].any()


@pytest.mark.parametrize("kind", ["identity", "log_diagonal", "block_permutation"])
@pytest.mark.parametrize("base", [None, "adam", "soap"])
def test_how_fast_weights_and_network_learn_does_not_hang_on_the_scales(base, kind, kernel):
    """From the same gradient, momenta and network they take the same into their moments, whatever the scales are. (One
    and the same for all tensors if the network mixes these.)"""
    options = {"momentum_decays": DECAYS, "base": base, "scale_lr": 1e-300, "meta_lr": 0.02, "trace_decay": 0.5}
    params, first = trained(kind, SHAPES, steps=7, **options)
    logs = torch.tensor([-8.0] * 3 if kind == "block_permutation" else [-8.0, 3.0, -0.5], dtype=torch.float64)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    second = lodo.LODO(others, preconditioner=kind, **NETWORKS[kind], base=base, momentum_decays=DECAYS)
    saved = copy.deepcopy(first.state_dict())
    for place, log in enumerate(logs):
        saved["state"][place]["scale"][0] = log
    second.load_state_dict(saved)
    x = flat(params)
    backward(params), backward(others)
    first.step(), second.step()
    for name in ("mixture", *(() if kind == "identity" else ("theta_exp_avg", "theta_exp_avg_sq", "theta"))):
        found, expected = state_of(second)[name], state_of(first)[name]
        size = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12 * size)
    ratio = ((flat(others) - x) / (flat(params) - x)).log()
    torch.testing.assert_close(ratio, logs.repeat_interleave(torch.tensor([12, 5, 1])), rtol=0, atol=1e-6)


def test_a_mixture_learns_to_do_without_momentum_and_to_use_much_of_it():
    """A minimum that jumps at every step wants the last gradient alone; a still one under noise wants a mean."""

    def share_of(lr, noise, walk):
        generator = torch.Generator().manual_seed(0)
        x = nn.Parameter(torch.zeros(20, dtype=torch.float64))
        center = torch.zeros(20, dtype=torch.float64)
        optimizer = lodo.LODO([x], lr=lr, preconditioner="identity", momentum_decays=(0.0, 0.95), mix_lr=0.02)
        for _ in range(800):
            center += walk * torch.randn(20, generator=generator, dtype=torch.float64)
            x.grad = x.detach() - center + noise * torch.randn(20, generator=generator, dtype=torch.float64)
            optimizer.step()
        return float(weights(optimizer)[0])

    assert share_of(lr=0.2, noise=0.0, walk=1.0) > 0.8
    assert share_of(lr=1.0, noise=1.0, walk=0.0) < 0.2


@pytest.mark.parametrize("value", [(), 0.9, "0.9", (0.9, 1.0), (-0.1,), (0.9, "a"), [None]])
def test_bad_decays_are_refused_by_name(value):
    with pytest.raises(ValueError, match="momentum_decays must be None or a tuple of numbers"):
        built(shapes=SHAPES, momentum_decays=value)


def test_a_state_of_other_decays_is_refused():
    _, saved = trained(shapes=SHAPES, momentum_decays=DECAYS)
    for decays in (None, (0.0, 0.9)):
        _, optimizer = built(shapes=SHAPES, momentum_decays=decays)
        with pytest.raises(ValueError, match="the saved state is of momentum_decays"):
            optimizer.load_state_dict(saved.state_dict())
        assert not optimizer.state


def test_decays_may_be_a_list_as_yaml_gives_it():
    one, _ = trained(shapes=SHAPES, momentum_decays=list(DECAYS))
    other, _ = trained(shapes=SHAPES, momentum_decays=DECAYS)
    assert torch.equal(flat(one), flat(other))


@pytest.mark.parametrize("momentum_decays", [(0.9,), (0.0, 0.9, 0.98), None])
def test_decays_that_the_state_was_not_made_for_are_refused(momentum_decays):
    params, optimizer = trained("log_diagonal", momentum_decays=(0.0, 0.9, 0.99))
    before, optimizer.param_groups[0]["momentum_decays"] = flat(params), momentum_decays
    copied, other = copy.deepcopy((params, optimizer))
    for own in (params, copied):
        backward(own)
    message = r"momentum_decays must stay \(0.0, 0.9, 0.99\) for"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    if momentum_decays is None or len(momentum_decays) != 3:  # of others the state does not tell
        with pytest.raises((ValueError, RuntimeError), match=r"momentum_decays must stay|momenta .* has shape"):
            other.step()
    assert torch.equal(flat(params), before)


def test_tables_of_a_device_without_float64_become_float64(kernel):
    """The kernels read them as that."""
    params, optimizer = trained("log_diagonal", scale_lr=0.05, momentum_decays=(0.0, 0.9))
    saved = copy.deepcopy(optimizer.state_dict())
    names = ("scale", "scale_peak", "mixture", "scheduled_lr", "last_lr")
    for entry in saved["state"].values():
        for name in names:
            entry[name] = entry[name].float()
    optimizer.load_state_dict(saved)
    assert optimizer.preconditioners[0] is not None
    for p, entry in zip(params, saved["state"].values(), strict=True):
        for name in names:
            assert torch.equal(optimizer.state[p][name], entry[name].double())
            assert optimizer.state[p][name].dtype == torch.float64
    backward(params)
    optimizer.step()
    assert state_of(optimizer)["scale"].isfinite().all()
