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
from lodo.bases import BASES
from lodo.composite import Composite
from lodo.fused import put_together
from lodo.mixture import Mixture
from lodo.preconditioners import BY_NAME, Operator, Preconditioner
from lodo.rounding import random_words, to_bfloat16
from lodo.scale import Scale
from lodo.step import lodo_step, shorten_

Gradients = Sequence[Tensor | None]
WIDE = {"scale", "mixture"}  # the tables, of float64 whatever the parameters are


class Replay:
    """One param group.

    Attributes:
        values: what the parameters must be.
        options: of the group, complete, lr a plain float.
        network, momentum, moments: None before the first call with a gradient.
        extras: what trace, base, scale and mixture keep, by the names it has in the optimizer's state.
    """

    def __init__(
        self, values: Sequence[Tensor], options: dict[str, Any], learned: Preconditioner | None = None
    ) -> None:
        self.values = [value.detach().clone(memory_format=torch.contiguous_format) for value in values]
        self.options = dict(options)
        self.network: Preconditioner | None = None
        self.momentum: Tensor | None = None
        self.moments: meta.Moments | None = None
        self.extras: dict[str, Tensor] = {}
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

        for name in self.extras.keys() - WIDE:
            self.extras[name] = self.extras[name].to(self.dtype)
        missing = self.missing()
        for name in missing:
            dtype = torch.float64 if name in WIDE else self.dtype
            self.extras[name] = torch.zeros(self.shapes()[name], dtype=dtype)
        if "trace" in missing:
            self.extras["trace"].copy_(self.momentum)
        if "base_exp_avg_sq" in missing:
            BASES[self.options["base"]]([value.shape for value in self.values], self.extras).start_()
        if "mixture" in missing:
            self.mixture().start_(self.options["beta"])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the extras that the options ask for."""
        options, n = self.options, self.size
        found: dict[str, tuple[int, ...]] = {"trace": (n,)} if options["trace"] > 0 else {}
        if options["base"] is not None:
            found |= BASES[options["base"]].tensor_shapes(n, [value.shape for value in self.values])
        if options["decays"] is not None:
            count = len(options["decays"])
            found |= {"momenta": (count, n), "mixture": (3, count, len(self.values))}
        return {**found, "scale": (3, len(self.values)), "moves": (n,)} if options["scale_lr"] > 0 else found

    def missing(self) -> list[str]:
        return [name for name in self.shapes() if name not in self.extras]

    def mixture(self) -> Mixture | None:
        """Of momenta, if the options ask for one."""
        decays, lengths = self.options["decays"], [value.numel() for value in self.values]
        return None if decays is None else Mixture(self.extras["momenta"], self.extras["mixture"], decays, lengths)

    def operator(self, steps: Any) -> Operator:
        """G / lr of the last step."""
        assert self.network is not None
        lengths, shapes = [value.numel() for value in self.values], [value.shape for value in self.values]
        base = None if self.options["base"] is None else BASES[self.options["base"]](shapes, self.extras)
        scale = Scale(self.extras["scale"], self.extras["moves"], lengths) if "scale" in self.extras else None
        return (
            self.network if base is None and scale is None else put_together(self.network, base, scale, steps, lengths)
        )

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
        operator = self.operator(number(float(self.steps)))
        self.steps += 1
        steps = number(float(self.steps))
        learning = self.steps % options["meta_every"] == 0
        self.meta_step += learning and options["meta_lr"] > 0
        moments = self.moments if self.uses_moments else None
        if options["base"] is not None and options["decays"] is None:  # a mixture corrects each of its momenta
            lr = number(lr) / (1 - options["beta"] ** steps)
        if isinstance(operator, Composite) and operator.scale is not None:
            operator.scale.learn_(gradient, options["scale_lr"], steps, number(True))
        scalars = [number(value) for value in (self.meta_step, self.last_lr, float(lr), True, learning)]
        chosen = {name: options[name] for name in ("beta", "meta_lr", "meta_optimizer", "max_condition", "trace")}
        chosen |= {"e": self.extras.get("trace"), "steps": steps}
        chosen |= {"mixture": self.mixture(), "mix_lr": options["mix_lr"]}
        step = lodo_step(gradient, momentum, operator, moments, *scalars, **chosen)
        words = random_words(0, self.size, -self.steps, gradient.device)
        self.momentum = to_bfloat16(momentum, words) if options["momentum_dtype"] == "bfloat16" else momentum
        self.last_lr = lr = float(lr)
        moved = self.flat([None if gradient is None else torch.ones_like(gradient) for gradient in gradients])
        if options["max_step_norm"] is not None:
            given = zip(self.values, gradients, strict=True)
            x = self.flat([None if gradient is None else value for value, gradient in given])
            step *= moved
            factor, is_finite = shorten_(step, x, options["max_step_norm"])
            self.last_lr = lr * float(factor)
            self.skipped += not is_finite
        if isinstance(operator, Composite) and operator.scale is not None:
            step *= moved
            operator.scale.record_(step, options["scale_trace"], number(True))
        if options["weight_decay"]:
            step += self.flat(self.values) * (options["lr"] * options["weight_decay"])
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
