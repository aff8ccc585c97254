"""What the tests of `lodo.AutoLODO` in users' hands share: noisy targets to follow, and what must stay finite."""

import math

import torch

import lodo


def floating(value):
    """The floating tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict | list | tuple):
        return [each for item in (value.values() if isinstance(value, dict) else value) for each in floating(item)]
    return []


def assert_finite(optimizer):
    params = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    assert all(bool(tensor.isfinite().all()) for tensor in floating([params, optimizer.state_dict()["state"]]))


def noisy(shape, step, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def follow(optimizer, w, target, begin, end, noise=0.3):
    """Steps along w - target, with noise; yields the number of the step after each."""
    for step in range(begin, end):
        w.grad = w.detach() - target + noise * noisy(w.shape, step, w.dtype)
        optimizer.step()
        yield step


def train(model, loss_of, steps, **options):
    optimizer = lodo.AutoLODO(model.parameters(), **options)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert_finite(optimizer)
    assert optimizer.skipped_steps == 0
    return losses


def assert_falls(losses):
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
