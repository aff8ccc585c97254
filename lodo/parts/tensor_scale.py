"""A learned scale for each parameter: G' = S^1/2 G S^1/2 with S = exp(s_j) on parameter j, all s_j = 0 at the start.

s_j is judged by all the steps that lately were taken, not by the last one alone: with the trace of the steps,

    E <- scale_trace_decay * E + (what the last step subtracted from the parameters, weight decay included)
    h_j = -<g_j, E_j>,    s_j <- s_j - min(scale_lr, RATE_CAP / t) * Adam's normalised h_j

(`lodo.inner_optimizer.descend_`), and 1e-8 <= S <= 1e8 whatever is learned. h_j is the derivative with respect to s_j
of the loss where the steps have led, each counted by its age, if G mixes no parameters; if it does, the effect of a
parameter's gradient on the others' steps counts for them. A scale learned from the last step alone would fall too early
under noise (short-horizon bias). But steps that were much longer than they are now tell little of the scale as it is:
where lr * S has fallen to less than a LONGER-th of its largest value, E falls along from there on, so that no step in
it counts as more than LONGER times as long as it would be now.
Otherwise long steps across a minimum would drive a scale down for hundreds of steps after it has become short. Steps
that somebody takes back, as a projection does, are taken out of E too.

Where there is no noise to average over, the last few steps know better than the trace, which goes on praising or
blaming a scale for what lies behind. They have a say where they are unambiguous, by

    p <- AGE * p + (1 - AGE) * cos(g_j, what the last step subtracted from j)

Steps that all point down the slope keep the trace from lowering the scale: in part above CLEAR, wholly from SURE on.
Steps that all have gone too far (p below -CLEAR_FALL) lower it at once, by up to BRAKE * scale_lr, before what
oscillates has grown. Where gradients are mostly noise they hardly tell a direction, and p stays near 0. It is not for
single steps to raise a scale: their praise is for the flattest directions, at the cost of the steepest. Gradient
and step have the weight decay in them, as in the trace. Steps without a length, or whose product with the gradient is
close to the smallest numbers, leave p as it is.

Scales come to fall by orders of magnitude, and the hypergradients of all else on their parameters with them: against
the second moment that an inner Adam remembers they would vanish. So network and momenta learn from S^-1 g in place of
g (`unscale`).
"""

import math
from collections.abc import Container, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lodo.context import Cohort, Context
from lodo.declarations import Dtype, Kind, Option, Options, Slot, as_float, number
from lodo.inner_optimizer import ROWS, Descent, descend_, descent, descent_per_parameter
from lodo.parts.part import Layout, Part, Undone
from lodo.parts.record import kept_share, taken_back
from lodo.scalars import decay_and_add_, energies, is_tensor, where

LARGEST_LOG = math.log(1e8)  # of S: nothing that judges it may drive it beyond
AGE = 0.9  # decay of p, the mean cosine of the last steps
CLEAR, SURE = 0.7, 0.9
CLEAR_FALL = 0.3
BRAKE = 3.0
LEAST = 1e8  # times the smallest normal number, that the norms of gradient and step must come to for a cosine
LONGER = 20.0  # times the present lr * S, that a step in the trace may have been made with


