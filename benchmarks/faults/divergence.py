"""Trainings whose inner learning rate, or whose lr, is ten times too large, with and without LODO's two bounds."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lodo
from examples.image_data import digits

STEPS = 500
RATES = {
    "meta_lr ten times too large": {"lr": 1.0, "meta_lr": 0.03},
    "lr ten times too large": {"lr": 30.0, "meta_lr": 0.003},
}
BOUNDS: dict[str, dict[str, float]] = {
    "no bound": {},
    "max_step_norm=0.01": {"max_step_norm": 0.01},
    "max_condition=100": {"max_condition": 100.0},
    "both": {"max_step_norm": 0.01, "max_condition": 100.0},
}
SEEDS = 10
CHANCE = math.log(10)  # the loss of a classifier that has learned nothing


def cases() -> list[str]:
    return [f"{rates}; {bound}; {seed}" for rates in RATES for bound in BOUNDS for seed in range(SEEDS)]


def run(name: str) -> dict[str, Any]:
    """The loss over the whole training set after the last step; None where it is no number any more."""
    rates, bound, seed = name.split("; ")
    loss = final_loss(int(seed), STEPS, **RATES[rates], **BOUNDS[bound])
    return {"final loss": loss if math.isfinite(loss) else None, "diverged": not loss < CHANCE}


def final_loss(seed: int, steps: int, **options: Any) -> float:
    """Trains a classifier of handwritten digits with a lean network."""
    data = digits()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    lean: dict[str, Any] = {"depth": 4, "expansion": 1, "permutation": "shuffle"}
    optimizer = lodo.LODO(model.parameters(), **lean, **options)
    for _ in range(steps):
        picked = torch.randint(len(data.train_images), (64,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(data.train_images[picked]), data.train_labels[picked]).backward()
        optimizer.step()
    return cross_entropy(model(data.train_images), data.train_labels).item()
