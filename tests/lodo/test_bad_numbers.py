"""Gradients with NaN or infinity change nothing, are counted, and warn once."""

import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import lodo
from tests.helpers.oracle import KINDS
from tests.helpers.states import assert_same_snapshot, snapshot


def trained(kind="block_permutation", groups=1, **options):
    params = [torch.nn.Parameter(torch.randn(5, 2)) for _ in range(2 * groups)]
    split = [{"params": params[2 * i : 2 * i + 2]} for i in range(groups)]
    optimizer = lodo.LODO(split, lr=0.1, weight_decay=0.01, preconditioner=kind, depth=3, **options)
    for _ in range(3):
        backward(params)
        optimizer.step()
    return params, optimizer


def backward(params):
    for p in params:
        p.grad = p.detach().sin()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_gradient_changes_nothing_and_is_counted(kind, bad, kernel):
    params, optimizer = trained(kind)
    before = snapshot(optimizer)
    backward(params)
    params[1].grad[3, 1] = bad
    with pytest.warns(UserWarning, match="skipped_steps"):
        optimizer.step()
    assert_same_snapshot(snapshot(optimizer), before)
    assert optimizer.skipped_steps == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert optimizer.skipped_steps == 2
    backward(params)
    optimizer.step()
    assert optimizer.skipped_steps == 2
    assert not torch.equal(params[0], before[0][0])


def test_going_on_after_a_bad_gradient_is_as_if_it_had_not_been(kernel):
    params, optimizer = trained()
    twin_params, twin = trained()
    for p, q in zip(params, twin_params, strict=True):
        q.data.copy_(p.data)
    twin.load_state_dict(optimizer.state_dict())
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step()
    for _ in range(3):
        backward(params), optimizer.step()
        backward(twin_params), twin.step()
    assert_same_snapshot(snapshot(optimizer), snapshot(twin))


def test_a_bad_gradient_in_one_group_holds_back_the_others_too():
    params, optimizer = trained(groups=2)
    before = snapshot(optimizer)
    backward(params)
    params[0].grad[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step()
    assert_same_snapshot(snapshot(optimizer), before)


def test_the_very_first_step_may_be_bad():
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = lodo.LODO([x], lr=0.1)
    x.grad = torch.tensor([1.0, float("nan"), 1.0])
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step()
    assert torch.equal(x, torch.ones(3))
    twin = torch.nn.Parameter(torch.ones(3))
    other = lodo.LODO([twin], lr=0.1)
    for p, o in ((x, optimizer), (twin, other)):
        for _ in range(3):
            p.grad = p.detach().clone()
            o.step()
    assert torch.equal(x, twin)


@pytest.mark.filterwarnings("ignore:LODO skipped a step")
@pytest.mark.parametrize("kind", [*KINDS, "identity"])
@pytest.mark.parametrize("parts", [{}, {**lodo.RECOMMENDED, "base": "adam"}], ids=["paper's", "recommended"])
def test_a_parameter_whose_first_gradient_is_bad_has_not_started(kind, parts, where):
    """The same on all devices, and whether the training is resumed in between or not."""
    results = []
    for is_bad, is_resumed in ((False, False), (True, False), (True, True)):
        params = [nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3) + i) for i in range(2)]
        options = {**parts, "preconditioner": kind, "depth": 2, "lr": 0.1}
        optimizer = lodo.LODO(params, **options)
        for step in range(8):
            if step == 3 and is_bad:
                params[1].grad = torch.full((2, 3), math.nan)
                optimizer.step()
                assert [int(optimizer.state[p]["skipped_steps"]) for p in params] == [1, 1]
                if is_resumed:
                    saved, optimizer = optimizer.state_dict(), lodo.LODO(params, **options)
                    optimizer.load_state_dict(saved)
            backward(params)
            if step < 5:
                params[1].grad = None
            optimizer.step()
            assert [int(optimizer.state[p]["step"]) for p in params] == [step + 1, max(0, step - 4)]
        results.append(snapshot(optimizer))
    for found in results[1:]:
        assert_same_snapshot(found, results[0])


