"""Generated tasks on rows of a table: a noisy regression, and a retrieval with two towers."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.shootout.generated.design import ANY, Batch, Choices, Design, sampler
from benchmarks.shootout.generated.models import Towers, dense, start_
from benchmarks.shootout.problem import Problem, held_out

HELD_OUT = 1000  # points of the regression
FEATURES, TASTES = 8, 4  # numbers that an item has, and that a user likes or dislikes in it
CHOSEN, CHOSEN_HELD_OUT = 25, 2  # items of each user


@dataclass(frozen=True)
class Regression(Design):
    """A network learns noisy values of a random teacher at few points, so that it can learn the noise by heart."""

    inputs: int
    outputs: int
    count: int
    loss: str

    title = "regression"
    choices: ClassVar[Choices] = {
        **ANY,
        "width": (32, 48, 64, 96),
        "depth": (2, 3),
        "batch_size": (32, 48, 64, 96, 128),
        "norm": ("none", "layer", "batch", "group", "RMS"),
        "noise": (0.1, 0.2, 0.3, 0.5),
        "inputs": (8, 12, 16, 24),
        "outputs": (1, 2, 4),
        "count": (1000, 2000, 4000),
        "loss": ("squared", "Huber"),
    }

    @property
    def kind(self) -> str:
        return f"noisy regression, {self.loss} loss, {self.network}, {self.count} rows, noise {self.noise}"

    @property
    def milliseconds(self) -> float:
        work = self.batch_size * self.depth * self.width**2
        return 0.35 + (0.1 if self.norm == "none" else 0.2) * self.depth + 0.08e-6 * work

    def data(self, seed: int) -> tuple[Batch, Batch]:
        """Points and values to train on, of mean 0 and variance 1 but for the noise, and others without noise."""
        source = torch.Generator().manual_seed(seed + 17)
        first = 2 * torch.randn(self.inputs, 16, generator=source) / self.inputs**0.5
        last = torch.randn(16, self.outputs, generator=source)
        points = torch.randn(self.count + HELD_OUT, self.inputs, generator=source)
        values = torch.tanh(points @ first) @ last
        values = (values - values[: self.count].mean(0)) / values[: self.count].std(0)
        noisy = values[: self.count] + self.noise * torch.randn(self.count, self.outputs, generator=source)
        return (points[: self.count], noisy), (points[self.count :], values[self.count :])

    def __call__(self, seed: int, root: Path | None) -> Problem:
        train, others = self.data(seed)
        model = dense((self.inputs, *[self.width] * self.depth, self.outputs), self.norm, self.activation)
        start_(model, self.start)
        distance = F.mse_loss if self.loss == "squared" else F.smooth_l1_loss

        def objective(model: nn.Module, batch: Batch) -> Tensor:
            return distance(model(batch[0]), batch[1])

        validate = held_out(others, objective)
        return Problem(model, sampler(train, self.batch_size), objective, seed, validate=validate)


@dataclass(frozen=True)
class Retrieval(Design):
    """Two towers learn which items users choose, each pair of a batch against its other items (InfoNCE)."""

    users: int
    items: int
    code: int
    sharpness: float

    title = "retrieval"
    choices: ClassVar[Choices] = {
        **ANY,
        "width": (32, 48, 64),
        "depth": (1, 2, 3),
        "batch_size": (24, 32, 48, 64),
        "norm": ("none", "layer", "RMS"),
        "noise": (0.0, 0.05, 0.1),
        "users": (200, 300, 500),
        "items": (400, 600, 800),
        "code": (8, 16, 24),
        "sharpness": (8.0, 12.0),
    }

    @property
    def kind(self) -> str:
        data = f"{self.users} users, {self.items} items, {self.noise:.0%} at random"
        return f"retrieval, two towers, InfoNCE x {self.sharpness:g}, {self.network}, code {self.code}, {data}"

    @property
    def milliseconds(self) -> float:
        work = self.batch_size * self.depth * self.width**2
        return 0.9 + (0.1 if self.norm == "none" else 0.2) * self.depth + 0.2e-6 * work

    def features(self, seed: int) -> Tensor:
        """Of the items, shape (items, FEATURES)."""
        return torch.randn(self.items, FEATURES, generator=torch.Generator().manual_seed(seed + 19))

    def data(self, seed: int) -> tuple[Batch, Batch]:
        """Users and items of the pairs to train on, shape (users * CHOSEN,), and of other pairs of the same users."""
        source = torch.Generator().manual_seed(seed + 17)
        features = self.features(seed)
        views = torch.tanh(features @ torch.randn(FEATURES, TASTES, generator=source) / 2)
        tastes = 3 * torch.randn(self.users, TASTES, generator=source) @ views.T
        chance = (1 - self.noise) * torch.softmax(tastes, 1) + self.noise / self.items
        # Without replacement, so that no pair is there twice; shuffled, for the first ones drawn are the likely ones.
        items = torch.multinomial(chance, CHOSEN + CHOSEN_HELD_OUT, generator=source)
        items = items.gather(1, torch.rand(items.shape, generator=source).argsort(1))
        users = torch.arange(self.users)[:, None].expand_as(items)
        pairs = [(users[:, part].flatten(), items[:, part].flatten()) for part in (slice(CHOSEN), slice(CHOSEN, None))]
        return pairs[0], pairs[1]

    def __call__(self, seed: int, root: Path | None) -> Problem:
        train, others = self.data(seed)
        shape = (self.code, self.width, self.depth, self.norm, self.activation)
        model = Towers(self.features(seed), self.users, *shape, self.sharpness)
        start_(model, self.start)

        def logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            """Of every user of a batch with every item, and where the user's own item is among these."""
            found = model(*batch)
            return found, torch.arange(found.shape[-1]).expand(found.shape[:-1])

        def objective(model: nn.Module, batch: Batch) -> Tensor:
            found, right = logits(model, batch)
            return F.cross_entropy(found.flatten(0, -2), right.flatten())

        def accuracy(model: nn.Module, batch: Batch) -> Tensor:
            found, right = logits(model, batch)
            return (found.argmax(-1) == right).double().mean()

        # In batches as they are in training, since the loss is of how many items there are to choose from.
        order = torch.randperm(len(others[0]), generator=torch.Generator().manual_seed(seed + 23))
        order = order[: len(order) // self.batch_size * self.batch_size].view(-1, self.batch_size)
        batches = (others[0][order], others[1][order])
        validate = held_out(batches, objective, accuracy)
        return Problem(model, sampler(train, self.batch_size), objective, seed, validate=validate)
