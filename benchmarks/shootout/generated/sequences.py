"""Generated tasks on sequences: characters with attention, and recurrent networks on drawn symbols."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.shootout import text
from benchmarks.shootout.generated.design import ANY, Batch, Choices, Design, classify
from benchmarks.shootout.generated.models import Block, CharacterModel, GatedRecurrent, start_
from benchmarks.shootout.problem import Problem, held_out, share_correct

MODULES = ("dataclasses", "enum", "ftplib", "imaplib", "mailbox", "platform", "shutil", "smtplib", "ssl", "subprocess")
HELD_OUT = 250  # drawn sequences
MARKED = 0.3  # share of the symbols
DELAY = 3  # places after which a symbol is echoed


@dataclass(frozen=True)
class Characters(Design):
    """A transformer learns the next character of other modules of the standard library than the other tasks have."""

    context: int
    heads: int
    ratio: int
    tied: bool

    title = "characters"
    choices: ClassVar[Choices] = {
        **ANY,
        "width": (24, 32, 40),
        "depth": (1, 2, 3),
        "batch_size": (6, 8),
        "norm": ("layer", "RMS"),
        "noise": (0.0,),
        "context": (16, 24, 40),
        "heads": (2, 4, 8),
        "ratio": (2, 3, 4),
        "tied": (False, True),
    }

    @property
    def kind(self) -> str:
        head = "tied" if self.tied else "own"
        shape = f"{self.heads} heads, ratio {self.ratio}, {head} output layer, context {self.context}"
        return f"characters, attention, {self.network}, {shape}"

    @property
    def milliseconds(self) -> float:
        return 0.6 + 0.7 * self.depth + 125e-6 * self.batch_size * self.context * self.width * self.depth

    def __call__(self, seed: int, root: Path | None) -> Problem:
        width, norm = self.width, self.norm
        blocks = [Block(width, self.heads, self.ratio, norm, self.activation) for _ in range(self.depth)]
        model = CharacterModel(blocks, width, self.context, norm, self.tied)
        start_(model, self.start)
        draw = text.windows_of(text.characters(MODULES), self.context, self.batch_size)
        others = text.characters(text.HELD_OUT_MODULES)
        validate = text.held_out_windows(others, self.context, classify, share_correct)
        return Problem(model, draw, classify, seed, validate=validate)


@dataclass(frozen=True)
class Sequences(Design):
    """A recurrent network answers at every place of a random sequence, some of whose answers are wrong."""

    form: str
    length: int
    symbols: int

    title = "sequences"
    is_finite = False
    choices: ClassVar[Choices] = {
        **ANY,
        "width": (32, 48),
        "depth": (1, 2),
        "batch_size": (16, 24),
        "norm": ("none", "layer", "RMS"),
        "noise": (0.0, 0.05, 0.1),
        "form": ("echo", "latest mark", "running sum"),
        "length": (8, 12, 16),
        "symbols": (3, 4),
    }

    @property
    def kind(self) -> str:
        task = f"{self.form} of {self.symbols} symbols, length {self.length}, {self.noise:.0%} wrong"
        return f"sequences, gated recurrent, {self.network}, {task}"

    @property
    def milliseconds(self) -> float:
        work = 6 * self.batch_size * self.length * self.depth * self.width**2
        return 0.6 + 0.12 * self.depth * self.length + 0.2e-6 * work

    def sequences(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Symbols, marks and right answers, each of shape (count, length)."""
        drawn = torch.randint(self.symbols, (count, self.length), generator=generator)
        marks = torch.rand(count, self.length, generator=generator) < MARKED
        if self.form == "echo":  # what was there some places before
            return drawn, marks, F.pad(drawn, (DELAY, 0))[:, : self.length]
        if self.form == "running sum":  # of the marked symbols
            return drawn, marks, (drawn * marks).cumsum(1) % self.symbols
        places = torch.where(marks, torch.arange(self.length), -1).cummax(1).values
        return drawn, marks, torch.where(places < 0, 0, drawn.gather(1, places.clamp(min=0)))

    def batch(self, generator: torch.Generator, count: int, noise: float) -> Batch:
        """What is seen at each place, shape (count, length, symbols + 1), and the answers."""
        drawn, marks, answers = self.sequences(generator, count)
        is_wrong = torch.rand(answers.shape, generator=generator) < noise
        wrong = torch.randint(self.symbols, answers.shape, generator=generator)
        seen = torch.cat((F.one_hot(drawn, self.symbols), marks[..., None]), dim=-1).float()
        return seen, torch.where(is_wrong, wrong, answers)

    def __call__(self, seed: int, root: Path | None) -> Problem:
        symbols = self.symbols
        model = GatedRecurrent(symbols + 1, symbols, self.width, self.depth, self.norm, self.activation)
        start_(model, self.start)

        def draw(generator: torch.Generator, step: int) -> Batch:
            return self.batch(generator, self.batch_size, self.noise)

        others = self.batch(torch.Generator().manual_seed(seed + 17), HELD_OUT, 0.0)
        return Problem(model, draw, classify, seed, validate=held_out(others, classify, share_correct))
