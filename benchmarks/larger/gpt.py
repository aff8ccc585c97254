"""A decoder-only GPT on bytes, and its text: the sources of Python's standard library.

The text is on every machine that has Python, and depends on Python's version: 3.11.7's has 4.7 million bytes. So runs
name their text (`Text.name`), and those on different texts are never compared.
"""

import hashlib
import math
import platform
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.larger.problem import Batch, Problem
from benchmarks.shootout.text import Block

VOCABULARY = 256
HELD_OUT_EVERY = 10  # every tenth file is held out
WINDOWS = 256  # of the held-out text, on which a model is measured
CHUNK = 64  # windows measured at a time
HEAD_WIDTH = 32
STD = 0.02  # of the initial weights
WIDTHS = {"small": 64, "medium": 128, "large": 256}  # 0.2, 0.8 and 3.2 million parameters in the blocks
DEPTH = 4


@dataclass(frozen=True)
class Text:
    """Bytes as int64 vectors; which files are held out, and the name of it all."""

    training: Tensor
    held_out: Tensor
    training_files: tuple[str, ...]
    held_out_files: tuple[str, ...]
    name: str


@cache
def standard_library(folder: Path | None = None) -> Text:
    """The text of the modules in `folder`, by default the standard library's, without packages and subfolders.

    The files are sorted by their names, and every tenth is held out as a whole.

    Raises:
        FileNotFoundError: there are fewer than ten.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(folder.glob("*.py"), key=lambda path: path.name)
    if len(paths) < HELD_OUT_EVERY:
        raise FileNotFoundError(f"the text needs the sources of at least {HELD_OUT_EVERY} modules in {folder}")
    held_out = paths[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    training = [path for path in paths if path not in held_out]
    parts = [b"".join(path.read_bytes() for path in part) for part in (training, held_out)]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]
    name = f"Python {platform.python_version()}, {len(paths)} files, {sum(map(len, parts))} bytes, {digest}"
    one, other = (torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in parts)
    return Text(one, other, tuple(p.name for p in training), tuple(p.name for p in held_out), name)


class GPT(nn.Module):
    """From bytes, (count, length) of at most `context`, to the logits of the next ones, (count, length, 256).

    Pre-norm, learned positions, no dropout. Weights start as in GPT-2: Normal(0, 0.02), and where a block ends, smaller
    by the root of the number of such places.

    Args:
        width: of the embeddings, a multiple of 32 or less than that.
        depth: number of blocks.
        context: the longest input.
        is_tied: the last layer shares its weight with the embedding.
    """

    def __init__(self, width: int = 128, depth: int = DEPTH, context: int = 64, is_tied: bool = False) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, max(1, width // HEAD_WIDTH)) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        for name, param in self.named_parameters():
            if param.ndim == 2:
                is_end = name.endswith(("project.weight", "narrow.weight"))
                nn.init.normal_(param, std=STD / math.sqrt(2 * depth) if is_end else STD)
            elif name.endswith("bias"):
                nn.init.zeros_(param)
        if is_tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tokens(x) + self.places.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(hidden)))


def make_gpt(
    seed: int,
    device: str,
    text: Text,
    *,
    width: int,
    depth: int,
    context: int,
    batch_size: int,
    is_tied: bool,
) -> Problem:
    """Predicts the next byte; batches are windows of the training text, drawn with replacement."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(width, depth, context, is_tied).to(device)
    training = text.training.to(device)
    reach = torch.arange(context + 1)

    def draw(generator: torch.Generator) -> Batch:
        starts = torch.randint(len(training) - context, (batch_size, 1), generator=generator)
        windows = training[(starts + reach).to(device)]
        return windows[:, :-1], windows[:, 1:]

    starts = torch.linspace(0, len(text.held_out) - context - 1, WINDOWS, dtype=torch.float64).long()
    windows = text.held_out[starts[:, None] + reach].to(device)
    validation = [(part[:, :-1], part[:, 1:]) for part in windows.split(CHUNK)]
    hidden = [param for param in model.blocks.parameters() if param.ndim >= 2]
    return Problem(model, hidden, draw, validation, None, seed)
