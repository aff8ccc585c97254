"""A small ResNet on CIFAR-10."""

import hashlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.larger.problem import Batch, Problem
from examples.cifar import Cifar10
from examples.image_data import CLASSES
from examples.paper.tasks.image_classification import PADDING, BasicBlock, augment, channel_moments

WIDTHS = (16, 32, 64)
HELD_OUT = 0.1  # the share of the training images, the last ones, that are held out
CHUNK = 500  # images measured at a time


class ResNet(nn.Module):
    """The ResNet for CIFAR-10 of He et al. (2016), with projections where the shape changes.

    From (count, 3, rows, columns) to logits, (count, 10).

    Args:
        depth: number of layers, 6 n + 2: a stem, three stages of n blocks of two convolutions, a linear layer.
    """

    def __init__(self, depth: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0])
        blocks = []
        inputs = WIDTHS[0]
        for stage, outputs in enumerate(WIDTHS):
            for block in range((depth - 2) // 6):
                blocks.append(BasicBlock(inputs, outputs, 2 if stage and not block else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, CLASSES)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


def name_of(data: Cifar10) -> str:
    """Tells data sets apart."""
    digest = hashlib.sha256(data.train_images.numpy().tobytes() + data.test_images.numpy().tobytes())
    return f"{len(data.train_images)} and {len(data.test_images)} images, {digest.hexdigest()[:12]}"


class Epochs:
    """Draws batches of row numbers from epochs without replacement, of which one may begin within a batch."""

    def __init__(self, count: int, batch_size: int) -> None:
        self.count, self.batch_size = count, batch_size
        self._left = torch.empty(0, dtype=torch.int64)

    def draw(self, generator: torch.Generator) -> Tensor:
        while len(self._left) < self.batch_size:
            self._left = torch.cat([self._left, torch.randperm(self.count, generator=generator)])
        picked, self._left = self._left[: self.batch_size], self._left[self.batch_size :]
        return picked


def make_resnet(seed: int, device: str, data: Cifar10, *, depth: int, batch_size: int) -> Problem:
    """Images scaled by the mean and deviation of each channel; training ones are shifted by up to 4 pixels and mirrored
    with chance 1/2. The last tenth of the training images is for validation, the test images for a last figure."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNet(depth).to(device)
    count = len(data.train_images) - round(HELD_OUT * len(data.train_images))
    mean, deviation = (moment.to(device) for moment in channel_moments(data.train_images[:count]))
    images, labels = data.train_images.to(device), data.train_labels.to(device)
    epochs = Epochs(count, batch_size)

    def scaled(raw: Tensor) -> Tensor:
        return ((raw - mean) / deviation).contiguous(memory_format=torch.channels_last)  # faster on CPUs

    def draw(generator: torch.Generator) -> Batch:
        picked = epochs.draw(generator)
        top, left = torch.randint(2 * PADDING + 1, (2, batch_size), generator=generator).to(device)
        flip = torch.randint(2, (batch_size,), generator=generator).bool().to(device)
        picked = picked.to(device)
        return scaled(augment(images[picked], top, left, flip)), labels[picked]

    def chunks(raw: Tensor, wanted: Tensor) -> list[Batch]:
        return [(scaled(x), y) for x, y in zip(raw.split(CHUNK), wanted.split(CHUNK), strict=True)]

    validation = chunks(images[count:], labels[count:])
    test = chunks(data.test_images.to(device), data.test_labels.to(device))
    hidden = [param for name, param in model.named_parameters() if param.ndim >= 2 and not name.startswith("head.")]
    return Problem(model, hidden, draw, validation, test, seed)
