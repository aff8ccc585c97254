"""Tasks on images of digits: classifiers on scikit-learn's and on MNIST, and a deep autoencoder."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.shootout.problem import SELECTING, Problem, Validate, held_out, rows, share_correct
from examples.image_data import ImageData, digits, mnist

Batch = tuple[Tensor, Tensor]
PIXEL_NOISE = 0.5  # of the digits, on which a network would fit every image exactly
HELD_OUT = 2000  # of MNIST's test images: the first ones to choose settings by, the next ones to report
SCALES = (1e-2, 1e2, 1e-1, 10.0)  # of the layers of the scaled network


@cache
def _digits() -> ImageData:
    return digits()


@cache
def _mnist(root: Path) -> ImageData:
    return mnist(root)


@cache
def _small_mnist(root: Path) -> tuple[Tensor, Tensor]:
    """MNIST's images at 14 x 14 pixels, to train on and to validate with."""
    data = _mnist(root)
    every = (data.train_images, data.test_images)
    train, others = (F.avg_pool2d(images.view(-1, 1, 28, 28), 2) for images in every)
    return train, others


@cache
def _mnist_pixels(root: Path) -> tuple[Tensor, Tensor]:
    """MNIST's images as rows in [0, 1], to train on and to validate with."""
    data = _mnist(root)
    return _pixels(data, data.train_images), _pixels(data, data.test_images)


def _images(root: Path | None) -> ImageData:
    assert root is not None  # Task.build has seen to that
    return _mnist(root)


def _mlp(sizes: Sequence[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layers += [nn.Linear(wide, narrow), activation()]
    return nn.Sequential(*layers[:-1])


def _classify(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _held_out(images: Tensor, labels: Tensor) -> Validate:
    """Of a classifier, on images without noise."""
    return held_out((images, labels), _classify, share_correct)


def _part(seed: int) -> slice:
    """The test images of MNIST that a run validates with."""
    return slice(0, HELD_OUT) if seed >= SELECTING else slice(HELD_OUT, 2 * HELD_OUT)


def _sampler(
    images: Tensor, labels: Tensor, batch_size: int, noise: float = 0.0
) -> Callable[[torch.Generator, int], Batch]:
    def draw(generator: torch.Generator, step: int) -> Batch:
        picks = rows(generator, len(images), batch_size)
        batch = images[picks]
        return batch + noise * torch.randn(batch.shape, generator=generator) if noise else batch, labels[picks]

    return draw


def digits_mlp(seed: int, root: Path | None) -> Problem:
    """64-128-64-10, ReLU, on scikit-learn's digits with fresh noise on the pixels; batches of 128."""
    data = _digits()
    draw = _sampler(data.train_images, data.train_labels, 128, PIXEL_NOISE)
    validate = _held_out(data.test_images, data.test_labels)
    return Problem(_mlp((64, 128, 64, 10), nn.ReLU), draw, _classify, seed, validate=validate)


def mnist_mlp(seed: int, root: Path | None) -> Problem:
    """784-64-32-10, ReLU; batches of 128."""
    data = _images(root)
    draw = _sampler(data.train_images, data.train_labels, 128)
    validate = _held_out(data.test_images[_part(seed)], data.test_labels[_part(seed)])
    return Problem(_mlp((784, 64, 32, 10), nn.ReLU), draw, _classify, seed, validate=validate)


def mnist_cnn(seed: int, root: Path | None) -> Problem:
    """Two convolutions with pooling and a linear layer on MNIST at 14 x 14 pixels; batches of 64."""
    data = _images(root)
    assert root is not None
    images, others = _small_mnist(root)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 3 * 3, 10),
    )
    validate = _held_out(others[_part(seed)], data.test_labels[_part(seed)])
    return Problem(model, _sampler(images, data.train_labels, 64), _classify, seed, validate=validate)


def autoencoder(seed: int, root: Path | None) -> Problem:
    """784-96-48-12-48-96-784, tanh, cross-entropy of the pixels, summed over an image; batches of 128.

    Layers start orthogonal, which passes signals on through the tanh layers, and the last bias at the mean pixel's
    logit: else the first part of a run goes to finding the mean image.
    """
    assert root is not None
    pixels, others = _mnist_pixels(root)
    model = _mlp((784, 96, 48, 12, 48, 96, 784), nn.Tanh)
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    for layer in linear:
        nn.init.orthogonal_(layer.weight, gain=1.2)
        nn.init.zeros_(layer.bias)
    mean = pixels.mean(0).clamp(1e-3, 1 - 1e-3)
    with torch.no_grad():
        linear[-1].bias.copy_(torch.log(mean / (1 - mean)))
        linear[0].bias.copy_(-linear[0].weight @ mean)

    def draw(generator: torch.Generator, step: int) -> Tensor:
        return pixels[rows(generator, len(pixels), 128)]

    def objective(model: nn.Module, batch: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch), batch, reduction="sum") / len(batch)

    return Problem(model, draw, objective, seed, validate=held_out(others[_part(seed)], objective))


def digits_pixels() -> tuple[Tensor, Tensor]:
    """The images of scikit-learn's digits to train on and to validate with, shape (images, 64), in [0, 1]."""
    data = _digits()
    return _pixels(data, data.train_images), _pixels(data, data.test_images)


def _pixels(data: ImageData, images: Tensor) -> Tensor:
    """Back to [0, 1]: the standardised training images' darkest pixel is black, the brightest white."""
    low, high = data.train_images.min(), data.train_images.max()
    return (images - low) / (high - low)


class ScaledLinear(nn.Module):
    """y = scale * W x + b, with W so small or large at the start that the scale changes nothing but its gradient."""

    def __init__(self, inputs: int, outputs: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * math.sqrt(2 / inputs) / scale)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.weight) * self.scale + self.bias


def scaled_mlp(seed: int, root: Path | None) -> Problem:
    """64-64-64-64-10, ReLU, whose layers are scaled by 1e-2, 1e2, 1e-1 and 10; digits with noise, batches of 128."""
    data = _digits()
    layers: list[nn.Module] = []
    for inputs, outputs, scale in zip((64, 64, 64, 64), (64, 64, 64, 10), SCALES, strict=True):
        layers += [ScaledLinear(inputs, outputs, scale), nn.ReLU()]
    draw = _sampler(data.train_images, data.train_labels, 128, PIXEL_NOISE)
    return Problem(
        nn.Sequential(*layers[:-1]), draw, _classify, seed, validate=_held_out(data.test_images, data.test_labels)
    )
