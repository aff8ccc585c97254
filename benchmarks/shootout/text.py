"""Language models on a text that comes with Python: sources of its standard library."""

import re
import sysconfig
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.shootout.problem import Problem, rows

MODULES = ("argparse", "difflib", "doctest", "inspect", "pickle", "pydoc", "tarfile", "turtle", "typing", "zipfile")
OTHERS = ("zipfile/__init__",)  # where a module has become a package
FIRST, LAST = 32, 126  # printable ASCII; a line break and anything else follow as two further characters
CHARACTERS = LAST - FIRST + 3
CONTEXT = 32
WORDS = 500
Batch = tuple[Tensor, Tensor]


@cache
def _source() -> str:
    """The modules' sources, one after the other.

    Raises:
        FileNotFoundError: this Python comes without them.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [folder / f"{name}.py" for name in (*MODULES, *OTHERS)]
    found = [path.read_text(encoding="utf-8") for path in paths if path.is_file()]
    if len(found) < len(MODULES):
        raise FileNotFoundError(f"the text tasks need the sources of {', '.join(MODULES)} in {folder}")
    return "".join(found)


@cache
def _characters() -> Tensor:
    codes = torch.tensor(list(_source().encode("ascii", "replace")))
    odd = (codes < FIRST) | (codes > LAST)
    kept = (codes - FIRST).masked_fill(odd, CHARACTERS - 1)
    return kept.masked_fill(codes == ord("\n"), CHARACTERS - 2)


@cache
def _words() -> Tensor:
    """The text as numbers of words and signs, the most frequent ones first; all rare ones are the last number."""
    tokens = re.findall(r"\w+|[^\w\s]", _source())
    numbers = {word: number for number, (word, _) in enumerate(Counter(tokens).most_common(WORDS - 1))}
    return torch.tensor([numbers.get(token, WORDS - 1) for token in tokens])


def _windows(text: Tensor, length: int, batch_size: int) -> Any:
    """Draws pieces of the text, as inputs and as what comes next at each place."""
    reach = torch.arange(length + 1)

    def draw(generator: torch.Generator, step: int) -> Batch:
        pieces = text[rows(generator, len(text) - length, batch_size)[:, None] + reach]
        return pieces[:, :-1], pieces[:, 1:]

    return draw


def _next_character(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each after a layer norm and with a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        shape = (count, length, self.heads, width // self.heads)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.mix(self.norm1(x)).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(count, length, width))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, width: int = 48, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(CHARACTERS, width), nn.Embedding(CONTEXT, width)
        for embedding in (self.characters, self.places):
            nn.init.normal_(embedding.weight, std=0.1)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CHARACTERS)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.norm(self.blocks(self.characters(x) + self.places.weight[: x.shape[1]])))


class Recurrent(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, 24)
        self.lstm = nn.LSTM(24, width, batch_first=True)
        self.head = nn.Linear(width, CHARACTERS)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.lstm(self.characters(x))[0])


class WordModel(nn.Module):
    """The next word from the two before it: their embeddings, one hidden layer."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.hidden, self.head = nn.Linear(2 * width, 32), nn.Linear(32, WORDS)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.tanh(self.hidden(self.words(x).flatten(1))))


def transformer(seed: int, root: Path | None) -> Problem:
    """Two layers of width 48, next character, 32 characters of context; batches of 16."""
    return Problem(Transformer(), _windows(_characters(), CONTEXT, 16), _next_character, seed)


def lstm(seed: int, root: Path | None) -> Problem:
    """One layer of 64 cells, next character, 32 steps of back-propagation; batches of 16."""
    return Problem(Recurrent(), _windows(_characters(), CONTEXT, 16), _next_character, seed)


def words(seed: int, root: Path | None) -> Problem:
    """The next of 500 words, most of them rare, from the last two; batches of 64."""

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1][:, -1])

    return Problem(WordModel(), _windows(_words(), 2, 64), objective, seed)
