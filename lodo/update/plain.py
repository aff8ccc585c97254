"""Lines 1 to 4 of Algorithm 1 in plain torch, on any device: the ground truth for every faster way of executing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lodo import inner_optimizer, scalars
from lodo.context import Context
from lodo.parts import Momentum, Part
from lodo.preconditioners import Composite, Operator, Preconditioner
from lodo.scalars import Number, is_tensor


class Plain:
    """What a step does to the tensors of a param group.

    Args:
        operator: G / lr.
        network: that is learned in it.
        moments: of its inner Adam, None for the inner SGD.
        momentum: what the step is made of.
        parts: all there are, the momentum among them.
        lengths: numbers of elements of the parameters.
    """

    def __init__(
        self,
        operator: Operator,
        network: Preconditioner,
        moments: inner_optimizer.Moments | None,
        momentum: Momentum,
        parts: Sequence[Part],
        lengths: Sequence[int],
    ) -> None:
        self.operator, self.network, self.moments = operator, network, moments
        self.momentum, self.parts, self.lengths = momentum, parts, lengths
        self._learns_from_response = any(part.learns_from_response for part in parts)
        self.learns_from_step = any(part.learns_from_step for part in parts)

    def begin_(self, at: Context) -> None:
        """Called first, when everything about a step is known but its outcome."""
        for part in self.parts:
            part.prepare_(at)

    def energies(self, g: Tensor) -> Sequence[Number]:
        """The sum of squares of each parameter's gradient, with no overflow in between."""
        if not self.lengths:
            return []
        found = scalars.energies(g, self.lengths)
        return found.tolist() if scalars.is_readable(found) else found.unbind()

    def learn_parts_(self, g: Tensor, at: Context) -> None:
        """What parts learn from the gradient as it is, shape (n,)."""
        for part in self.parts:
            part.learn_(g, at)

    def learn_(self, g: Tensor, at: Context) -> None:
        """Lines 1 and 2: the rotated gradient g, shape (n,), judges the last step, and the network learns from that."""
        if self._learns_from_response:
            response = self.operator.precondition(g)
            for part in self.parts:
                part.learn_from_response_(response, at)
        # What a part learns from the step may change it.
        step = self.operator.apply(self.momentum.m) if self._judges_step(at) else None
        self.learn_network_(g, at)
        if step is not None:
            self.learn_from_step_(g, step, at)

    def _judges_step(self, at: Context) -> bool:
        """Whether `learn_` is to let parts learn from the step: with weight decay there is more to it."""
        return self.learns_from_step and at.options["weight_decay"] == 0

    def learn_from_step_(self, g: Tensor, step: Tensor, at: Context) -> None:
        """What parts learn from the whole last step, shape (n,), and the gradient, in the same coordinates."""
        for part in self.parts:
            part.learn_from_step_(g, step, at)

    def learn_network_(self, g: Tensor, at: Context) -> None:
        """theta <- InnerOptimizer(theta, h), h = -d/dtheta <g, G(theta) m>."""
        options, network, judged = at.options, self.network, self.momentum.judged
        if not (network.learns and options["meta_lr"] > 0 and (is_tensor(at.learning) or at.learning)):
            return
        if network.is_elementwise:
            rates = inner_optimizer.rates_per_element(at, network.rate_cap, g)
            lr = at.per_element(lambda cohort: cohort.last_lr * at.unit, g)
        else:
            learning = at.learning.to(g.dtype) if is_tensor(at.learning) else at.learning
            kind, meta_lr = options["meta_optimizer"], options["meta_lr"]
            rates = inner_optimizer.rates(kind, meta_lr, at.inner_steps, learning, g.dtype)
            lr = at.last_lr * at.unit
        self.operator.learn_(g, judged, lr, self.moments_in_use(at), rates)
        if options["max_condition"] is not None and at.learning:
            self.operator.bound_condition_(options["max_condition"])

    def moments_in_use(self, at: Context) -> inner_optimizer.Moments | None:
        """Those of the inner Adam; None for the inner SGD, though there be some."""
        return self.moments if at.options["meta_optimizer"] == "adam" else None

    def advance_(self, g: Tensor, at: Context) -> Tensor:
        """Lines 3 and 4: takes the rotated gradient g in; returns the rotated step G(theta) m, shape (n,)."""
        momentum, is_active = self.momentum, at.per_element(lambda cohort: cohort.active, g)
        if not is_tensor(is_active) and not is_active:
            return torch.zeros_like(g)
        for part in self.parts:
            part.update_(g, at)
        momentum.average_(g, at)
        bias = momentum.bias(at)
        for part in self.parts:
            part.follow_(momentum.m, bias, at)
        self.refresh_(at)
        momentum.trace_(at)
        step = self.operator.apply(momentum.m).mul_(at.per_element(lambda cohort: cohort.lr * at.unit, g))
        return step.masked_fill_(is_active == 0, 0) if is_tensor(is_active) else step

    def refresh_(self, at: Context) -> None:
        """Brings what is computed once a step of G up to date."""
        if isinstance(self.operator, Composite):
            self.operator.refresh_(at)
