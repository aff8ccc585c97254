"""A preconditioner's hypergradient against autograd."""

import torch

from lodo import inner_optimizer
from tests.helpers.oracle import in_paper_layout, learned, matvec

# Rates with which the inner Adam's M becomes h itself and theta stays.
READ_OUT = inner_optimizer.Rates(step_size=0.0, forget1=1.0, keep2=0.0, forget2=1.0, count=1)


def hypergradient(g, gradient, momentum, lr):
    moments = inner_optimizer.start_moments(g.theta)
    before = g.theta.clone()
    g.learn_(gradient, momentum, lr, moments, READ_OUT)
    assert torch.equal(g.theta, before)
    torch.testing.assert_close(moments[1], moments[0] ** 2, rtol=1e-12, atol=0)
    return in_paper_layout(g, moments[0])


def check_hypergradient(g, lr=0.7):
    """h = d f(x - lr G(theta) m) / d theta for a function f that is no quadratic."""
    x, momentum = torch.randn(2, g.size, dtype=torch.float64)
    theta = learned(g).requires_grad_()
    landed = x - lr * matvec(g, theta, momentum)
    y = landed.detach().requires_grad_()
    (y.sin().sum() + (y**4).mean()).backward()
    found = hypergradient(g, y.grad, momentum, lr)
    if landed.requires_grad:  # a network without layers has nothing to learn
        landed.backward(y.grad)
    expected = torch.zeros_like(theta) if theta.grad is None else theta.grad
    error = torch.linalg.vector_norm(found - expected)
    assert error <= 1e-10 * torch.linalg.vector_norm(expected)
