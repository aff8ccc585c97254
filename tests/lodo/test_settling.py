"""What averages and learns more slowly the longer a training lasts: averages of a base, gains of a `LogDiagonal`."""

import copy

import pytest
import torch
from torch import nn

import lodo
from lodo import inner_optimizer
from lodo.parts import bases
from lodo.parts.eigenbasis import phase_of, refresh_interval
from tests.helpers.bases import renewed


def next_renewal(step):
    """The first step from `step` on at which the basis of a vector of three is renewed."""
    interval = refresh_interval(step)
    return next(
        t for t in range(step, step + 2 * interval) if (t + int(phase_of((3, 1), 0) * interval)) % interval == 0
    )


LATE = next_renewal(51_200)
G = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)


def late_step(late=LATE, **options):
    """State before and after step number `late`, and the operator before."""
    x = nn.Parameter(torch.ones(3, dtype=torch.float64))
    chosen = {"lr": 0.1, "preconditioner": "log_diagonal", "meta_lr": 3e-3, "meta_optimizer": "sgd", **options}
    optimizer = lodo.LODO([x], **chosen)
    for _ in range(3):
        x.grad = x.detach() * G
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("step", "meta_step"):
        saved["state"][0][name].fill_(late - 1)
    if "exp_avg_sq" in saved["state"][0]:  # which by then is not corrected for its start at zero any more
        saved["state"][0]["exp_avg_sq"] /= 1 - 0.999**3
    optimizer.load_state_dict(saved)
    before, operator = copy.deepcopy(optimizer.state[x]), optimizer.preconditioners[0].to_dense()
    x.grad = G.clone()
    optimizer.step()
    assert int(optimizer.state[x]["step"]) == late
    return before, optimizer.state[x], operator


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["float", "tensor"])
def test_a_rate_is_bounded_from_a_step_on(dtype):
    for t, expected in ((1, 0.01), (499, 0.01), (500, 0.01), (1000, 0.005), (10**6, 5e-6)):
        number = float(t) if dtype is None else torch.tensor(t, dtype=dtype)
        assert float(inner_optimizer.capped(0.01, 5.0, number)) == pytest.approx(expected)


@pytest.mark.parametrize("base", [None, "adam"])
def test_gains_learn_at_a_rate_that_falls(base, where):
    before, after, operator = late_step(base=base)
    h = -before["last_lr"] * (operator @ G) * before["momentum"]
    torch.testing.assert_close(after["theta"], before["theta"] - 30 / LATE * h, rtol=1e-12, atol=1e-14)
    assert 30 / LATE < 3e-3


def test_networks_of_the_paper_learn_at_a_rate_that_does_not(where):
    before, after, _ = late_step(preconditioner="diagonal")
    h = -before["last_lr"] * G * before["momentum"]
    torch.testing.assert_close(after["theta"], before["theta"] - 3e-3 * h, rtol=1e-12, atol=1e-14)


def average_and_basis(entry):
    q = entry["eigenbasis"].view(3, 3)
    return q @ entry["factors"].view(3, 3) @ q.T, q


@pytest.mark.parametrize("base", ["adam", "soap"])
def test_averages_of_a_base_come_to_be_over_a_tenth_of_the_steps(base, where):
    before, after, _ = late_step(base=base)
    weight = 10 / LATE
    if base == "soap":
        (average, former), (found, basis) = (average_and_basis(own) for own in (before, after))
        expected = average + (1 - (1 - weight) ** 2) * (torch.outer(G, G) - average)  # of two steps, by one gradient
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    g, v = G, before["exp_avg_sq"]
    if base == "soap":
        g, v = basis.T @ G, (basis.T @ former) ** 2 @ v  # carried over into the new basis
    torch.testing.assert_close(after["exp_avg_sq"], v + weight * (g**2 - v), rtol=1e-12, atol=1e-14)


def test_the_interval_of_renewals_doubles_with_the_steps():
    steps = (1, 499, 500, 999, 1000, 1999, 2000, 51_200, 10**6)
    assert [*map(refresh_interval, steps)] == [10, 10, 20, 20, 40, 40, 80, 1280, 20_480]


@pytest.mark.parametrize(("after", "by"), [(400, 10), (600, 20), (2100, 80)])
@pytest.mark.parametrize(("share", "is_renewed"), [(0, True), (0.5, False), (1, True)])
def test_a_basis_is_renewed_less_often_as_training_goes_on(after, by, share, is_renewed, where, monkeypatch):
    monkeypatch.setattr(bases, "TOLERANCE", 0.0)
    before, after, _ = late_step(next_renewal(after) + int(share * by), base="soap")
    (_, basis), (average, found) = (average_and_basis(own) for own in (before, after))
    if is_renewed:
        basis = renewed(average @ basis, basis)
    torch.testing.assert_close(found, basis, rtol=1e-9, atol=1e-12)
