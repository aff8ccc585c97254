"""`LODO.diagnostics` and `lodo.spectrum`, against dense matrices, autograd and the steps themselves."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import lodo
from tests.helpers import oracle

SIZE = 13


def trained(kind: str = "block_permutation", steps: int = 4, **options):
    """An optimizer after some steps on a quadratic, its parameter, and the gradient's function."""
    h, c = oracle.quadratic(SIZE)
    x = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    optimizer = lodo.LODO([x], **{"lr": 0.3, "meta_lr": 0.02, "preconditioner": kind, **options})

    def gradient():
        x.grad = h @ (x.detach() - c)

    for _ in range(steps):
        gradient()
        optimizer.step()
    return optimizer, x, gradient


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_figures_are_those_of_the_last_step_and_of_g(kind, kernel):
    optimizer, x, gradient = trained(kind)
    gradient()
    before = x.detach().clone()
    optimizer.step()
    step = before - x.detach()
    g = optimizer.preconditioners[0]
    dense = 0.3 * g.to_dense()
    gradient()  # where the step landed
    momentum = optimizer.state[x]["momentum"]
    theta = oracle.learned(g).requires_grad_()
    torch.dot(x.grad, -0.3 * oracle.matvec(g, theta, momentum)).backward()
    (found,) = optimizer.diagnostics(probes=2, iterations=SIZE)

    assert found["steps"] == 5
    assert found["skipped_steps"] == 0
    assert found["lr"] == 0.3
    assert found["step_norm"] == pytest.approx(step.norm().item(), rel=1e-10)
    assert found["relative_step_norm"] == pytest.approx((step.norm() / x.detach().norm()).item(), rel=1e-10)
    assert found["gradient_norm"] == pytest.approx(x.grad.norm().item(), rel=1e-12)
    cosine = torch.dot(step, x.grad) / (step.norm() * x.grad.norm())
    assert found["step_gradient_cosine"] == pytest.approx(cosine.item(), rel=1e-9)
    assert found["hypergradient_norm"] == pytest.approx(theta.grad.norm().item(), rel=1e-9)
    eigenvalues = torch.linalg.eigvalsh(dense)
    assert found["eigenvalue_min"] == pytest.approx(eigenvalues[0].item(), rel=1e-6)
    assert found["eigenvalue_max"] == pytest.approx(eigenvalues[-1].item(), rel=1e-9)
    assert {"seconds_gather", "seconds_learn", "seconds_apply"} <= found.keys()
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize(
    "parts", [{"trace_decay": 0.5}, {"scale_lr": 1e-300}, {"momentum_decays": (0.0, 0.9)}], ids=str
)
@pytest.mark.parametrize("base", [None, "adam", "soap"])
@pytest.mark.parametrize("kind", ["block_permutation", "log_diagonal"])
def test_the_figures_know_the_parts_of_g(kind, base, parts):
    """Whatever the coordinates in which the optimizer computes."""
    optimizer, x, gradient = trained(kind, steps=0, base=base, meta_optimizer="sgd", lr=0.0, **parts)
    for _ in range(12):  # gradients along all coordinates, before steps are made along them
        x.grad = torch.randn_like(x)
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    for _ in range(3):
        gradient()
        optimizer.step()
    gradient()
    before = x.detach().clone()
    optimizer.step()
    step = before - x.detach()
    gradient()
    (found,) = optimizer.diagnostics(probes=2, iterations=SIZE)
    eigenvalues = 0.1 * torch.linalg.eigvalsh(optimizer.preconditioners[0].to_dense())
    before = oracle.learned(network := getattr(optimizer.preconditioners[0], "network", optimizer.preconditioners[0]))
    optimizer.step()
    assert found["step_norm"] == pytest.approx(step.norm().item(), rel=1e-9)
    cosine = torch.dot(step, x.grad) / (step.norm() * x.grad.norm())
    assert found["step_gradient_cosine"] == pytest.approx(cosine.item(), rel=1e-9)
    moved = torch.linalg.vector_norm(oracle.learned(network) - before).item()
    assert found["hypergradient_norm"] == pytest.approx(moved / 0.02, rel=1e-9)
    assert found["eigenvalue_min"] == pytest.approx(eigenvalues[0].item(), rel=1e-6)
    assert found["eigenvalue_max"] == pytest.approx(eigenvalues[-1].item(), rel=1e-9)


