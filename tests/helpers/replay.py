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
from lodo.bases import BASES, next_unit
from lodo.composite import Composite
from lodo.fused import put_together
from lodo.mixture import Mixture
from lodo.preconditioners import BY_NAME, Operator, Preconditioner
from lodo.rounding import random_words, to_bfloat16
from lodo.scale import Scale, kept_share, taken_back
from lodo.step import lodo_step, shorten_

Gradients = Sequence[Tensor | None]
WIDE = {"scale", "scale_levels", "mixture", "unit", "reset_at"}  # of float64 whatever the parameters are
FLAGS = {"base_seen"}


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

        for name in self.extras.keys() - WIDE - FLAGS:
            self.extras[name] = self.extras[name].to(self.dtype)
        missing = self.missing()
        for name in missing:
            dtype = torch.uint8 if name in FLAGS else torch.float64 if name in WIDE else self.dtype
            self.extras[name] = torch.zeros(self.shapes()[name], dtype=dtype)
        if "trace" in missing:
            self.extras["trace"].copy_(self.momentum)
        if "base_exp_avg_sq" in missing:
            self.base().start_()
        if "written" in missing:
            self.extras["written"].copy_(self.flat(self.values))
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
        if options["scale_lr"] > 0:
            count = len(self.values)
            found |= {"scale": (3, count), "moves": (n,), "scale_levels": (1 + count,)}
        return {**found, "written": (n,), "unit": (), "reset_at": ()} if found.keys() - {"trace"} else found

    def base(self) -> Any:
        dtypes = [value.dtype for value in self.values]
        return BASES[self.options["base"]]([value.shape for value in self.values], self.extras, dtypes)

    def missing(self) -> list[str]:
        return [name for name in self.shapes() if name not in self.extras]

    def mixture(self) -> Mixture | None:
        """Of momenta, if the options ask for one."""
        decays, lengths = self.options["decays"], [value.numel() for value in self.values]
        return None if decays is None else Mixture(self.extras["momenta"], self.extras["mixture"], decays, lengths)

    def operator(self, steps: Any) -> Operator:
        """G / lr of the last step."""
        assert self.network is not None
        lengths, kept = [value.numel() for value in self.values], self.extras
        base = None if self.options["base"] is None else self.base()
        scale = Scale(kept["scale"], kept["moves"], lengths, kept["scale_levels"]) if "scale" in kept else None
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
        operator = self.operator(number(float(self.steps)))
        self.steps += 1
        steps = number(float(self.steps))
        learning = self.steps % options["meta_every"] == 0
        self.meta_step += learning and options["meta_lr"] > 0
        moments = self.moments if self.uses_moments else None
        if options["base"] is not None and options["decays"] is None:  # a mixture corrects each of its momenta
            lr = number(lr) / (1 - options["beta"] ** steps)
        scale = operator.scale if isinstance(operator, Composite) else None
        share = self.look_back(operator, gradient, number) if "written" in self.extras else None
        unit = self.change_unit(gradient, number)
        momentum = self.momentum.to(self.dtype, copy=True)
        if scale is not None:
            scale.follow_(number(float(options["lr"])), number(True))
            pulled = gradient
            if options["weight_decay"]:
                sizes = [1.0] * len(self.values) if operator.base is None else operator.base.typical(steps - 1)
                pull = [value.to(self.dtype) * size for value, size in zip(self.values, sizes, strict=True)]
                pulled = gradient + self.flat(pull) * options["weight_decay"]
            scale.learn_(pulled, options["scale_lr"], steps, number(self.last_lr > 0))
        scalars = [number(value) for value in (self.meta_step, self.last_lr * unit, float(lr) * unit, True, learning)]
        chosen = {name: options[name] for name in ("beta", "meta_lr", "meta_optimizer", "max_condition", "trace")}
        chosen |= {"e": self.extras.get("trace"), "steps": steps}
        chosen |= {"mixture": self.mixture(), "mix_lr": options["mix_lr"]}
        if "written" in self.extras:
            chosen |= {"age": steps, "share": share}
        if options["decays"] is not None:
            flags = [g is not None and not g.any() for g in gradients]
            chosen |= {"idle": [number(flag) for flag in flags]} if any(flags) else {}
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
        if "written" in self.extras:
            step *= moved
        if options["weight_decay"]:
            decay = self.decay(scale, options["lr"])
            step += decay * moved if "written" in self.extras else decay
        if scale is not None:
            scale.record_(step, options["scale_trace"], number(True))
        parts = step.split([value.numel() for value in self.values])
        for value, gradient, part in zip(self.values, gradients, parts, strict=True):
            if gradient is not None:
                value.copy_(value.to(self.dtype) - part.view(value.shape))
        if "written" in self.extras:
            self.extras["written"].copy_(self.flat(self.values))

    def decay(self, scale: Scale | None, lr: float) -> Tensor:
        """What weight decay subtracts."""
        if scale is None:
            return self.flat(self.values) * (lr * self.options["weight_decay"])
        factors = (scale.factors() * (lr * self.options["weight_decay"])).clamp(max=1).to(self.dtype)
        return self.flat([value.to(self.dtype) * f for value, f in zip(self.values, factors, strict=True)])

    def look_back(self, operator: Any, gradient: Tensor, number: Callable[[Any], Any]) -> Tensor | None:
        """What is left of the last step."""
        x, written = self.flat(self.values), self.extras["written"]
        if self.steps <= 1 or (torch.equal(x, written) and not isinstance(number(0.0), Tensor)):
            if self.options["base"] is not None:
                operator.base.hold_(gradient, self.steps)
            return None
        assert self.momentum is not None
        unit = operator.unit if isinstance(operator, Composite) else 1.0
        step = operator.rotate_back(operator.apply(self.momentum.to(self.dtype)) * (self.last_lr * unit))
        if self.options["weight_decay"]:
            scale = operator.scale if isinstance(operator, Composite) else None
            step = step + self.decay(scale, self.last_lr if scale is None else scale.levels[0])
        change, rounding = x - written, x.abs() * 2 * max(torch.finfo(value.dtype).eps for value in self.values)
        if isinstance(operator, Composite) and operator.scale is not None:
            operator.scale.correct_(change, taken_back(step, change, rounding, slack=1e-2))
        if self.options["base"] is not None:
            is_held = taken_back(step, change, rounding, slack=1e-5) & (step * gradient > 0)
            operator.base.hold_(gradient, self.steps, is_held)
        return kept_share(step, change)

    def change_unit(self, gradient: Tensor, number: Callable[[Any], Any]) -> float:
        """Divides the gradient by the unit that it calls for; returns that."""
        if self.options["base"] is None:
            return 1.0
        before, size = float(self.extras["unit"]), torch.linalg.vector_norm(gradient.double())
        is_readable = not isinstance(number(0.0), Tensor)
        unit = float(next_unit(before, float(size)) if is_readable else next_unit(torch.tensor(before), size))
        self.extras["unit"].fill_(unit)
        if 0 < before != unit:
            self.rescale(before / unit)
        gradient.div_(unit or 1.0)
        return unit or 1.0

    def rescale(self, factor: float) -> None:
        """Another unit for what is kept of gradients, by the power of them that it is."""
        assert self.momentum is not None
        self.momentum *= factor
        for name, power in (("trace", 1), ("momenta", 1), ("base_exp_avg_sq", 2)):
            if name in self.extras:
                self.extras[name] *= factor**power
        for name, power in (("scale", 1), ("mixture", 2)):
            if name in self.extras:
                self.extras[name][1] *= factor**power
                self.extras[name][2] *= factor ** (2 * power)
        if self.moments is not None:
            self.moments[0].mul_(factor)
            self.moments[1].mul_(factor**2)
        if "base_factors" in self.extras:
            self.base().rescale_(factor)
            self.extras["base_exp_avg_sq"] /= factor**2  # which is done above

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
