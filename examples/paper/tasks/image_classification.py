"""Image classification (section 5.4): ResNet-18 on CIFAR-10."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from examples.cifar import Cifar10, cifar10
from examples.image_data import CLASSES
from examples.paper.tasks.base import Task

WIDTHS = (64, 128, 256, 512)
PADDING = 4
CHUNK = 1000  # images evaluated at a time


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm and a shortcut, projected by a 1 x 1 one where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 (He et al., 2016) for small images: a 3 x 3 stem of stride 1, no max-pooling; 11,173,962 parameters.

    From (count, 3, rows, columns) to logits, (count, 10).

    Args:
        generator: of the weights: Normal(0, 2 / fan-out) for convolutions (He et al., 2015), Normal(0, 1 / fan-in) for
            the linear layer. Biases are 0, batch norms start as the identity.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # torch's own initial weights are of no use
            self.stem = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(WIDTHS[0])
            blocks = []
            inputs = WIDTHS[0]
            for stage, outputs in enumerate(WIDTHS):
                blocks += [BasicBlock(inputs, outputs, 2 if stage else 1), BasicBlock(outputs, outputs, 1)]
                inputs = outputs
            self.blocks = nn.Sequential(*blocks)
            self.head = nn.Linear(inputs, CLASSES)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        nn.init.normal_(self.head.weight, 0, inputs**-0.5, generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


def augment(images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Pads images by 4 black pixels, cuts windows of the old size out and mirrors some of these.

    Args:
        images: (count, channels, rows, columns).
        top, left: (count,), the windows' corners in the padded images, from 0 to 8.
        flip: (count,), bool: left becomes right.
    """
    count, channels, rows, columns = images.shape
    padded = F.pad(images, (PADDING,) * 4)
    at, across = (torch.arange(size, device=images.device) for size in (rows, columns))
    across = torch.where(flip[:, None], across.flip(0), across)
    row, column = top[:, None] + at, left[:, None] + across
    image = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    return padded[image, channel, row[:, None, :, None], column[:, None, None, :]]


