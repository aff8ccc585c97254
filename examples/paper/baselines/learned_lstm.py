"""An LSTM as optimizer: "Learning to learn by gradient descent by gradient descent" (Andrychowicz et al., 2016).

The rule sees each coordinate's gradient alone and returns its step. It is trained on runs of its own, and then frozen.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from examples.paper.baselines.quasi_newton import FlatOptimizer
from examples.paper.tasks.base import Task

Memory = tuple[Tensor, ...]
"""Output and cell of the first layer, then of the second, each (hidden, n)."""

LOG_RANGE = 10.0  # the paper's p, appendix A
TINY = 1e-30  # in place of a loss of zero as divisor
MEMORY = ("output_1", "cell_1", "output_2", "cell_2")


def preprocess(gradient: Tensor) -> Tensor:
    """The inputs of the rule, (2, n): (log|g| / p, sign g) where |g| >= e^-p, else (-1, e^p g); appendix A."""
    size = gradient.abs().clamp_(min=math.exp(-LOG_RANGE)).log_().div_(LOG_RANGE)
    return torch.stack((size, (gradient * math.exp(LOG_RANGE)).clamp_(-1, 1)))


class LSTMRule(nn.Module):
    """The paper's rule: a two-layer LSTM of 20 units, one copy per coordinate with shared weights, and a linear output.

    Args:
        hidden: units of a layer.
        output_scale: factor of the output, small so that training starts with small steps.
        dtype: of weights, inputs and steps.
        seed: of the initial weights.

    Raises:
        ValueError: hidden < 1 or output_scale <= 0.
    """

    def __init__(
        self, hidden: int = 20, output_scale: float = 0.1, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> None:
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden!r}")
        if not output_scale > 0:
            raise ValueError(f"output_scale must be above 0, got {output_scale!r}")
        super().__init__()
        self.hidden, self.output_scale = hidden, output_scale
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int) -> nn.Parameter:
            bound = 1 / math.sqrt(hidden)
            weight = torch.empty(shape, dtype=torch.float64).uniform_(-bound, bound, generator=generator)
            return nn.Parameter(weight.to(dtype))

        # rows: input gate, forget gate, output gate, candidate; columns: the layer's input, its last output
        self.weight_1, self.bias_1 = uniform(4 * hidden, 2 + hidden), uniform(4 * hidden, 1)
        self.weight_2, self.bias_2 = uniform(4 * hidden, 2 * hidden), uniform(4 * hidden, 1)
        self.weight_out, self.bias_out = uniform(1, hidden), nn.Parameter(torch.zeros(1, 1, dtype=dtype))

    def start(self, size: int) -> Memory:
        """The memory before the first step on n = `size` coordinates."""
        return tuple(self.weight_1.new_zeros(self.hidden, size) for _ in MEMORY)

    def forward(self, gradient: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The step to add for a gradient (n,), shape (n,), and the new memory."""
        return _apply(dict(self.named_parameters()), self.output_scale, gradient, memory)


