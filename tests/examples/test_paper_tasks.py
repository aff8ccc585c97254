"""The bowl and Rosenbrock's function: gradients, Hessians, the floor, the noise, resuming."""

import math

import numpy as np
import pytest
import torch

import lodo
from examples.paper.tasks import NoisyBowl, Rosenbrock, make_task


def directional_difference(task, direction, size=1e-6):
    """The derivative of the present sample's loss along `direction`, by central differences."""
    with torch.no_grad():
        ahead, behind = (task.loss([task.params[0] + sign * size * direction]) for sign in (1, -1))
    return float(ahead - behind) / (2 * size)


@pytest.fixture(params=["bowl", "rosenbrock"])
def task(request):
    task = make_task(request.param, 3, {}, device="cpu", data_root=None)
    for _ in range(3):
        task.draw()
    with torch.no_grad():
        task.params[0].add_(torch.randn(len(task.params[0]), generator=torch.Generator().manual_seed(0)))
    return task


def test_gradient_against_finite_differences(task):
    direction = torch.randn(len(task.params[0]), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = task.backward()
    assert loss == pytest.approx(float(task.loss(task.params).detach()), rel=1e-12)
    assert float(task.params[0].grad @ direction) == pytest.approx(directional_difference(task, direction), rel=1e-6)


def test_hessian_against_finite_differences_of_the_gradient(task):
    x = task.params[0]
    direction = torch.randn(len(x), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    product = task.hessian()(direction)
    gradients = []
    for sign in (1e-6, -2e-6):
        with torch.no_grad():
            x.add_(sign * direction)
        task.backward()
        gradients.append(x.grad.clone())
    torch.testing.assert_close(product, (gradients[0] - gradients[1]) / 2e-6, rtol=1e-6, atol=1e-6)


def test_bowl_is_the_papers():
    task = NoisyBowl(0)
    eigenvalues = torch.linalg.eigvalsh(task.h)
    expected = torch.from_numpy(np.exp(np.linspace(np.log(1e-3), 0, 100)))
    torch.testing.assert_close(eigenvalues, expected, rtol=1e-9, atol=1e-12)
    assert task.params[0].dtype == torch.float64
    assert not task.params[0].any()
    assert not task.center.any()
    assert task.floor == pytest.approx(7.412, abs=5e-4)
    assert task.floor == pytest.approx(0.5 * float(task.h.trace()))


@pytest.mark.parametrize("noise", [1.0, 0.5])
def test_newton_reaches_the_floor(noise):
    """With the true inverse Hessian every step lands on the last centre: the next loss is one step's of the centre."""
    task = NoisyBowl(1, noise=noise)
    optimizer = lodo.LODO(
        task.params,
        lr=1.0,
        meta_lr=0.0,
        beta=0.0,
        preconditioner=inverse_as_network(task),
    )
    losses = []
    for _ in range(1500):
        task.draw()
        losses.append(task.backward())
        optimizer.step()
    deviation = noise**2 * math.sqrt(0.5 * float((task.eigenvalues**2).sum()) / len(losses))
    assert np.mean(losses) == pytest.approx(task.floor, abs=4 * deviation)


def inverse_as_network(task):
    """U = H^-1/2 as a network of one layer with one block of the whole size: U^T U = H^-1."""
    values, vectors = torch.linalg.eigh(task.h)
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    size = len(root)
    return lodo.BlockPermutation(root.reshape(1, 1, size, size), torch.arange(size).reshape(1, size), size)


def test_noise_is_the_centres_and_seeds_fix_it():
    def centres(task):
        steps = []
        for _ in range(3000):
            before = task.center.clone()
            task.draw()
            steps.append(task.center - before)
        return torch.stack(steps)

    steps = centres(NoisyBowl(0, noise=2.0, size=5))
    assert float(steps.std()) == pytest.approx(2.0, rel=0.05)
    assert float(steps.mean()) == pytest.approx(0.0, abs=0.1)
    torch.testing.assert_close(centres(NoisyBowl(0, noise=2.0, size=5)), steps, rtol=0, atol=0)
    sibling = NoisyBowl(0, noise=2.0, size=5).sibling(1)
    torch.testing.assert_close(sibling.h, NoisyBowl(0, size=5).h, rtol=0, atol=0)
    assert not torch.equal(centres(sibling), steps)


def test_bowl_goes_on_from_its_state():
    def losses(task, count):
        out = []
        for _ in range(count):
            task.draw()
            out.append(task.backward())
            with torch.no_grad():
                task.params[0].sub_(0.1 * task.params[0].grad)
        return out

    whole, first, second = NoisyBowl(4), NoisyBowl(4), NoisyBowl(4)
    expected = losses(whole, 2100)
    assert losses(first, 1000) == expected[:1000]
    second.load_state_dict(first.state_dict())
    assert losses(second, 1100) == expected[1000:]


def test_rosenbrock_is_the_papers():
    task = Rosenbrock()
    assert task.params[0].tolist() == [-0.5, 2.0]
    assert float(task.loss(task.params).detach()) == pytest.approx(0.01 * 1.5**2 + 1.75**2)
    assert float(task.loss([torch.ones(2, dtype=torch.float64)])) == 0.0
    with pytest.raises(NotImplementedError, match="Rosenbrock has no siblings"):
        task.sibling(0)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("bowl", {"size": 0}, "size must be at least 1, got 0"),
        ("bowl", {"noise": 0.0}, "noise must be above 0, got 0"),
        ("dish", {}, "task must be one of bowl, .*, got 'dish'"),
        ("generation", {}, "--data-root"),
    ],
)
def test_bad_arguments(name, options, match):
    with pytest.raises(ValueError, match=match):
        make_task(name, 0, options, device="cpu", data_root=None)