class ImageClassification(Task):
    """Cross entropy, in nats, the mean over a batch, plus l2 * sum of squares of the convolutions' and the linear
    layer's weights; float32.

    Images are scaled by the training set's mean and deviation of each channel. A sample is a batch of training images,
    each shifted by up to 4 pixels in both directions, with black beyond the border, and mirrored with chance 1/2.
    Batches come from epochs without replacement, of which one may begin within a batch. Batch norms see the batch, and
    the running statistics, which move in `backward` alone, in `validate`. The paper takes 3,000 steps.

    Args:
        seed: of the initial weights and of the batches.
        data_root: where `cifar10` finds CIFAR-10.
        data: in place of `data_root`.
        batch_size: 2048 in the paper.
        device: where the network and the images are.
        l2: 1e-4 in the paper.
        autocast: compute the network in bfloat16 where torch.autocast does so.
        validation_images: how many of the test set, and at most as many of the training set, `validate` looks at; None:
            the whole test set.

    Raises:
        ValueError: for an argument below its least value, neither `data_root` nor `data`, or as `cifar10`.
        FileNotFoundError: as `cifar10`.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        data_root: Path | None = None,
        data: Cifar10 | None = None,
        batch_size: int = 2048,
        device: torch.device | str = "cpu",
        l2: float = 1e-4,
        autocast: bool = False,
        validation_images: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not l2 >= 0:
            raise ValueError(f"l2 must be at least 0, got {l2}")
        if validation_images is not None and validation_images < 1:
            raise ValueError(f"validation_images must be at least 1, got {validation_images}")
        if data is None:
            if data_root is None:
                raise ValueError("data_root or data must be given")
            data = cifar10(data_root)
        self.batch_size = batch_size
        self.l2 = l2
        self.autocast = autocast
        self.device = torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)
        self.model = ResNet18(self.generator).to(self.device)
        self.params = list(self.model.parameters())
        self._names = [name for name, _ in self.model.named_parameters()]
        mean, deviation = channel_moments(data.train_images)
        self.mean, self.deviation = mean.to(self.device), deviation.to(self.device)
        self.images, self.labels = data.train_images.to(self.device), data.train_labels.to(self.device)
        evaluated = len(data.test_images) if validation_images is None else validation_images
        self.test_images = data.test_images[:evaluated].to(self.device)
        self.test_labels = data.test_labels[:evaluated].to(self.device)
        self._queue = torch.empty(0, dtype=torch.int64)  # images that the epochs begun have left
        self._picked = torch.empty(4, 0, dtype=torch.int64)  # images, top, left, flip

    def draw(self) -> None:
        while len(self._queue) < self.batch_size:
            epoch = torch.randperm(len(self.images), generator=self.generator)
            self._queue = torch.cat([self._queue, epoch])
        images, self._queue = self._queue[: self.batch_size], self._queue[self.batch_size :]
        shifts = torch.randint(2 * PADDING + 1, (2, self.batch_size), generator=self.generator)
        flip = torch.randint(2, (self.batch_size,), generator=self.generator)
        self._picked = torch.cat([images[None], shifts, flip[None]])

    def batch(self) -> tuple[Tensor, Tensor]:
        """The current sample: augmented images, (batch size, 3, 32, 32), uint8, and labels, (batch size,).

        Raises:
            RuntimeError: before the first `draw`.
        """
        if self._picked.numel() == 0:
            raise RuntimeError("there is no sample before the first draw()")
        images, top, left, flip = self._picked.to(self.device)
        return augment(self.images[images], top, left, flip.bool()), self.labels[images]

    def loss(self, params: Sequence[Tensor]) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}  # thrown away
        return self._loss(params, buffers)

    def backward(self) -> float:
        """As in the base class; the batch norms' running statistics move."""
        for param in self.params:
            param.grad = None
        loss = self._loss(self.params, {})
        loss.backward()
        return loss.item()

    def _loss(self, params: Sequence[Tensor], buffers: dict[str, Tensor]) -> Tensor:
        images, labels = self.batch()
        cross_entropy = F.cross_entropy(self._logits(images, params, buffers), labels)
        return cross_entropy + self.l2 * torch.stack([p.square().sum() for p in params if p.dim() > 1]).sum()

    def _logits(self, images: Tensor, params: Sequence[Tensor], buffers: dict[str, Tensor]) -> Tensor:
        """Logits of uint8 images. Where no buffers are given, the model's own move with the batch in training mode."""
        dtype = params[0].dtype
        scaled = (images.to(dtype) - self.mean.to(dtype)) / self.deviation.to(dtype)
        scaled = scaled.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits = functional_call(self.model, dict(zip(self._names, params, strict=True)) | buffers, (scaled,))
        return logits.to(dtype)

    def validate(self) -> dict[str, float]:
        """Cross entropy without the L2 term and accuracy of the test set and of as many training images, plain ones."""
        count = len(self.test_images)
        test_loss, test_accuracy = self._evaluate(self.test_images, self.test_labels)
        train_loss, train_accuracy = self._evaluate(self.images[:count], self.labels[:count])
        return {
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
        }

    @torch.no_grad()
    def _evaluate(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """Mean cross entropy and accuracy."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.model.eval()
        try:
            for x, y in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
                logits = self._logits(x, self.params, {})
                loss = F.cross_entropy(logits, y, reduction="sum")
                totals += torch.stack([loss, (logits.argmax(1) == y).sum()])
        finally:
            self.model.train()
        loss, accuracy = (totals / len(images)).tolist()
        return loss, accuracy

    def state_dict(self) -> dict[str, Any]:
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return super().state_dict() | {
            "buffers": buffers,
            "queue": self._queue.clone(),
            "picked": self._picked.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.model.load_state_dict(state["buffers"], strict=False)
        self._queue, self._picked = state["queue"].clone(), state["picked"].clone()


def channel_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, (channels, 1, 1), float32, of uint8 (count, channels, rows, columns)."""
    # from the counts of the 256 values: as floats, the training set would take 600 MB
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    values = torch.arange(256, dtype=torch.float64, device=images.device)
    mean = counts @ values / counts.sum(1)
    deviation = (counts @ values.square() / counts.sum(1) - mean.square()).clamp(min=1e-12).sqrt()
    return mean.float().view(-1, 1, 1), deviation.float().view(-1, 1, 1)
