"""What a task of the comparison is, and a problem: a task at a seed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

Split = Literal["choose", "hold out", "fresh", "sealed"]
TRAINING, VALIDATION = "training", "validation"  # what is aimed at: the loss on either sort of data
IDLE_DRAWS = 20
SELECTING = 1000  # runs at this seed and above choose settings: where there are enough data, they validate on others
STATISTICS_DRAWS = 20  # batches from which the statistics of batch norms are taken anew

Validate = Callable[[Any, int], tuple[Tensor, Tensor | None]]
"""Loss and, of a classifier, accuracy of a model on data that it is not trained on, after so many steps; 0-dim."""


class Problem:
    """Named parameters, and a loss that is sampled anew before each step.

    Batches come from a generator of the problem's own, so every optimizer meets the same ones at the same seed, and
    whatever an optimizer draws changes none of them.

    Args:
        model: holds the parameters.
        draw: the batch of a step, from the generator and the step's number (0 is the first).
        objective: the loss, 0-dim, of the model on a batch.
        seed: of the generator.
        idle_loss: of an optimizer that stays at the start; None: it is measured there, on other batches.
        validate: what held-out data say of the model; None: there are none.
    """

    def __init__(
        self,
        model: nn.Module,
        draw: Callable[[torch.Generator, int], Any],
        objective: Callable[[Any, Any], Tensor],
        seed: int,
        idle_loss: float | None = None,
        validate: Validate | None = None,
    ) -> None:
        self.model, self._draw, self._objective, self._validate = model, draw, objective, validate
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn = 0
        self.batch: Any = None
        self.idle_loss = self._measure_idle(seed) if idle_loss is None else idle_loss

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def draw(self) -> None:
        """Moves on to the next batch."""
        self.batch = self._draw(self.generator, self.drawn)
        self.drawn += 1

    def evaluate(self) -> Tensor:
        """The loss of the present batch."""
        return self._objective(self.model, self.batch)

    def loss(self) -> Tensor:
        """The loss of the next batch."""
        self.draw()
        return self.evaluate()

    @torch.no_grad()
    def validate(self) -> tuple[float, float | None] | None:
        """Loss and accuracy on held-out data of the model as one would deploy it, in evaluation mode; None without
        such data. The training goes on as if it had not been asked."""
        if self._validate is None:
            return None
        self.model.eval()
        loss, accuracy = self._validate(self.model, self.drawn)
        self.model.train()
        return float(loss), None if accuracy is None else float(accuracy)

    @torch.no_grad()
    def renew_statistics(self) -> Callable[[], None]:
        """Takes the statistics of batch norms anew at the present parameters, from batches of their own; returns what
        puts the old ones back. For whoever deploys another point than the one that it trains at."""
        norms = [module for module in self.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        kept = [{name: value.clone() for name, value in norm.state_dict().items()} for norm in norms]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # plain means
        generator = torch.Generator().manual_seed(self.seed + 2_000_000)
        for _ in range(STATISTICS_DRAWS if norms else 0):
            self._objective(self.model, self._draw(generator, self.drawn))

        def put_back() -> None:
            for norm, state, momentum in zip(norms, kept, momenta, strict=True):
                with torch.no_grad():
                    for name, value in norm.state_dict().items():
                        if name not in ("weight", "bias"):
                            value.copy_(state[name])
                norm.momentum = momentum

        return put_back

    def _measure_idle(self, seed: int) -> float:
        generator = torch.Generator().manual_seed(seed + 1_000_000)
        losses = [self._objective(self.model, self._draw(generator, 0)) for _ in range(IDLE_DRAWS)]
        return float(torch.stack([loss.detach() for loss in losses]).mean())


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        kind: what sort of problem it is, in a few words.
        steps: the budget of every run.
        make: the problem, from the seed and the folder of MNIST's files (None for tasks that do without).
        split: "choose" for the tasks on which LODO's defaults may be chosen, "hold out" for those that are to judge,
            "fresh" for those that were added when the defaults were settled.
        is_deterministic: every evaluation sees the same loss.
        needs_mnist: `make` needs the folder.
        has_matrices: some parameter is a matrix that is no embedding.
        has_finite_data: training sees the same data again and again, so that weight decay may help validation.
        is_validated: its problems have held-out data.
        version: to be raised with every change to what is computed, for it makes old records another task's.
    """

    name: str
    kind: str
    steps: int
    make: Callable[[int, Path | None], Problem]
    split: Split
    is_deterministic: bool = False
    needs_mnist: bool = False
    has_matrices: bool = True
    has_finite_data: bool = False
    is_validated: bool = True
    version: int = 1

    @property
    def aims(self) -> tuple[str, ...]:
        return (TRAINING, VALIDATION) if self.is_validated else (TRAINING,)

    def build(self, seed: int, data_root: Path | None = None) -> Problem:
        """The problem at `seed`, from which start and batches follow. Global random numbers stay as they were.

        Raises:
            ValueError: the task needs MNIST, and `data_root` is None.
        """
        if self.needs_mnist and data_root is None:
            raise ValueError(f"the task {self.name!r} needs --data-root, the folder of MNIST's files")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make(seed, data_root)


def held_out(
    batch: Any, objective: Callable[[Any, Any], Tensor], accuracy: Callable[[Any, Any], Tensor] | None = None
) -> Validate:
    """The loss, and the accuracy, of one large batch that is never trained on."""

    def validate(model: Any, step: int) -> tuple[Tensor, Tensor | None]:
        return objective(model, batch), None if accuracy is None else accuracy(model, batch)

    return validate


def share_correct(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Of a classifier's predictions, one for each entry of the labels."""
    return (model(batch[0]).argmax(-1) == batch[1]).double().mean()


def rows(generator: torch.Generator, count: int, batch_size: int) -> Tensor:
    """A batch's row numbers, drawn with replacement."""
    return torch.randint(count, (batch_size,), generator=generator)
