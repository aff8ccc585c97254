"""Autoregressive image generation (section 5.3): predict one pixel of an MNIST image from those before it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from examples.image_data import Bytes, ImageBytes, check_mnist, mnist_bytes
from examples.paper.tasks.base import Task

SIDE = 28  # of MNIST's images
COUNTS = (60_000, 10_000)  # of MNIST's training and test images
VALUES = 256  # of a pixel
CHANNELS = 5  # of the network's input
WIDTH, EXPANDED, MULTIPLIER = 20, 40, 3
STAGES, BLOCKS = 5, 4
# Images of which a CPU computes the gradient at once: at a batch of 256 that takes 0.8 times as long as all at once
# (2 cores), as memory is reused while it is warm, and a quarter of the memory.
GRADIENT_CHUNK = 64
# Rows that are evaluated at once. Accelerators need more of them to be busy.
CHUNK, ACCELERATOR_CHUNK = 512, 4096


def load(root: Path) -> ImageBytes:
    """MNIST, as `mnist_bytes` reads it, all of it.

    Raises:
        FileNotFoundError: saying which files to put where.
        ValueError: for damaged files, if these are not MNIST's 60,000 and 10,000 images of 28 x 28 pixels, or if the
            checksum of a gzipped one is not the official one.
    """
    data = mnist_bytes(root)
    for name, images, count in zip(("training", "test"), (data.train_images, data.test_images), COUNTS, strict=True):
        if images.shape != (count, SIDE, SIDE):
            found = " x ".join(map(str, images.shape))
            raise ValueError(f"MNIST in {root}: the {name} images must be {count} x {SIDE} x {SIDE}, they are {found}")
    check_mnist(root)
    return data


def inputs(images: Tensor, positions: Tensor) -> Tensor:
    """What the network sees when it is asked for one pixel of each image.

    The channels: the pixels over 256 where visible, that is before the queried one in raster order, else 0; +1 up to
    the queried pixel's column, else -1; +1 where visible, else -1; the rows' and the columns' coordinates from -1 to
    below 1.

    Args:
        images: (count, rows, columns), uint8.
        positions: (count,), of the queried pixels in raster order.

    Returns:
        (count, 5, rows, columns), float32, with the channels innermost in memory.
    """
    rows, columns = images.shape[1:]
    cells = torch.arange(rows * columns, device=images.device).view(rows, columns)
    queried = positions.view(-1, 1, 1)
    visible = cells < queried
    until = cells % columns <= queried % columns
    row = 2 * (cells // columns) / rows - 1
    column = 2 * (cells % columns) / columns - 1
    channels = (
        images * visible / VALUES,
        2.0 * until - 1,
        2.0 * visible - 1,
        row.expand(images.shape),
        column.expand(images.shape),
    )
    return torch.stack(channels, dim=-1).permute(0, 3, 1, 2)


class Block(nn.Module):
    """A residual block on (count, 20, rows, columns): 1 x 1 convolution, depthwise 3 x 3, 1 x 1, with atan between."""

    def __init__(self) -> None:
        super().__init__()
        mixed = EXPANDED * MULTIPLIER
        self.expand = nn.Conv2d(WIDTH, EXPANDED, 1)
        self.depthwise = nn.Conv2d(EXPANDED, mixed, 3, padding=1, groups=EXPANDED)
        self.contract = nn.Conv2d(mixed, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.atan(self.expand(x))
        if x.device.type != "cpu":
            return x + self.contract(torch.atan(self.depthwise(hidden)))
        # The same sums, one for each of the multiplier's outputs: on a CPU, depthwise convolutions with as many outputs
        # as inputs take about half the time of others, and `contract`, being linear, can add them up.
        depthwise, contract = self.depthwise, self.contract
        assert depthwise.bias is not None
        for part in range(MULTIPLIER):
            picked = slice(part, None, MULTIPLIER)
            mixed = F.conv2d(hidden, depthwise.weight[picked], depthwise.bias[picked], padding=1, groups=EXPANDED)
            x = x + F.conv2d(torch.atan(mixed), contract.weight[:, picked], contract.bias if part == 0 else None)
        return x


class ImageGenerator(nn.Module):
    """The paper's network: from `inputs` of images up to 32 x 32 to the logits of the queried pixels, (count, 256).

    A 1 x 1 convolution to 20 channels; 5 stages of 4 blocks, each halving the image by averages over 2 x 2 pixels, less
    those beyond the border; a linear layer. 94,696 parameters.

    Args:
        generator: of the weights and biases, all Normal(0, 1 / (fan-in + 1)).
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # torch's own initial weights are of no use
            self.stem = nn.Conv2d(CHANNELS, WIDTH, 1)
            self.blocks = nn.ModuleList(Block() for _ in range(STAGES * BLOCKS))
            self.head = nn.Linear(WIDTH, VALUES)
        with torch.no_grad():
            for layer in self.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    fan_in = layer.weight[0].numel()
                    for tensor in (layer.weight, layer.bias):
                        assert tensor is not None
                        tensor.normal_(0, 1 / math.sqrt(fan_in + 1), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, block in enumerate(self.blocks, start=1):
            x = block(x)
            if index % BLOCKS == 0:
                x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        return self.head(x.flatten(1))


class ImageGeneration(Task):
    """Cross entropy, in nats, of one pixel's value given those before it, the mean over a batch; float32.

    A sample is a batch of training images, drawn with replacement, and a pixel of each, drawn uniformly. The last
    `validation_images` training images are held out. The paper takes 300,000 steps in each of 8 runs, and validates
    every 1,000 steps.

    Args:
        seed: of the initial weights and of the batches.
        data_root: where `load` finds MNIST.
        data: in place of `data_root`: any square images up to 32 x 32; labels do not matter.
        batch_size: 256 in the paper.
        device: where the network and the images are.
        validation_images: 64 in the paper.
        test_images: how many of the test set `finish` looks at; None: all.

    Raises:
        ValueError: for sizes that do not fit, neither `data_root` nor `data`, or as `load`.
        FileNotFoundError: as `load`.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        data_root: Path | None = None,
        data: ImageBytes | None = None,
        batch_size: int = 256,
        device: torch.device | str = "cpu",
        validation_images: int = 64,
        test_images: int | None = None,
    ) -> None:
        if data is None:
            if data_root is None:
                raise ValueError("data_root or data must be given")
            data = load(data_root)
        count, rows, columns = data.train_images.shape
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 1 <= validation_images < count:
            raise ValueError(f"validation_images must be from 1 to {count - 1}, got {validation_images}")
        if not 1 <= rows == columns <= 2**STAGES or data.test_images.shape[1:] != (rows, columns):
            raise ValueError(
                f"images must be squares of at most {2**STAGES} x {2**STAGES} pixels, alike for training and testing, "
                f"got {(rows, columns)} and {data.test_images.shape[1:]}"
            )
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)
        self.model = ImageGenerator(self.generator).to(self.device)
        self.params = list(self.model.parameters())
        self._names = [name for name, _ in self.model.named_parameters()]
        self.train_images = self._place(data.train_images[:-validation_images])
        self.validation_images = self._place(data.train_images[-validation_images:])
        self.test_images = self._place(data.test_images)
        self.side = rows
        self.tested = test_images
        self._picked = torch.empty(2, 0, dtype=torch.int64)  # of the images and of their pixels

    def _place(self, images: Bytes) -> Tensor:
        return torch.tensor(images, device=self.device)

    def draw(self) -> None:
        images = torch.randint(len(self.train_images), (self.batch_size,), generator=self.generator)
        positions = torch.randint(self.side**2, (self.batch_size,), generator=self.generator)
        self._picked = torch.stack([images, positions])

    def batch(self) -> tuple[Tensor, Tensor]:
        """The current sample: images, (batch size, rows, columns), uint8, and the queried pixels' positions.

        Raises:
            RuntimeError: before the first `draw`.
        """
        if self._picked.numel() == 0:
            raise RuntimeError("there is no sample before the first draw()")
        images, positions = self._picked.to(self.device)
        return self.train_images[images], positions

    def loss(self, params: Sequence[Tensor]) -> Tensor:
        images, positions = self.batch()
        named = dict(zip(self._names, params, strict=True))
        logits = functional_call(self.model, named, (inputs(images, positions).to(params[0].dtype),))
        return F.cross_entropy(logits, _values(images, positions))

    def backward(self) -> float:
        """As in the base class; on a CPU by parts of the batch, which add up to the same gradient but for rounding."""
        for param in self.params:
            param.grad = None
        images, positions = self.batch()
        chunk = GRADIENT_CHUNK if self.device.type == "cpu" else self.batch_size
        total = torch.zeros((), device=self.device)
        for part, queried in zip(images.split(chunk), positions.split(chunk), strict=True):
            loss = self._sum(part, queried) / self.batch_size
            loss.backward()
            total += loss.detach()
        return total.item()

    def _sum(self, images: Tensor, positions: Tensor) -> Tensor:
        """The sum of the losses at the task's own parameters."""
        logits = self.model(inputs(images, positions).to(self.params[0].dtype))
        return F.cross_entropy(logits, _values(images, positions), reduction="sum")

    @torch.no_grad()
    def _mean(self, images: Tensor) -> float:
        """The mean loss over all pixels of `images`, (count, rows, columns)."""
        pixels = self.side**2
        rows = torch.arange(len(images) * pixels, device=self.device)
        chunk = CHUNK if self.device.type == "cpu" else ACCELERATOR_CHUNK
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in rows.split(chunk):
            total += self._sum(images[part // pixels], part % pixels)
        return total.item() / len(rows)

    def validate(self) -> dict[str, float]:
        """The mean loss over all pixels of the images held out."""
        return {"validation_loss": self._mean(self.validation_images)}

    def finish(self, samples: Path | None) -> dict[str, float]:
        """The test loss; `samples` gets 16 generated images, (16, rows, columns), uint8."""
        if samples:
            samples.parent.mkdir(parents=True, exist_ok=True)
            np.save(samples, self.generate(16, seed=0).numpy())
        return {"test_loss": self.test_loss(self.tested)}

    def test_loss(self, images: int | None = None) -> float:
        """The mean loss over all pixels of the test set, or of its first `images` images."""
        return self._mean(self.test_images[:images])

    @torch.no_grad()
    def generate(self, count: int, seed: int) -> Tensor:
        """Images from the model's own distribution, pixel by pixel: (count, rows, columns), uint8, on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.zeros(count, self.side, self.side, dtype=torch.uint8, device=self.device)
        for position in range(self.side**2):
            queried = torch.full((count,), position, device=self.device)
            chances = self.model(inputs(images, queried).to(self.params[0].dtype)).softmax(1).cpu()
            drawn = torch.multinomial(chances, 1, generator=generator)[:, 0]
            images.view(count, -1)[:, position] = drawn.to(self.device, torch.uint8)
        return images.cpu()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"picked": self._picked.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._picked = state["picked"].clone()


def _values(images: Tensor, positions: Tensor) -> Tensor:
    """The queried pixels' values, (count,), int64."""
    return images.flatten(1).gather(1, positions[:, None])[:, 0].long()