def test_the_count_is_saved_and_does_not_warn_again_on_load():
    params, optimizer = trained()
    params[0].grad = torch.full_like(params[0], float("inf"))
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step()
    other = lodo.LODO([{"params": params}], preconditioner="block_permutation", depth=3)
    other.load_state_dict(optimizer.state_dict())
    assert other.skipped_steps == 1
    backward(params)
    other.step()
    assert other.skipped_steps == 1


def test_a_probing_step_with_lr_zero_and_zero_gradients_makes_state_and_changes_nothing(kernel):
    params, optimizer = trained()
    before = snapshot(optimizer)
    lr = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 0.0
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same_snapshot(snapshot(optimizer), before)
    optimizer.param_groups[0]["lr"] = lr

    def run(probe):
        x = torch.nn.Parameter(torch.ones(5))
        other = lodo.LODO([x], lr=torch.tensor(0.0) if probe else 0.1)
        if probe:
            x.grad = torch.zeros(5)
            other.step()
            assert {"theta", "theta_exp_avg", "momentum"} <= other.state[x].keys()
            other.param_groups[0]["lr"] = 0.1
        for _ in range(3):
            x.grad = x.detach().clone()
            other.step()
        return x

    assert torch.equal(run(probe=True), run(probe=False))


@pytest.mark.cuda
def test_on_cuda_nothing_waits_for_the_device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    x = torch.nn.Parameter(torch.ones(1000, device="cuda"))
    optimizer = lodo.LODO([x], lr=0.1, weight_decay=0.1)
    x.grad = torch.ones_like(x)
    optimizer.step()
    optimizer.step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        optimizer.step()
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
        optimizer.step()
        x.grad[3] = float("nan")
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    x.grad[3] = 1.0
    with pytest.warns(UserWarning, match="skipped"):  # the count has come in by now
        optimizer.step()
    assert optimizer.skipped_steps == 1


def test_large_gradients_are_held_back_only_where_they_would_stay():
    """float32: a gradient of 1e12 would make the inner Adam's second moment infinite; frozen, it does no harm."""
    for options, skipped in (({}, 1), ({"meta_lr": 0.0}, 0), ({"meta_optimizer": "sgd"}, 0)):
        x = torch.nn.Parameter(torch.ones(3))
        optimizer = lodo.LODO([x], lr=0.0, **options)
        x.grad = torch.full((3,), 1e12)
        with pytest.warns(UserWarning, match="skipped") if skipped else nullcontext():
            optimizer.step()
        assert optimizer.skipped_steps == skipped


@pytest.mark.parametrize("trace", [0.0, 0.99])
def test_what_the_inner_adam_keeps_stays_finite_under_large_gradients(trace):
    """float32; with a trace the vector that is judged is up to 1 / (1 - trace) momenta long."""
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = lodo.LODO([x], lr=1.0, meta_lr=1e-8, preconditioner="diagonal", trace_decay=trace)
    x.grad = torch.full((3,), 1e9)
    with pytest.warns(UserWarning, match="skipped") if trace else nullcontext():
        for _ in range(50):
            optimizer.step()
    assert optimizer.skipped_steps == (50 if trace else 0)
    assert all(value.isfinite().all() for value in optimizer.state[x].values() if torch.is_tensor(value))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_skipped_steps_are_told_of_at_the_1st_the_10th_and_the_100th(bad, where):
    w = nn.Parameter(torch.ones(3, 3))
    optimizer = lodo.AutoLODO([w])
    w.grad = torch.ones(3, 3)
    optimizer.step()
    before, told = w.detach().clone(), []
    for count in range(1, 106):
        w.grad = torch.ones(3, 3)
        w.grad[0, 0] = bad
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            optimizer.step()
        told += [count] * len(found)
        assert all(f"{count} since the optimizer" in str(each.message) for each in found)
        assert all(each.filename == __file__ for each in found)
    assert told == [1, 10, 100]
    assert optimizer.skipped_steps == 105
    assert torch.equal(w.detach(), before)
    w.grad = torch.ones(3, 3)
    optimizer.step()
    assert (w.detach() < before).all()
