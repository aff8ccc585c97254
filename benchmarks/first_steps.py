"""The first steps of 200 language models, where averages of gradients are most singular.

    python -m benchmarks.first_steps [--out DIR] [--models N]

Vocabularies of 64 to 2,048 of which 5 to 100 % are used, widths of 32 to 512, batches of 1 to 512, float32, bfloat16
and float64, one and two threads; an embedding with a linear layer, an LSTM or a transformer layer over it, all drawn
from a seed. Each is given to `lodo.AutoLODO` as it is. Counts those that raise, write what is not finite, or whose loss
is not lower after 51 steps.
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lodo
from benchmarks.environment import environment

STEPS = 51
LENGTH = 16  # of the texts that LSTMs and transformers see
OUT = Path(__file__).parent / "results" / "first_steps"


@dataclass(frozen=True)
class Drawn:
    """One model and its data."""

    kind: str
    vocabulary: int
    width: int
    share: float
    batch: int
    dtype: torch.dtype
    threads: int

    @classmethod
    def at(cls, seed: int) -> "Drawn":
        draw = random.Random(seed)
        kind = draw.choice(["linear", "linear", "lstm", "transformer"])
        largest = 512 if kind == "linear" else 256
        return cls(
            kind,
            vocabulary=draw.choice([64, 128, 256, 512, 1024, 2048]),
            width=min(draw.choice([32, 64, 128, 256, 512]), largest),
            share=draw.choice([0.05, 0.1, 0.25, 0.5, 1.0]),
            batch=min(draw.choice([1, 2, 8, 32, 128, 512]), 512 if kind == "linear" else 32),
            dtype=draw.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64]),
            threads=draw.choice([1, 2]),
        )


class Model(nn.Module):
    """Predicts a token from those before it."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        width = drawn.width
        self.embedding, self.head = nn.Embedding(drawn.vocabulary, width), nn.Linear(width, drawn.vocabulary)
        self.middle: nn.Module | None = None
        if drawn.kind == "lstm":
            self.middle = nn.LSTM(width, width, batch_first=True)
        elif drawn.kind == "transformer":
            self.middle = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        if self.middle is not None:
            hidden = self.middle(hidden)
        return self.head(hidden[0] if isinstance(hidden, tuple) else hidden)


def outcome(seed: int) -> str:
    """What becomes of the model that is drawn at `seed`: "lower", "not lower", "not finite" or the name of an error."""
    drawn = Drawn.at(seed)
    torch.set_num_threads(drawn.threads)
    torch.manual_seed(seed)
    model = Model(drawn).to(drawn.dtype)
    used = torch.randperm(drawn.vocabulary)[: max(2, int(drawn.share * drawn.vocabulary))]
    follows = used[torch.randint(len(used), (drawn.vocabulary,))]  # each token has one that comes after it
    shape = (drawn.batch,) if drawn.kind == "linear" else (drawn.batch, LENGTH)
    optimizer = lodo.AutoLODO(model.parameters())

    def batch() -> Tensor:
        return used[torch.randint(len(used), shape)]

    def loss(tokens: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).float().flatten(0, -2), follows[tokens].flatten())

    @torch.no_grad()
    def held_loss() -> float:
        return sum(loss(tokens).item() for tokens in held) / len(held)

    held = [batch() for _ in range(max(1, 64 // drawn.batch))]
    before = held_loss()
    try:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss(batch()).backward()
            optimizer.step()
            if not all(bool(p.isfinite().all()) for p in model.parameters()):
                return "not finite"
    except Exception as error:
        return type(error).__name__
    return "lower" if held_loss() < before else "not lower"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_steps", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"(default: {OUT})")
    parser.add_argument("--models", type=int, default=200, metavar="N")
    options = parser.parse_args()
    machine, outcomes = environment(), {}  # of the code that is loaded, whatever becomes of its files meanwhile
    for seed in range(options.models):
        outcomes[seed] = outcome(seed)
        if outcomes[seed] != "lower":
            print(seed, Drawn.at(seed), outcomes[seed], flush=True)
    counts = {name: list(outcomes.values()).count(name) for name in sorted(set(outcomes.values()))}
    lines = [
        "# First steps of language models",
        "",
        f"`python -m benchmarks.first_steps --models {options.models}`, {machine['processor']}, torch "
        f"{machine['torch']}, lodo source {machine['lodo_source']}. The loss after {STEPS} steps of "
        "`lodo.AutoLODO(model.parameters())`:",
        "",
        *(f"- {name}: {count} of {options.models}" for name, count in counts.items()),
        *(f"    - seed {seed}: {found}, {Drawn.at(seed)}" for seed, found in outcomes.items() if found != "lower"),
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "first_steps.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
