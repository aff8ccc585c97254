"""What a problem of the comparison is: a model, batches that follow from a seed, and data that are held out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]
"""Inputs, and the class to predict at each place: of the logits' shape without its last dimension."""


@dataclass(frozen=True)
class Figures:
    """Mean cross entropy in nats, and the share of the predictions that are right."""

    loss: float
    accuracy: float


class Problem:
    """A model to train, its batches, and what is measured on data that it does not see.

    Batches come from a generator of the problem's own, so that every optimizer meets the same ones at the same seed.

    Args:
        model: from inputs to logits, whose last dimension is that of the classes.
        hidden: the matrices and filters between embeddings and last layer, which Muon is for.
        draw: the next training batch, from the generator.
        validation: batches that are never trained on.
        test: more of them, for a last figure; None: there are none.
        seed: of the batches.
    """

    def __init__(
        self,
        model: nn.Module,
        hidden: Sequence[nn.Parameter],
        draw: Callable[[torch.Generator], Batch],
        validation: Sequence[Batch],
        test: Sequence[Batch] | None,
        seed: int,
    ) -> None:
        self.model, self.hidden = model, list(hidden)
        self._draw, self._validation, self._test = draw, validation, test
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def loss(self) -> Tensor:
        """The mean cross entropy, 0-dim, on the next batch."""
        inputs, targets = self._draw(self._generator)
        return F.cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten())

    def validate(self) -> Figures:
        return self._measure(self._validation)

    def test(self) -> Figures | None:
        return None if self._test is None else self._measure(self._test)

    @torch.no_grad()
    def _measure(self, batches: Sequence[Batch]) -> Figures:
        """In evaluation mode; training goes on as if nobody had asked."""
        self.model.eval()
        loss = correct = count = 0.0
        for inputs, targets in batches:
            logits, wanted = self.model(inputs).flatten(0, -2), targets.flatten()
            loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
            correct += float((logits.argmax(-1) == wanted).sum())
            count += len(wanted)
        self.model.train()
        return Figures(loss / count, correct / count)
