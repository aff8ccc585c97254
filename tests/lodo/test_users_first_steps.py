"""First steps of what people train, over averages that are singular, and where a decomposition fails."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lodo
from lodo.parts import bases
from tests.helpers.habits import assert_falls, noisy, train


@pytest.mark.parametrize("seed", range(10))
def test_an_embedding_of_which_few_rows_are_used_trains(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(256, 256), nn.Linear(256, 256))
    tokens = torch.randperm(256)[:60]
    x, y = (tokens[torch.randint(60, (512,))] for _ in range(2))
    unused = torch.ones(256, dtype=torch.bool).index_fill_(0, x.unique(), False)
    before = model[0].weight.detach().clone()
    assert_falls(train(model, lambda model: F.cross_entropy(model(x), y), 6))
    assert torch.equal(model[0].weight.detach()[unused], before[unused])


def test_a_deep_network_of_relus_trains():
    layers = [layer for _ in range(16) for layer in (nn.Linear(256, 256), nn.ReLU())]
    model, x, y = nn.Sequential(*layers, nn.Linear(256, 10)), torch.randn(64, 256), torch.randint(10, (64,))
    assert_falls(train(model, lambda model: F.cross_entropy(model(x), y), 5))


def test_images_with_pixels_that_are_always_black_train_and_their_weights_stay():
    model, y = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10)), torch.randint(10, (64,))
    x, black = torch.rand(64, 784), torch.arange(784) % 28 < 8
    x[:, black] = 0
    before = model[0].weight.detach().clone()
    assert_falls(train(model, lambda model: F.cross_entropy(model(x), y), 4))
    assert torch.equal(model[0].weight.detach()[:, black], before[:, black])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_of_one_trains(dtype, kernel):
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3)).to(dtype)
    x, y = torch.randn(1, 20, dtype=dtype), torch.randn(1, 3, dtype=dtype)
    losses = train(model, lambda model: (model(x) - y).square().mean(), 200)
    assert losses[-1] < 0.01 * losses[0]


ONE = torch.outer(torch.linspace(-1, 2, 12), torch.linspace(-1, 2, 12))
SINGULAR = {
    "zeros": torch.zeros(12, 12),
    "rank one": ONE,
    "denormal": 1e-42 * ONE,
    "tiny": 1e-36 * ONE,
    "huge": 1e30 * ONE,
    "huge, with zeros": 1e30 * torch.diag((torch.arange(12) < 3).float()),
}


@pytest.mark.parametrize("average", SINGULAR)
def test_eigenbases_of_singular_averages_are_orthogonal(average):
    average, old = SINGULAR[average], torch.linalg.qr(noisy((12, 12), 3, torch.float32))[0]
    for new in (bases.eigenvectors(average, old), bases.orthonormal(average)):
        assert new.dtype == torch.float32
        torch.testing.assert_close(new.T @ new, torch.eye(12), rtol=0, atol=1e-5)


def fails(*_, **__):
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


def nan_for_eigh(a, *_, **__):
    return torch.full_like(a[0], math.nan), torch.full_like(a, math.nan)


def test_an_average_that_is_not_finite_turns_nothing():
    for bad in (math.nan, math.inf):
        assert torch.equal(bases.orthonormal(torch.full((12, 5), bad)), torch.eye(12, 5))


@pytest.mark.parametrize("broken", [fails, nan_for_eigh])
def test_where_a_decomposition_fails_the_old_basis_is_kept_and_training_goes_on(broken, monkeypatch):
    old = torch.linalg.qr(noisy((12, 12), 3, torch.float32))[0]
    monkeypatch.setattr(torch.linalg, "eigh", broken)
    found = bases.eigenvectors(SINGULAR["rank one"], old)
    assert torch.equal(found, old)
    assert found is not old
    model, x = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), torch.randn(64, 6)
    losses = train(model, lambda model: (model(x) - x[:, :3].sin()).square().mean(), 100)
    assert losses[-1] < 0.7 * losses[0]


# ---- the first step over eigenbases ----------------------------------------------------------------------------------


def first_step_of(g):
    """Over eigenbases, in the coordinates of the singular vectors of g; there the polar factor is the identity."""
    w = nn.Parameter(torch.zeros_like(g))
    optimizer = lodo.LODO([w], lr=1, base="soap", preconditioner="identity", beta=0.0, meta_lr=0)
    w.grad = g.clone()
    optimizer.step()
    left, _, right = torch.linalg.svd(g.double())
    return -left.T @ w.detach().double() @ right.T


@pytest.mark.parametrize("rank", [8, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_the_first_step_over_eigenbases_is_the_polar_factor_of_the_gradient(dtype, tolerance, rank, kernel):
    """Coordinates that hold nothing but rounding take no step."""
    left, right = (torch.linalg.qr(noisy((8, 8), seed))[0] for seed in (0, 1))
    values = torch.arange(8.0, 0.0, -1.0, dtype=torch.float64) * (torch.arange(8) < rank)
    step = first_step_of((left @ values.diag() @ right).to(dtype))
    torch.testing.assert_close(step[:rank, :rank], torch.eye(rank).double(), rtol=0, atol=tolerance)
    assert step.norm().item() == pytest.approx(rank**0.5, abs=tolerance)


@pytest.mark.parametrize("seed", range(4))
def test_that_holds_for_gradients_some_of_whose_singular_values_are_close(seed, kernel):
    """In float64: averages in float32 do not tell their singular vectors apart."""
    step = first_step_of(noisy((32, 32), seed))
    torch.testing.assert_close(step, torch.eye(32).double(), rtol=0, atol=1e-3)
