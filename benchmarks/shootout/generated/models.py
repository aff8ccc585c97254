"""The networks of the generated tasks, from norms, activations and starts that are drawn by name."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.shootout.text import CHARACTERS

GROUPS = 4  # of a group norm; widths are multiples of it
ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "ELU": nn.ELU,
    "tanh": nn.Tanh,
}
STARTS: Mapping[str, Callable[[Tensor], Any] | None] = {
    "default": None,
    "normal": lambda weight: nn.init.normal_(weight, std=weight[0].numel() ** -0.5),
    "orthogonal": nn.init.orthogonal_,
    "Kaiming": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
    "Xavier": nn.init.xavier_uniform_,
}


def start_(model: nn.Module, start: str) -> None:
    """Gives the weights of linear, convolutional and recurrent layers another start, and their biases 0.

    Transposed convolutions keep torch's: the inputs of an output are not what these starts take them to be.
    """
    initialise = STARTS[start]
    if initialise is None:
        return
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.GRU):
            for param in module.parameters(recurse=False):
                if param.ndim > 1:
                    initialise(param)
                else:
                    nn.init.zeros_(param)


def norm_of(kind: str, width: int, of_images: bool = False) -> nn.Module:
    """The norm of vectors, shape (..., width), or of images, shape (N, width, height, breadth)."""
    if kind == "batch":
        return nn.BatchNorm2d(width) if of_images else nn.BatchNorm1d(width)
    if kind == "group":
        return nn.GroupNorm(GROUPS, width)
    if kind == "layer":
        return nn.GroupNorm(1, width) if of_images else nn.LayerNorm(width)
    return nn.RMSNorm(width, eps=1e-6) if kind == "RMS" else nn.Identity()


def dense(sizes: Sequence[int], norm: str, activation: str) -> nn.Sequential:
    """Linear layers from size to size, with a norm and an activation after each but the last."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes[:-1]):
        layers += [nn.Linear(inputs, outputs), norm_of(norm, outputs), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


class Shortcut(nn.Module):
    """x + activation(norm(convolution(x))), of images."""

    def __init__(self, width: int, norm: str, activation: str) -> None:
        super().__init__()
        convolution = nn.Conv2d(width, width, 3, padding=1, bias=norm == "none")
        self.inner = nn.Sequential(convolution, norm_of(norm, width, of_images=True), ACTIVATIONS[activation]())

    def forward(self, x: Tensor) -> Any:
        return x + self.inner(x)


def convolutional_classifier(width: int, depth: int, norm: str, activation: str) -> nn.Sequential:
    """From 8 x 8 pixels, shape (N, 64), to ten logits: a convolution, `depth` more with shortcuts, at 4 x 4 pixels."""
    stem = (nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, width, 3, stride=2, padding=1), ACTIVATIONS[activation]())
    blocks = (Shortcut(width, norm, activation) for _ in range(depth))
    return nn.Sequential(*stem, *blocks, nn.Flatten(), nn.Linear(16 * width, 10))


def convolutional_autoencoder(width: int, depth: int, code: int, norm: str, activation: str) -> nn.Sequential:
    """From 8 x 8 pixels, shape (N, 64), to as many, through 4 x 4 pixels of `width` channels and `code` numbers."""
    act = ACTIVATIONS[activation]
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, width, 4, stride=2, padding=1),
        norm_of(norm, width, of_images=True),
        act(),
        *(Shortcut(width, norm, activation) for _ in range(depth - 1)),
        nn.Flatten(),
        nn.Linear(16 * width, code),
        nn.Linear(code, 16 * width),
        act(),
        nn.Unflatten(1, (width, 4, 4)),
        nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1),
        nn.Flatten(),
    )


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each after a norm and with a shortcut."""

    def __init__(self, width: int, heads: int, ratio: int, norm: str, activation: str) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = norm_of(norm, width), norm_of(norm, width)
        self.mix, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = dense((width, ratio * width, width), "none", activation)

    def forward(self, x: Tensor) -> Any:
        """Shapes (batch, length, width)."""
        count, length, width = x.shape
        parts = self.mix(self.norm1(x)).view(count, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(count, length, width))
        return x + self.feed(self.norm2(x))


class CharacterModel(nn.Module):
    """A transformer whose head, if tied, is the embedding of the characters with a bias."""

    def __init__(self, blocks: Sequence[Block], width: int, context: int, norm: str, tied: bool) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(CHARACTERS, width), nn.Embedding(context, width)
        for embedding in (self.characters, self.places):
            nn.init.normal_(embedding.weight, std=0.1)
        self.blocks, self.norm = nn.Sequential(*blocks), norm_of(norm, width)
        # A tied head is no linear layer: its weight is to be known as an embedding.
        self.head = None if tied else nn.Linear(width, CHARACTERS)
        self.bias = nn.Parameter(torch.zeros(CHARACTERS)) if tied else None

    def forward(self, x: Tensor) -> Any:
        """From characters, shape (batch, context), to logits, shape (batch, context, characters)."""
        x = self.norm(self.blocks(self.characters(x) + self.places.weight))
        return F.linear(x, self.characters.weight, self.bias) if self.head is None else self.head(x)


class GatedRecurrent(nn.Module):
    """Gated recurrent layers with a dense head at every place."""

    def __init__(self, inputs: int, outputs: int, width: int, depth: int, norm: str, activation: str) -> None:
        super().__init__()
        self.gru = nn.GRU(inputs, width, depth, batch_first=True)
        self.norm, self.head = norm_of(norm, width), dense((width, width, outputs), "none", activation)

    def forward(self, x: Tensor) -> Any:
        """From shape (batch, length, inputs) to (batch, length, outputs)."""
        return self.head(self.norm(self.gru(x)[0]))


class Towers(nn.Module):
    """Codes of users, from embeddings, and of items, from features; each a unit vector.

    Args:
        features: of the items, shape (items, features).
        users: their number.
        code: numbers in a code.
        sharpness: by which cosines are multiplied.
    """

    def __init__(
        self,
        features: Tensor,
        users: int,
        code: int,
        width: int,
        depth: int,
        norm: str,
        activation: str,
        sharpness: float,
    ) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.features: Tensor
        self.register_buffer("features", features, persistent=False)
        self.users = nn.Embedding(users, width)
        self.user_tower = dense((width, width, code), norm, activation)
        self.item_tower = dense((features.shape[1], *[width] * depth, code), norm, activation)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Logits of all pairs, shape (..., users, items), from numbers of users (..., users) and items (..., items)."""
        user = F.normalize(self.user_tower(self.users(users)), dim=-1)
        item = F.normalize(self.item_tower(self.features[items]), dim=-1)
        return self.sharpness * (user @ item.transpose(-1, -2))
