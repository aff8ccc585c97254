"""What the kinds of generated tasks share: how a design is drawn, and what a task is made of."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.shootout.generated.models import ACTIVATIONS, STARTS
from benchmarks.shootout.problem import Problem, Task, rows

MILLISECONDS = 4000  # that a run is to take, as far as `Design.milliseconds` is right
FEWEST, MOST = 1000, 5000  # steps

Batch = tuple[Tensor, Tensor]
Draw = Callable[[torch.Generator, int], Batch]
Choices = Mapping[str, tuple[Any, ...]]
Option = TypeVar("Option")
ANY: Choices = {"activation": tuple(ACTIVATIONS), "start": tuple(STARTS)}


def _pick(random: Random, options: tuple[Option, ...]) -> Option:
    """`random()` is the one method whose numbers Python promises to keep."""
    return options[int(random.random() * len(options))]


def classify(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the labels, shape (...), under logits of shape (..., classes)."""
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def sampler(data: Batch, batch_size: int) -> Draw:
    """Draws rows of two tensors with as many rows."""

    def draw(generator: torch.Generator, step: int) -> Batch:
        picks = rows(generator, len(data[0]), batch_size)
        return data[0][picks], data[1][picks]

    return draw


@dataclass(frozen=True)
class Design:
    """What is drawn of a task; called with a seed, as `Task.make` is, it makes the problem.

    Attributes:
        noise: in the data; what it is the size of differs from kind to kind.
        title: the kind's name.
        choices: of each field, what it is drawn from.
        is_finite: training sees the same data again and again.
    """

    width: int
    depth: int
    batch_size: int
    norm: str
    activation: str
    start: str
    noise: float

    title: ClassVar[str]
    choices: ClassVar[Choices]
    is_finite: ClassVar[bool] = True

    @classmethod
    def drawn(cls, seed: int) -> "Design":
        """Of random numbers of its own, so that a kind that changes leaves the others as they were."""
        random = Random(f"{cls.title} {seed}")
        return cls(**{name: _pick(random, options) for name, options in sorted(cls.choices.items())})

    @property
    def layer_width(self) -> int:
        return self.width

    @property
    def network(self) -> str:
        """What all kinds have, in words."""
        norm = "no norm" if self.norm == "none" else f"{self.norm} norm"
        shape = f"{self.depth} x {self.layer_width}"
        return f"{shape}, {norm}, {self.activation}, {self.start} start, batch {self.batch_size}"

    @property
    @abstractmethod
    def kind(self) -> str:
        """What was drawn, in words."""

    @property
    @abstractmethod
    def milliseconds(self) -> float:
        """What a step of AdamW takes, roughly, on one thread: fitted to what was measured at 40 seeds."""

    @property
    def steps(self) -> int:
        """Of a run, in whole hundreds."""
        return min(max(round(MILLISECONDS / self.milliseconds / 100) * 100, FEWEST), MOST)

    @abstractmethod
    def __call__(self, seed: int, root: Path | None) -> Problem:
        """The problem at a seed, with global random numbers already seeded."""

    def as_task(self, name: str) -> Task:
        """Every kind has matrices and held-out data; none needs MNIST."""
        return Task(name, self.kind, self.steps, self, "sealed", has_finite_data=self.is_finite)
