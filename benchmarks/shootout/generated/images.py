"""Generated tasks on scikit-learn's digits: a classifier with wrong labels, and the restoration of damaged images."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.shootout.generated.design import ANY, Batch, Choices, Design, classify, sampler
from benchmarks.shootout.generated.models import convolutional_autoencoder, convolutional_classifier, dense, start_
from benchmarks.shootout.images import digits_pixels
from benchmarks.shootout.problem import Problem, held_out, rows, share_correct
from examples.image_data import ImageData, digits


@cache
def _digits() -> ImageData:
    return digits()


@dataclass(frozen=True)
class Images(Design):
    """A classifier of scikit-learn's digits, some of whose labels are wrong."""

    form: str
    pixel_noise: float

    title = "images"
    choices: ClassVar[Choices] = {
        **ANY,
        "width": (16, 24, 32),
        "depth": (1, 2, 3),
        "batch_size": (32, 48, 64, 96),
        "norm": ("batch", "batch", "group", "layer"),
        "noise": (0.05, 0.1, 0.2),
        "form": ("convolutional", "dense"),
        "pixel_noise": (0.0, 0.2, 0.5),
    }

    @property
    def layer_width(self) -> int:
        """A dense layer may be wider than a convolution has channels."""
        return 4 * self.width if self.form == "dense" else self.width

    @property
    def kind(self) -> str:
        noise = f"{self.noise:.0%} wrong labels, pixel noise {self.pixel_noise}"
        return f"{self.form} classifier, {self.network}, {noise}"

    @property
    def milliseconds(self) -> float:
        work = 16 * self.batch_size * self.depth * self.width**2
        if self.form == "dense":
            return 0.4 + 0.2 * self.depth + 0.08e-6 * work
        return 1.0 + 0.3 * self.depth + 0.4e-6 * work + 14e-6 * work / self.width

    def data(self, seed: int) -> tuple[Batch, Batch]:
        """Images, shape (N, 64), and labels, of which those to train on are partly wrong; always the same images."""
        source = torch.Generator().manual_seed(seed + 17)
        data = _digits()
        labels = data.train_labels
        is_wrong = torch.rand(len(labels), generator=source) < self.noise
        wrong = (labels + torch.randint(1, 10, labels.shape, generator=source)) % 10
        return (data.train_images, torch.where(is_wrong, wrong, labels)), (data.test_images, data.test_labels)

    def __call__(self, seed: int, root: Path | None) -> Problem:
        train, others = self.data(seed)
        sample = sampler(train, self.batch_size)
        if self.form == "dense":
            model = dense((64, *[self.layer_width] * self.depth, 10), self.norm, self.activation)
        else:
            model = convolutional_classifier(self.width, self.depth, self.norm, self.activation)
        start_(model, self.start)

        def draw(generator: torch.Generator, step: int) -> Batch:
            images, labels = sample(generator, step)
            return images + self.pixel_noise * torch.randn(images.shape, generator=generator), labels

        return Problem(model, draw, classify, seed, validate=held_out(others, classify, share_correct))


@dataclass(frozen=True)
class Restoration(Design):
    """An autoencoder restores scikit-learn's digits under noise, or with pixels left out."""

    form: str
    damage: str
    code: int

    title = "restoration"
    choices: ClassVar[Choices] = {
        **ANY,
        "width": (16, 24, 32),
        "depth": (1, 2),
        "batch_size": (32, 48, 64, 96),
        "norm": ("none", "layer", "batch", "group"),
        "noise": (0.2, 0.3, 0.4, 0.5),
        "form": ("convolutional", "dense"),
        "damage": ("noise", "left out"),
        "code": (12, 16, 24),
    }

    @property
    def layer_width(self) -> int:
        """A dense layer may be wider than a convolution has channels."""
        return 4 * self.width if self.form == "dense" else self.width

    @property
    def kind(self) -> str:
        damage = f"noise {self.noise}" if self.damage == "noise" else f"{self.noise:.0%} of the pixels left out"
        return f"restores images, {self.form}, {self.network}, code {self.code}, {damage}"

    @property
    def milliseconds(self) -> float:
        work = 16 * self.batch_size * self.depth * self.width**2
        if self.form == "dense":
            return 0.6 + 0.4 * self.depth + 0.1e-6 * work
        return 0.8 + 0.6 * self.depth + 0.9e-6 * work

    def data(self, seed: int) -> tuple[Tensor, Tensor]:
        """Undamaged images to train on and to validate with, shape (N, 64)."""
        return digits_pixels()

    def damaged(self, images: Tensor, generator: torch.Generator) -> Batch:
        """The images with damage and without."""
        if self.damage == "noise":
            return images + self.noise * torch.randn(images.shape, generator=generator), images
        return images * (torch.rand(images.shape, generator=generator) > self.noise), images

    def __call__(self, seed: int, root: Path | None) -> Problem:
        train, others = self.data(seed)
        if self.form == "dense":
            hidden = [self.layer_width] * self.depth
            model = dense((64, *hidden, self.code, *hidden, 64), self.norm, self.activation)
        else:
            model = convolutional_autoencoder(self.width, self.depth, self.code, self.norm, self.activation)
        start_(model, self.start)

        def draw(generator: torch.Generator, step: int) -> Batch:
            return self.damaged(train[rows(generator, len(train), self.batch_size)], generator)

        def objective(model: nn.Module, batch: Batch) -> Tensor:
            return F.mse_loss(model(batch[0]), batch[1])

        damaged = self.damaged(others, torch.Generator().manual_seed(seed + 17))
        return Problem(model, draw, objective, seed, validate=held_out(damaged, objective))