def test_the_singular_values_are_those_of_the_blocks(kernel):
    optimizer, _, _ = trained(block_size=3, meta_lr=0.1)
    values = torch.linalg.svdvals(optimizer.preconditioners[0].blocks)
    (found,) = optimizer.diagnostics()
    assert found["singular_value_min"] == pytest.approx(values.min().item(), rel=1e-5)
    assert found["singular_value_max"] == pytest.approx(values.max().item(), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"meta_state_dtype": "bfloat16", "momentum_dtype": "bfloat16"}])
@pytest.mark.parametrize("kind", oracle.KINDS)
def test_asking_changes_nothing(kind, options, kernel):
    asked, x, gradient = trained(kind, steps=0, **options)
    silent, y, other_gradient = trained(kind, steps=0, **options)
    for _ in range(6):
        gradient()
        asked.diagnostics()
        asked.step()
        random_state = torch.get_rng_state()
        asked.diagnostics()
        assert torch.equal(torch.get_rng_state(), random_state)
        other_gradient()
        silent.step()
    assert torch.equal(x, y)
    assert asked.state[x].keys() == silent.state[y].keys()
    for name, value in silent.state[y].items():
        assert torch.equal(torch.as_tensor(asked.state[x][name]), torch.as_tensor(value)), name


def test_each_group_has_its_figures_once_it_has_stepped():
    a, b, c = (nn.Parameter(torch.ones(n)) for n in (5, 3, 2))
    groups = [{"params": [a]}, {"params": [b], "preconditioner": "diagonal", "meta_lr": 0.0}, {"params": [c]}]
    optimizer = lodo.LODO(groups, lr=0.1)
    assert optimizer.diagnostics() == [{}, {}, {}]
    a.grad, b.grad = torch.ones(5), torch.ones(3)
    optimizer.step()
    first, second, third = optimizer.diagnostics()
    assert "singular_value_max" in first
    assert "singular_value_max" not in second
    assert "hypergradient_norm" not in second  # frozen
    assert second["trace"] == pytest.approx(0.3)
    assert third == {}


def test_the_default_device_and_dtype_have_no_influence():
    optimizer, _, gradient = trained()
    gradient()
    expected, usual = optimizer.diagnostics(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):  # stands for an accelerator where the parameters are not
            found = optimizer.diagnostics()
            eigenvalues, _ = lodo.spectrum(optimizer.preconditioners[0])
            optimizer.preconditioners[0].theta.fill_(math.nan)
            nothing, _ = lodo.spectrum(optimizer.preconditioners[0])
    finally:
        torch.set_default_dtype(usual)
    for figures in (*found, *expected):
        for name in [name for name in figures if name.startswith("seconds")]:
            del figures[name]
    assert found == expected
    assert eigenvalues.device.type == nothing.device.type == "cpu"


@pytest.mark.parametrize("base", [None, "adam", "soap"])
@pytest.mark.parametrize("kind", ["log_diagonal", "identity", "block_permutation"])
def test_the_default_device_has_no_influence_on_steps_and_loads(kind, base):
    def run(device):
        params = [nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)), nn.Parameter(torch.ones(4))]
        optimizer = lodo.LODO(params, **{**lodo.RECOMMENDED, "preconditioner": kind, "base": base})
        for step in range(12):
            if step == 6:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for p in params:
                p.grad = p.detach().sin()
            with torch.device(device):
                optimizer.step()
        return params

    for found, expected in zip(run("meta"), run("cpu"), strict=True):
        assert torch.equal(found, expected)


def test_maximize_counts_the_gradient_upwards():
    x = nn.Parameter(torch.zeros(4))
    optimizer = lodo.LODO([x], maximize=True)
    x.grad = torch.tensor([1.0, -2.0, 3.0, 0.5])
    optimizer.step()
    assert optimizer.diagnostics()[0]["step_gradient_cosine"] == pytest.approx(1)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_where_there_is_no_sound_gradient_there_is_no_agreement(bad, kernel):
    optimizer, x, gradient = trained()
    theta = optimizer.preconditioners[0].theta.clone()
    gradient()
    if bad is None:
        x.grad = None
    else:
        x.grad[3] = bad
    (found,) = optimizer.diagnostics()
    assert math.isnan(found["step_gradient_cosine"])
    assert found["hypergradient_norm"] == 0 if bad is None else not math.isfinite(found["hypergradient_norm"])
    assert torch.equal(optimizer.preconditioners[0].theta, theta)


