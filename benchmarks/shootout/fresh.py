"""Tasks that were added when LODO's defaults were settled, and that none of them was chosen with."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.shootout.images import digits_pixels
from benchmarks.shootout.problem import Problem, held_out, rows, share_correct

CODE = 8  # numbers that the variational autoencoder has for an image
FREQUENCIES = 8  # of the sine and cosine features of the noise level
HELD_OUT, HELD_OUT_SEQUENCES = 2000, 250
LENGTH, VALUES = 12, 16  # of the sequences that are sorted


class VariationalAutoencoder(nn.Module):
    """64-128-64 and back, SiLU, with a normal code of 8 numbers."""

    def __init__(self, pixels: int = 64, wide: int = 128, narrow: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(pixels, wide), nn.SiLU(), nn.Linear(wide, narrow), nn.SiLU(), nn.Linear(narrow, 2 * CODE)
        )
        self.decoder = nn.Sequential(
            nn.Linear(CODE, narrow), nn.SiLU(), nn.Linear(narrow, wide), nn.SiLU(), nn.Linear(wide, pixels)
        )

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The logits of the pixels, and mean and logarithmic variance of the code."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        return self.decoder(mean + torch.exp(0.5 * log_variance) * noise), mean, log_variance


def vae(seed: int, root: Path | None) -> Problem:
    """A variational autoencoder of scikit-learn's digits: minus the evidence lower bound; batches of 64."""
    pixels, others = digits_pixels()

    def draw(generator: torch.Generator, step: int) -> tuple[Tensor, Tensor]:
        return pixels[rows(generator, len(pixels), 64)], torch.randn(64, CODE, generator=generator)

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits, mean, log_variance = model(*batch)
        misfit = F.binary_cross_entropy_with_logits(logits, batch[0], reduction="sum")
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        return (misfit + divergence) / len(mean)

    noise = torch.randn(len(others), CODE, generator=torch.Generator().manual_seed(seed + 17))
    return Problem(VariationalAutoencoder(), draw, objective, seed, validate=held_out((others, noise), objective))


class Residual(nn.Module):
    """x + W_2 gelu(W_1 norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Any:
        return x + self.inner(x)


def diffusion(seed: int, root: Path | None) -> Problem:
    """A residual network of width 48 learns the noise in noisy points of two spirals, at any level; batches of 128.

    A point x becomes cos(a) x + sin(a) e with normal e and a uniform in [0, pi / 2]; the loss is the mean squared error
    of e. The network sees the noisy point and sines and cosines of a.
    """
    model = nn.Sequential(
        nn.Linear(2 + 2 * FREQUENCIES, 48), Residual(48), Residual(48), nn.LayerNorm(48), nn.Linear(48, 2)
    )

    def draw(generator: torch.Generator, step: int, count: int = 128) -> tuple[Tensor, Tensor]:
        turn = 3 * math.pi * torch.rand(count, 1, generator=generator).sqrt()
        arm = 1 - 2 * torch.randint(2, (count, 1), generator=generator)
        points = arm * turn / 5 * torch.cat((turn.cos(), turn.sin()), dim=1)
        noise = torch.randn(count, 2, generator=generator)
        level = math.pi / 2 * torch.rand(count, 1, generator=generator)
        waves = level * torch.arange(1, FREQUENCIES + 1)
        return torch.cat((level.cos() * points + level.sin() * noise, waves.sin(), waves.cos()), dim=1), noise

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    others = draw(torch.Generator().manual_seed(seed + 17), 0, HELD_OUT)
    return Problem(model, draw, objective, seed, validate=held_out(others, objective))


class Sorter(nn.Module):
    """Torch's own transformer layers, which see the whole sequence."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.values, self.places = nn.Embedding(VALUES, width), nn.Embedding(LENGTH, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VALUES)

    def forward(self, x: Tensor) -> Any:
        x = self.values(x) + self.places.weight
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def sorting(seed: int, root: Path | None) -> Problem:
    """A transformer of two layers of width 32 sorts twelve numbers of sixteen; batches of 32 sequences."""

    def draw(generator: torch.Generator, step: int, count: int = 32) -> tuple[Tensor, Tensor]:
        drawn = torch.randint(VALUES, (count, LENGTH), generator=generator)
        return drawn, drawn.sort(dim=1).values

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    others = draw(torch.Generator().manual_seed(seed + 17), 0, HELD_OUT_SEQUENCES)
    return Problem(Sorter(), draw, objective, seed, validate=held_out(others, objective, share_correct))
