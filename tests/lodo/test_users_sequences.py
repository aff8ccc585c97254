"""Drawn sequences of what people do between steps, each held for a while, on a small regression beside AdamW."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("hypothesis")

from hypothesis import example, given, settings
from hypothesis import strategies as st

import lodo
from tests.helpers import strategies as draw

LR, SMALLEST, LARGEST = 1e-3, 1e-6, 1e-2
QUIET = 60  # steps at the end, with nothing done
FLOOR = 0.01  # a loss that is good enough whatever AdamW's
UNUSED = 3  # an input that is always zero
few = settings(max_examples=max(1, 3 * settings().max_examples // 10))

which = st.integers(0, 3)
powers = st.integers(-6, 6)
ACTIONS: dict[str, st.SearchStrategy[Any]] = {
    "clamp": st.sampled_from((0.0, 0.02, 0.3)),
    "unit rows": st.sampled_from((0.1, 1.0)),
    "freeze": which,
    "no gradient": which,
    "mask": draw.seeds,
    "average": st.booleans(),
    "lr": st.integers(-3, 3),
    "loss": powers,
    "reload": st.none(),
    "new group": st.none(),
    "new data": st.sampled_from((1.0, 0.5)),
    "zero": st.none(),
}
actions = st.sampled_from(sorted(ACTIONS)).flatmap(
    lambda name: st.tuples(st.just(name), ACTIONS[name], st.integers(10, 30))
)
sequences = st.lists(actions, min_size=1, max_size=7)


def tensors_in(value):
    """The floating ones in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict | list | tuple):
        return [each for item in (value.values() if isinstance(value, dict) else value) for each in tensors_in(item)]
    return []


class Training:
    """A model, its optimizer, and a user who does things between steps."""

    def __init__(self, make):
        self.generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 2))
        self.params = list(self.model.parameters())
        self.extra = nn.Parameter(torch.zeros(2))
        self.optimizer = make(self.params)
        self.averages = [p.detach().clone() for p in self.params]
        self.x, self.y = self.batch(256)
        self.has_moved = {p: torch.zeros_like(p, dtype=torch.bool) for p in (*self.params, self.extra)}

    def batch(self, size):
        x = torch.randn(size, 5, generator=self.generator)
        x[:, UNUSED] = 0
        return x, torch.stack(((x[:, 0] * x[:, 1]).tanh(), x[:, 2].sin()), 1) + 0.5

    def loss(self, x, y):
        return (self.model(x) + self.extra - y).square().mean()

    def final_loss(self):
        with torch.no_grad():
            return self.loss(self.x, self.y).item()

    def step(self, lr=LR, scale=1.0, is_zero=False, without=None):
        """One step; what has never had a gradient must not move in it."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        self.extra.grad = None
        (self.loss(*self.batch(32)) * scale).backward()
        own = [p for group in self.optimizer.param_groups for p in group["params"]]
        if without is not None:
            self.params[without].grad = None
        for p in own:
            if p.grad is not None:
                if is_zero:
                    p.grad.zero_()
                self.has_moved[p] |= p.grad != 0
        before = [p.detach().clone() for p in own]
        self.optimizer.step()
        for p, was in zip(own, before, strict=True):
            same = p.detach() == was
            assert bool((same | self.has_moved[p]).all()), "moved without ever a gradient"
            assert p.grad is not None or bool(same.all()), "moved without a gradient now"
        for average, p in zip(self.averages, self.params, strict=True):
            average.lerp_(p.detach(), 0.1)
        assert all(bool(each.isfinite().all()) for each in tensors_in([own, list(self.optimizer.state.values())]))

    def act(self, name, value, length):
        weight, options = self.model[0].weight, {}
        if name == "freeze":
            self.params[value].requires_grad_(False)
        elif name == "no gradient":
            options["without"] = value
        elif name == "lr":
            options["lr"] = min(max(LR * 10.0**value, SMALLEST), LARGEST)
        elif name == "loss":
            options["scale"] = 10.0**value
        elif name == "zero":
            options["is_zero"], length = True, 20
        elif name == "reload":
            self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        elif name == "new group" and len(self.optimizer.param_groups) == 1:
            self.optimizer.add_param_group({"params": [self.extra]})
        elif name == "new data":
            for p in self.params:
                p.data = p.data * value
        mask = draw.numbers(tuple(weight.shape), value, torch.float32) > 0 if name == "mask" else None
        for _ in range(length):
            self.step(**options)
            with torch.no_grad():
                if name == "clamp":
                    weight.clamp_(-value, value)
                elif name == "unit rows":
                    weight.mul_(value / weight.norm(dim=1, keepdim=True).clamp(min=1e-6))
                elif name == "mask":
                    weight.mul_(mask)
                elif name == "average":
                    self.swap()
                    self.loss(self.x, self.y)
                    self.swap()
        if name == "average" and value:  # trains on from there
            self.swap()
        for p in self.params:
            p.requires_grad_(True)

    def swap(self):
        for average, p in zip(self.averages, self.params, strict=True):
            kept = p.detach().clone()
            p.data.copy_(average)
            average.copy_(kept)


def end_of(make, sequence):
    training = Training(make)
    for action in sequence:
        training.act(*action)
    for _ in range(QUIET):
        training.step()
    return training.final_loss()


def lodo_of(base):
    return lambda params: lodo.AutoLODO(params, lr=LR, base=base)


def adamw(params):
    return torch.optim.AdamW(params, lr=LR, weight_decay=0.0)


@few
@given(sequence=sequences, kernel=draw.kernels, base=st.sampled_from(("soap", "soap", "adam")))
@example(sequence=[("clamp", 0.02, 30), ("loss", 6, 30), ("loss", -6, 30)], kernel="reference", base="soap")
@example(sequence=[("lr", -3, 30), ("lr", 3, 30), ("zero", None, 20)], kernel="reference", base="soap")
@example(
    sequence=[("freeze", 0, 30), ("mask", 0, 30), ("new group", None, 20), ("reload", None, 10)],
    kernel="reference",
    base="adam",
)
def test_whatever_people_do_between_steps_it_trains_on_as_adamw_does(sequence, kernel, base):
    expected = end_of(adamw, sequence)
    with draw.running(kernel):
        found = end_of(lodo_of(base), sequence)
    assert found <= max(3 * expected, FLOOR), (found, expected)
