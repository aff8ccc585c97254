"""LODO's bookkeeping again, for one param group, on plain tensors: what the property tests compare an optimizer with.

Only the mathematics is the library's (`lodo_step`, `start` of a preconditioner); nothing here knows `optimizer.state`,
checkpoints, views or what is kept between steps.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lodo import meta
from lodo.preconditioners import BY_NAME, Preconditioner
from lodo.rounding import random_words, to_bfloat16
from lodo.step import lodo_step, shorten_

Gradients = Sequence[Tensor | None]


class Replay:
    """One param group.

    Attributes:
        values: what the parameters must be.
        options: of the group, complete, lr a plain float.
        network, momentum, moments: None before the first call with a gradient.
    """

    def __init__(
        self, values: Sequence[Tensor], options: dict[str, Any], learned: Preconditioner | None = None
    ) -> None:
        self.values = [value.detach().clone(memory_format=torch.contiguous_format) for value in values]
        self.options = dict(options)
        self.network: Preconditioner | None = None
        self.momentum: Tensor | None = None
        self.moments: meta.Moments | None = None
        self.steps = self.meta_step = self.skipped = 0
        self.last_lr = 0.0
        if learned is not None:
            self.network = learned.to(self.dtype, torch.device("cpu"))
            self.prepare()

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if any(value.dtype == torch.float64 for value in self.values) else torch.float32

    @property
    def size(self) -> int:
        return sum(value.numel() for value in self.values)

    def kept(self, option: str) -> torch.dtype:
        return torch.bfloat16 if self.options[option] == "bfloat16" else self.dtype

    @property
    def uses_moments(self) -> bool:
        return self.options["meta_lr"] > 0 and self.options["meta_optimizer"] == "adam"

    def prepare(self) -> None:
        """Brings what is kept into the dtypes that parameters and options ask for; starts what is not there."""
        if self.network is None:
            kind = BY_NAME[self.options["preconditioner"]]
            self.network = kind.start(self.size, self.options, self.dtype, torch.device("cpu"))
        if self.network.theta.dtype != self.dtype:
            self.network = self.network.to(self.dtype, torch.device("cpu"))
        momentum = torch.zeros(self.size) if self.momentum is None else self.momentum
        self.momentum = momentum.to(self.kept("momentum_dtype"))
        if self.uses_moments:
            moments = meta.start_moments(self.network.theta) if self.moments is None else self.moments
            self.moments = (moments[0].to(self.kept("meta_state_dtype")), moments[1].to(self.kept("meta_state_dtype")))

    def flat(self, tensors: Gradients) -> Tensor:
        parts = zip(tensors, self.values, strict=True)
        return torch.cat([(torch.zeros_like(v) if t is None else t).reshape(-1).to(self.dtype) for t, v in parts])

    def step(self, gradients: Gradients, number: Callable[[Any], Any]) -> None:
        """A step on sound gradients; `number` makes the scalars what the optimizer has them as."""
        options, lr = self.options, self.options["lr"]
        gradient = -self.flat(gradients) if options["maximize"] else self.flat(gradients)
        if float(gradient.dot(gradient)) + lr == 0:
            return  # idle
        assert self.network is not None
        assert self.momentum is not None
        momentum = self.momentum.to(self.dtype, copy=True)
        self.steps += 1
        learning = self.steps % options["meta_every"] == 0
        self.meta_step += learning and options["meta_lr"] > 0
        moments = self.moments if self.uses_moments else None
        scalars = [number(value) for value in (self.meta_step, self.last_lr, lr, True, learning)]
        chosen = {name: options[name] for name in ("beta", "meta_lr", "meta_optimizer", "max_condition")}
        step = lodo_step(gradient, momentum, self.network, moments, *scalars, **chosen)
        words = random_words(0, self.size, -self.steps, gradient.device)
        self.momentum = to_bfloat16(momentum, words) if options["momentum_dtype"] == "bfloat16" else momentum
        self.last_lr = lr
        if options["max_step_norm"] is not None:
            given = zip(self.values, gradients, strict=True)
            x = self.flat([None if gradient is None else value for value, gradient in given])
            step *= self.flat([None if gradient is None else torch.ones_like(gradient) for gradient in gradients])
            factor, is_finite = shorten_(step, x, options["max_step_norm"])
            self.last_lr = lr * float(factor)
            self.skipped += not is_finite
        if options["weight_decay"]:
            step += self.flat(self.values) * (lr * options["weight_decay"])
        parts = step.split([value.numel() for value in self.values])
        for value, gradient, part in zip(self.values, gradients, parts, strict=True):
            if gradient is not None:
                value.copy_(value.to(self.dtype) - part.view(value.shape))

    def copy(self) -> "Replay":
        return copy.deepcopy(self)


def step_all(groups: Sequence[Replay], gradients: Sequence[Gradients], number: Callable[[Any], Any]) -> bool:
    """One call of `step` on all groups; returns whether it was left out because of a bad gradient."""
    given = list(zip(groups, gradients, strict=True))
    moving = [(group, own) for group, own in given if any(g is not None and g.numel() for g in own)]
    is_bad = not all(g.isfinite().all() for _, own in moving for g in own if g is not None)
    for group, own in moving:
        group.prepare()
        if is_bad:
            group.skipped += 1
        else:
            group.step(own, number)
    return is_bad