def _apply(weights: Mapping[str, Tensor], scale: float, gradient: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    output_1, cell_1, output_2, cell_2 = memory
    output_1, cell_1 = _layer(weights["weight_1"], weights["bias_1"], preprocess(gradient), output_1, cell_1)
    output_2, cell_2 = _layer(weights["weight_2"], weights["bias_2"], output_1, output_2, cell_2)
    step = torch.addmm(weights["bias_out"], weights["weight_out"], output_2)[0] * scale
    return step, (output_1, cell_1, output_2, cell_2)


def _layer(weight: Tensor, bias: Tensor, inputs: Tensor, output: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """One LSTM layer. The candidate is tanh(z / 2) = 2 sigmoid(z) - 1, for a tanh takes as long as three sigmoids."""
    gates = torch.addmm(bias, weight, torch.cat((inputs, output))).sigmoid()
    keep_in, keep, keep_out, candidate = gates.chunk(4)
    cell = torch.addcmul(keep * cell - keep_in, keep_in, candidate, value=2)
    return keep_out * cell.tanh(), cell


def meta_train(
    make_task: Callable[[int], Task],
    rule: LSTMRule,
    *,
    episodes: int = 100,
    steps: int = 200,
    unroll: int = 20,
    lr: float = 1e-2,
) -> list[float]:
    """Trains the rule with Adam on the mean loss of runs that it makes, by backpropagation through time.

    The gradients that the rule sees are constants to it, as in the paper. The meta-gradient of a stretch is relative to
    its losses, and clipped to norm 1. An episode whose loss or meta-gradient turns non-finite ends there.

    Args:
        make_task: makes the task of an episode from its number.
        episodes: runs.
        steps: of a run.
        unroll: steps between two updates of the rule, at least 2; backpropagation goes no further back.
        lr: meta learning rate, which falls linearly to 0 over the episodes.

    Returns:
        The mean loss of each episode; NaN for those that turned non-finite.

    Raises:
        ValueError: episodes < 1, steps or unroll < 2, or lr <= 0.
    """
    for name, value, least in (("episodes", episodes, 1), ("steps", steps, 2), ("unroll", unroll, 2)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value!r}")
    if not lr > 0:
        raise ValueError(f"lr must be above 0, got {lr!r}")
    weights = list(rule.parameters())
    inner = torch.optim.Adam(weights, lr=lr)
    history = []
    for episode in range(episodes):
        inner.param_groups[0]["lr"] = lr * (1 - episode / episodes)
        run, losses = _Run(make_task(episode), rule), list[float]()
        while len(losses) < steps:
            found, meta_loss = run.unroll(min(unroll, steps - len(losses)))
            losses += found
            size = abs(sum(found))
            inner.zero_grad()
            meta_loss.div(max(size, TINY)).backward()
            norm = float(nn.utils.clip_grad_norm_(weights, 1.0))
            if not math.isfinite(size + norm):
                losses.append(math.nan)
                break
            inner.step()
        history.append(sum(losses) / len(losses))
    return history


def trained_rule(make_task: Callable[[int], Task], seed: int = 0, **options: Any) -> LSTMRule:
    """A new rule, trained by `meta_train` with its defaults or `options`; of the parameters' dtype, on their device."""
    like = make_task(0).params[0]
    rule = LSTMRule(dtype=like.dtype, seed=seed).to(like.device)
    meta_train(make_task, rule, **options)
    return rule


class LearnedOptimizer(FlatOptimizer):
    """x <- x + the step of a trained rule, which stays as it is. The state has the rule's memory and weights.

    Args:
        rule: copied; of the parameters' dtype.

    Raises:
        ValueError: if the rule's dtype is not that of params; for params as `FlatOptimizer`.
    """

    def __init__(self, params: ParamsT, rule: LSTMRule) -> None:
        super().__init__(params, {"output_scale": rule.output_scale})
        like = self.param_groups[0]["params"][0]
        if rule.weight_1.dtype != like.dtype:
            raise ValueError(f"rule must be of the parameters' dtype {like.dtype}, got {rule.weight_1.dtype}")
        kept = dict(zip(MEMORY, rule.start(self.size), strict=True)) | dict(rule.named_parameters())
        self._own.update({name: tensor.detach().clone().to(like.device) for name, tensor in kept.items()})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Takes one step on the gradients in `grad`."""
        own = self._own
        memory = tuple(own[name] for name in MEMORY)
        step, memory = _apply(own, self.param_groups[0]["output_scale"], self.gradient(), memory)
        own.update(zip(MEMORY, memory, strict=True))
        self.move(step)


class _Run:
    """A run of the rule on a task, cut into stretches."""

    def __init__(self, task: Task, rule: LSTMRule) -> None:
        self.task, self.rule = task, rule
        self.mover = FlatOptimizer(task.params, {})
        self.memory = rule.start(self.mover.size)

    def unroll(self, steps: int) -> tuple[list[float], Tensor]:
        """Takes steps; returns their losses, and a tensor with the gradient of their sum in the rule's weights.

        The loss f of a step depends on the weights through the stretch's earlier moves alone, so that <grad f, their
        sum> has its gradient, and the task's own `backward` is all that is needed of it.
        """
        self.memory = tuple(part.detach() for part in self.memory)
        moved = self.memory[0].new_zeros(self.mover.size, requires_grad=True)
        meta_loss = moved.new_zeros(())
        losses = []
        for _ in range(steps):
            self.task.draw()
            losses.append(self.task.backward())
            gradient = self.mover.gradient()
            meta_loss = meta_loss + gradient @ moved
            step, self.memory = self.rule(gradient, self.memory)
            self.mover.move(step.detach())
            moved = moved + step
        return losses, meta_loss
