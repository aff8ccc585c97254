"""A small model and its training, for tests of the optimizer."""

import torch
from torch import nn


def mlp(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 6, generator=generator)
    return x.to(dtype), (x[:, :3] * x[:, 3:]).to(dtype)


def train(model, optimizer, steps=30, dtype=torch.float32):
    x, y = data(dtype)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def parameters_of(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