def test_what_has_no_gradient_does_not_count():
    moved, still = nn.Parameter(torch.ones(3, dtype=torch.float64)), nn.Parameter(torch.full((4,), 9.0))
    optimizer = lodo.LODO([moved, still], lr=0.1, meta_lr=0.1)
    for step in range(4):
        before = moved.detach().clone()
        moved.grad = (moved.detach() + step).cos()
        optimizer.step()
    (found,) = optimizer.diagnostics()
    length = (moved.detach() - before).norm().item()
    assert found["step_norm"] == pytest.approx(length, rel=1e-9)
    assert found["relative_step_norm"] == pytest.approx(length / moved.detach().norm().item(), rel=1e-9)


def test_nothing_has_no_spectrum():
    nothing = lodo.Diagonal.wrap(torch.empty(0), None, 0)  # as on a rank without a part of a group
    with pytest.raises(ValueError, match="at least one parameter"):
        lodo.spectrum(nothing)


@pytest.mark.parametrize("kind", oracle.KINDS)
@pytest.mark.parametrize("size", [1, 2, 17])
def test_the_spectrum_is_exact_once_the_iterations_reach_n(kind, size):
    g = oracle.fresh(kind, size)
    exact = torch.linalg.eigvalsh(g.to_dense())
    eigenvalues, weights = lodo.spectrum(g, probes=3, iterations=size)
    assert eigenvalues.dtype == weights.dtype == torch.float64
    assert torch.equal(eigenvalues, eigenvalues.sort().values)
    assert weights.sum().item() == pytest.approx(1)
    assert (weights >= 0).all()
    np.testing.assert_allclose(eigenvalues[[0, -1]], exact[[0, -1]], rtol=1e-8)
    # The same probes, by hand: the quadrature of f is the mean of v^T f(A) v / n.
    generator = torch.Generator().manual_seed(0)
    signs = [torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) * 2.0 - 1 for _ in range(3)]
    values, vectors = torch.linalg.eigh(g.to_dense())
    for f in (lambda t: t, torch.exp):
        by_hand = sum(((vectors.T @ v.double()) ** 2 * f(values)).sum() for v in signs) / (3 * size)
        assert (weights * f(eigenvalues)).sum().item() == pytest.approx(by_hand.item(), rel=1e-8)


def test_a_few_iterations_find_the_ends_of_a_large_spectrum_from_inside():
    g = oracle.fresh("block_permutation", 300, dtype=torch.float32)
    exact = torch.linalg.eigvalsh(g.to_dense().double())
    eigenvalues, weights = lodo.spectrum(g, probes=8, iterations=20)
    low, high = exact[0].item(), exact[-1].item()
    assert 0.9 * high < eigenvalues[-1].item() <= high * (1 + 1e-5)
    assert low * (1 - 1e-5) <= eigenvalues[0].item() < low + 0.05 * (high - low)
    assert (weights * eigenvalues).sum().item() == pytest.approx(exact.mean().item(), rel=0.05)


@pytest.mark.parametrize("name", ["probes", "iterations"])
def test_numbers_of_probes_out_of_range_are_refused(name):
    optimizer, _, _ = trained()
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        optimizer.diagnostics(**{name: 0})
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        lodo.spectrum(optimizer.preconditioners[0], **{name: 0})


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_the_figures_are_the_same_on_every_device(kind, device):
    found = []
    for place in (torch.device("cpu"), device):
        x = nn.Parameter(torch.linspace(-1, 1, SIZE, dtype=torch.float64, device=place))
        optimizer = lodo.LODO([x], lr=0.3, meta_lr=0.02, preconditioner=kind)
        for step in range(4):
            x.grad = (x.detach() * (step + 1)).cos()
            optimizer.step()
        found.append(optimizer.diagnostics()[0])
    assert found[0].keys() == found[1].keys()
    for name in (name for name in found[0] if not name.startswith("seconds")):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-6), name
