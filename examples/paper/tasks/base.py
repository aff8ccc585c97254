"""What a task is: an objective that is sampled anew before every step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Task(ABC):
    """An objective f over `params`, of which each step sees one sample: a centre, a batch, or f itself where it is
    exact.

    All randomness after construction comes from `generator`, so that a seed fixes the run, and `state_dict` resumes it.

    Attributes:
        params: the leaves to optimise, in order; their `grad` is what `backward` writes.
        generator: the source of the samples; a CPU generator, whatever the device of `params`.
    """

    params: list[Tensor]
    generator: torch.Generator

    @abstractmethod
    def draw(self) -> None:
        """Moves on to the next sample. To be called before each step."""

    @abstractmethod
    def loss(self, params: Sequence[Tensor]) -> Tensor:
        """The loss of the current sample at `params` (shaped like `self.params`), 0-dim, differentiable in them."""

    def backward(self) -> float:
        """Writes the current sample's gradient to `params` and returns its loss."""
        for param in self.params:
            param.grad = None
        loss = self.loss(self.params)
        loss.backward()
        return float(loss.detach())

    def sibling(self, seed: int) -> "Task":
        """The same objective at its start, with noise of its own. For what is learned on one run and used on another.

        Raises:
            NotImplementedError: this kind of task has none.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no siblings: transplanting and learning to learn need them"
        )

    def validate(self) -> dict[str, float]:
        """Figures on held-out data, by name; no state of the task changes. Empty for tasks without such data."""
        return {}

    def finish(self, samples: Path | None) -> dict[str, float]:
        """Figures on test data at the end of a run, by name; a task that generates saves samples to that .npy file."""
        return {}

    def hessian(self) -> Callable[[Tensor], Tensor]:
        """The Hessian of the current sample at `params`, as a map from vectors (n,) to vectors (n,), by autograd."""
        gradients = torch.autograd.grad(self.loss(self.params), self.params, create_graph=True)
        gradient = torch.cat([part.reshape(-1) for part in gradients])

        def product(vector: Tensor) -> Tensor:
            parts = torch.autograd.grad(gradient @ vector, self.params, retain_graph=True)
            return torch.cat([part.reshape(-1) for part in parts])

        return product

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on with the same samples: tensors only."""
        return {"params": [param.detach().clone() for param in self.params], "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, on a task that was built with the same arguments."""
        with torch.no_grad():
            for param, saved in zip(self.params, state["params"], strict=True):
                param.copy_(saved)
        self.generator.set_state(state["generator"])