class TensorScale(Part):
    """The scales of one param group."""

    options = {  # noqa: RUF012
        "scale_lr": Option(0.0, number(0), shapes_state=True, plain=as_float),
        "scale_trace_decay": Option(0.998, number(0, 1), plain=as_float),
    }
    is_factor = True
    mark = "scale"
    has_kernel = True
    learns_from_step = True

    @classmethod
    def is_used(cls, options: Options) -> bool:
        return bool(options["scale_lr"] > 0)

    @classmethod
    def slots(cls, options: Options, found: Container[str] = ()) -> tuple[Slot, ...]:
        return (
            Slot("scale", Kind.TABLE, (ROWS,), dtype=Dtype.WIDE, squares=(2,), powers=(0, 1, 2)),
            Slot("scale_peak", Kind.TABLE, dtype=Dtype.WIDE, low=0.0),  # the largest lr * S so far
            Slot("trace_peak", Kind.TABLE, dtype=Dtype.WIDE, low=0.0),  # that of the steps in the trace, as they count
            Slot("progress", Kind.TABLE, dtype=Dtype.WIDE, low=-1.0, high=1.0),  # p
            Slot("step_trace"),
        )

    def __init__(self, layout: Layout, tensors: Mapping[str, Tensor], options: Options) -> None:
        super().__init__(layout, tensors, options)
        self.table, self.peak, self.trace = tensors["scale"].T, tensors["scale_peak"], tensors["step_trace"]
        self.trace_peak, self.progress = tensors["trace_peak"], tensors["progress"]
        self._lengths = layout.lengths

    def reset_(self) -> None:
        for tensor in (self.table, self.peak, self.trace, self.trace_peak, self.progress):
            tensor.zero_()

    def correct_(self, g: Tensor, undone: Undone | None, at: Context) -> None:
        """Takes out of the trace the steps that somebody has undone: where a whole one was taken back, the parameters
        would be there whatever the steps before."""
        if undone is not None:
            is_held = taken_back(undone, slack=1e-2)
            self.trace.mul_(kept_share(self.trace, undone.change)).masked_fill_(is_held, 0)

    def prepare_(self, at: Context) -> None:
        """Takes back what s has made up for while lr was small, when it rises.

        A rise of lr is a rise of the step that lr stands for, not of what the scale has made of it: it leaves lr * S on
        no parameter above both lr and the largest lr * S so far.
        """
        s = self.table[0]
        if is_tensor(at.lr):
            last = at.per_parameter(lambda cohort: cohort.scheduled_lr, s)
            lr = at.per_parameter(lambda cohort: where(cohort.active, at.lr, cohort.scheduled_lr), s)
            lr = torch.as_tensor(lr, dtype=s.dtype, device=s.device)
            most = (torch.maximum(self.peak, lr) / lr).log().nan_to_num_(0.0, posinf=0.0)
            s.copy_(torch.where(lr > last, torch.minimum(s, most), s))
            return
        for cohort in at.cohorts:
            if cohort.active and at.lr > cohort.scheduled_lr:
                places = slice(None) if len(at.cohorts) == 1 else list(cohort.places)
                most = (self.peak[places].clamp(min=at.lr) / at.lr).log_()
                s[places] = torch.minimum(s[places], most)

    def learn_(self, g: Tensor, at: Context) -> None:
        descent = descent_per_parameter(at, partial(self._descent, at=at), self.table)
        pairs = zip(g.split(self._lengths), self.trace.split(self._lengths), strict=True)
        h = torch.stack([torch.dot(part, trace) for part, trace in pairs]).neg_()
        s, before = self.table[0], self.table[0].clone()
        descend_(self.table, h, descent, LARGEST_LOG)
        doubt = 1 - ((self.progress - CLEAR) / (SURE - CLEAR)).clamp_(0, 1)
        s.copy_(torch.where((s < before) & (doubt < 1), before + doubt * (s - before), s))

    def learn_from_step_(self, g: Tensor, step: Tensor, at: Context) -> None:
        s, lengths = self.table[0], self._lengths
        pairs = zip(g.split(lengths), step.split(lengths), strict=True)
        sizes = (energies(g, lengths).sqrt_() * energies(step, lengths).sqrt_()).to(s.dtype)
        cosines = torch.stack([torch.dot(*pair) for pair in pairs]).to(s.dtype).div_(sizes)
        # Steps of length zero have told nothing.
        active = at.per_parameter(lambda cohort: cohort.active * (cohort.last_lr > 0), s)
        is_known = cosines.isfinite() & (sizes > LEAST * torch.finfo(g.dtype).tiny)
        weights = is_known.to(s.dtype) * ((1 - AGE) * active)
        self.progress.lerp_(cosines.nan_to_num_(0.0, 0.0, 0.0).clamp_(-1, 1), weights)
        excess = ((-CLEAR_FALL - self.progress) / (1 - CLEAR_FALL)).clamp_(min=0)
        s.sub_(excess.mul_(weights > 0).mul_(BRAKE * at.options["scale_lr"])).clamp_(-LARGEST_LOG, LARGEST_LOG)
        lr = at.per_parameter(lambda cohort: where(cohort.active, at.lr, 0.0), self.table)
        torch.maximum(self.peak, self.table[0].exp().mul_(lr), out=self.peak)

    @staticmethod
    def _descent(cohort: Cohort, at: Context) -> Descent:
        # Steps of length zero have told nothing.
        return descent(at.options["scale_lr"], cohort.steps, cohort.active * (cohort.last_lr > 0), cohort.age)

    def record_(self, step: Tensor, at: Context) -> None:
        self._shorten_trace_(at)
        forget = 1 - at.options["scale_trace_decay"]
        decay_and_add_(self.trace, step, at.per_element(lambda cohort: 1 - cohort.active * forget, step))

    def _shorten_trace_(self, at: Context) -> None:
        """Lets no step in the trace count as longer than LONGER times what it would be now."""
        lr = at.per_parameter(lambda cohort: where(cohort.active, at.lr, 0.0), self.peak)
        length = self.factors().mul_(lr)
        if self._is_long_enough(length):
            return
        peak = torch.maximum(self.trace_peak, length)
        # A step of no length, which a schedule may begin or end with, tells nothing.
        shares = torch.where((length > 0) & (peak > 0), (LONGER * length / peak).clamp_(max=1), 1.0)
        self.trace_peak.copy_(peak * shares)
        on_host = self.trace.device.type == "cpu"
        factors = shares.tolist() if on_host else list(shares.to(self.trace.dtype).unbind())
        torch._foreach_mul_(list(self.trace.split(self._lengths)), factors)

    def _is_long_enough(self, length: Tensor) -> bool:
        """Whether there is nothing to shorten, as in nearly all steps; then it keeps the peaks. On the CPU alone."""
        if self.trace.device.type != "cpu":
            return False
        pairs = [*zip(length.tolist(), self.trace_peak.tolist(), strict=True)]
        if any(0 < LONGER * own < peak for own, peak in pairs):
            return False
        if any(own > peak for own, peak in pairs):
            torch.maximum(self.trace_peak, length, out=self.trace_peak)
        return True

    def times(self, vector: Tensor, power: float) -> Tensor:
        """S^power times a vector of shape (n,)."""
        product = vector.clone()
        self._multiply_(product, power)
        return product

    def _multiply_(self, vector: Tensor, power: float) -> None:
        factors = self.factors(power).to(vector.dtype)
        parts = list(vector.split(self._lengths))
        torch._foreach_mul_(parts, factors.tolist() if vector.device.type == "cpu" else list(factors.unbind()))

    def factors(self, power: float = 1.0) -> Tensor:
        """S^power, shape (k,)."""
        return (power * self.table[0]).clamp_(-LARGEST_LOG, LARGEST_LOG).exp_()

    def multiply_(self, diagonal: Tensor, at: Context) -> None:
        self._multiply_(diagonal, 1.0)

    def unscale(self, g: Tensor) -> Tensor:
        """S^-1 g."""
        return self.times(g, -1.0)

    def step_scales(self) -> Tensor:
        return self.factors()

    def figures(self) -> dict[str, float]:
        scales = self.table[0][torch.tensor(self.layout.lengths, device="cpu").to(self.table.device) > 0].exp()
        return {"scale_min": float(scales.min()), "scale_max": float(scales.max())}

    def bind_kernel(self, group: Any) -> None:
        group.scale, group.scale_peak = self.tensors["scale"].data_ptr(), self.peak.data_ptr()
        group.step_trace, group.largest_log_scale = self.trace.data_ptr(), LARGEST_LOG
        group.progress, group.clear, group.sure, group.clear_fall = self.progress.data_ptr(), CLEAR, SURE, CLEAR_FALL
        group.least = LEAST * torch.finfo(self.trace.dtype).tiny

    def set_kernel(self, numbers: Any, cohort: Cohort, at: Context) -> None:
        numbers.scale = tuple(self._descent(cohort, at))
        numbers.step_weight = (1 - AGE) * (cohort.active and cohort.last_lr > 0)
        numbers.brake = BRAKE * at.options["scale_lr"]
        numbers.peak_lr = at.lr if cohort.active else 0.0
