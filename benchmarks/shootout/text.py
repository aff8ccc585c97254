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

from benchmarks.shootout.problem import SELECTING, Problem, Validate, held_out, rows, share_correct

MODULES = ("argparse", "difflib", "doctest", "inspect", "pickle", "pydoc", "tarfile", "turtle", "typing", "zipfile")
HELD_OUT_MODULES = ("ast", "calendar", "configparser", "optparse", "statistics", "threading")
HELD_OUT_WINDOWS = 128
HELD_OUT_WORDS = 2000
OTHERS = ("zipfile/__init__",)  # where a module has become a package
FIRST, LAST = 32, 126  # printable ASCII; a line break and anything else follow as two further characters
CHARACTERS = LAST - FIRST + 3
CONTEXT = 32
WORDS = 500
Batch = tuple[Tensor, Tensor]


@cache
def _source(modules: tuple[str, ...] = MODULES) -> str:
    """The modules' sources, one after the other.

    Raises:
        FileNotFoundError: this Python comes without them.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [folder / f"{name}.py" for name in (*modules, *(OTHERS if modules == MODULES else ()))]
    found = [path.read_text(encoding="utf-8") for path in paths if path.is_file()]
    if len(found) < len(modules):
        raise FileNotFoundError(f"the text tasks need the sources of {', '.join(modules)} in {folder}")
    return "".join(found)


@cache
def characters(modules: tuple[str, ...] = MODULES) -> Tensor:
    codes = torch.tensor(list(_source(modules).encode("ascii", "replace")))
    odd = (codes < FIRST) | (codes > LAST)
    kept = (codes - FIRST).masked_fill(odd, CHARACTERS - 1)
    return kept.masked_fill(codes == ord("\n"), CHARACTERS - 2)


@cache
def _words(modules: tuple[str, ...] = MODULES) -> Tensor:
    """The text as numbers of words and signs, those most frequent in `MODULES` first; all rare ones are the last
    number."""
    frequent = Counter(_tokens(MODULES)).most_common(WORDS - 1)
    numbers = {word: number for number, (word, _) in enumerate(frequent)}
    return torch.tensor([numbers.get(token, WORDS - 1) for token in _tokens(modules)])


def _tokens(modules: tuple[str, ...]) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", _source(modules))


def windows_of(text: Tensor, length: int, batch_size: int) -> Any:
    """Draws pieces of the text, as inputs and as what comes next at each place."""
    reach = torch.arange(length + 1)

    def draw(generator: torch.Generator, step: int) -> Batch:
        pieces = text[rows(generator, len(text) - length, batch_size)[:, None] + reach]
        return pieces[:, :-1], pieces[:, 1:]

    return draw


def held_out_windows(
    text: Tensor, length: int, objective: Any, accuracy: Any, windows: int = HELD_OUT_WINDOWS, seed: int = 0
) -> Validate:
    """On pieces of a text, spread evenly over it; to choose settings by, on those half-way between the others."""
    places = torch.arange(windows) + (0.5 if seed >= SELECTING else 0.0)
    starts = (places * ((len(text) - length - 1) / windows)).long()
    pieces = text[starts[:, None] + torch.arange(length + 1)]
    return held_out((pieces[:, :-1], pieces[:, 1:]), objective, accuracy)


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
    return _next_character_problem(Transformer(), seed)


def lstm(seed: int, root: Path | None) -> Problem:
    """One layer of 64 cells, next character, 32 steps of back-propagation; batches of 16."""
    return _next_character_problem(Recurrent(), seed)


def _next_character_problem(model: nn.Module, seed: int) -> Problem:
    validate = held_out_windows(characters(HELD_OUT_MODULES), CONTEXT, _next_character, share_correct, seed=seed)
    return Problem(model, windows_of(characters(), CONTEXT, 16), _next_character, seed, validate=validate)


def words(seed: int, root: Path | None) -> Problem:
    """The next of 500 words, most of them rare, from the last two; batches of 64."""

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1][:, -1])

    def accuracy(model: nn.Module, batch: Batch) -> Tensor:
        return share_correct(model, (batch[0], batch[1][:, -1]))

    validate = held_out_windows(_words(HELD_OUT_MODULES), 2, objective, accuracy, HELD_OUT_WORDS, seed)
    return Problem(WordModel(), windows_of(_words(), 2, 64), objective, seed, validate=validate)
