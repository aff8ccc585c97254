"""A learned momentum: m = sum_b w_b m_b, where m_b is an exponential moving average of the gradients with decay b.

How much momentum is good hangs on the noise and on how the curvature changes, and differs from task to task more than
any other hyperparameter: none at all is best to track a moving minimum, much of it in a noisy valley. The weights, a
softmax of u_j on parameter j, are judged as theta is, by the gradient where the last step landed:

    h_jb = -d/du_jb <g, G m> / lr = -w_jb (c_jb - sum_b' w_jb' c_jb'),    c_jb = <(G g)_j, (m_b)_j> / lr
    u_jb <- u_jb - min(mix_lr, RATE_CAP / t) * Adam's normalised h_jb,    |u_jb| <= 30
                                                                            (`lodo.inner_optimizer.descend_`)

All m_b are corrected for their start at zero. None is to outlive what it is made of: while the gradient of a parameter
is zero, or m_b is about as long as its gradients were of late (LONG), what m_b holds decays by COAST or faster.
Averages of many noisy gradients are much shorter than these, and are left alone. But gradients that all point one way
(and the first few, of which nobody can tell) need no long average, and as they fall by orders of magnitude the old
ones in it would come to outweigh all new ones: they would carry the parameter far across its minimum, and let it come
no closer than they are forgotten. And without a gradient a parameter moves on for no longer than it would with Adam.
"""

from collections.abc import Container, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lodo.context import Cohort, Context
from lodo.declarations import Dtype, Kind, Option, Options, Role, Slot, as_float, number
from lodo.inner_optimizer import ROWS, Descent, descend_, descent, descent_per_parameter
from lodo.parts.momentum import Momentum
from lodo.parts.part import Layout
from lodo.scalars import Number, at_least_one, energies, is_tensor

BOUND = 30.0  # of |u|
COAST = 0.9
RECENT = 0.95  # decay of the average energy |g|^2 of the gradients of late
LONG = 0.9  # the largest norm of a momentum over COAST, over the root of that; of equal gradients it would be 1
FIRST_SHARE = 0.9  # of the decay nearest to `beta`, at the start; the others share the rest


def _check_decays(name: str, value: Any) -> None:
    if value is None:
        return
    try:
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise ValueError
        for decay in value:
            number(0, 1)("decay", decay)
    except ValueError:
        raise ValueError(f"{name} must be None or a tuple of numbers >= 0 and < 1, got {value!r}") from None


class Mixture(Momentum):
    """The momenta of one param group, and their weights."""

    options = {  # noqa: RUF012
        "momentum_decays": Option(
            None,
            _check_decays,
            Role.FIXED,
            shapes_state=True,
            plain=lambda value: None if value is None else tuple(map(float, value)),
        ),
        "mix_lr": Option(0.01, number(0), plain=as_float),
    }
    needs_record = True
    learns_from_response = True
    is_corrected = True
    mark, fixed_by = "momenta", "momentum_decays"
    coasts = True

    @classmethod
    def is_used(cls, options: Options) -> bool:
        return options["momentum_decays"] is not None

    @classmethod
    def slots(cls, options: Options, found: Container[str] = ()) -> tuple[Slot, ...]:
        count = len(options["momentum_decays"])
        return (
            *super().slots(options, found),
            Slot("momenta", shape=(count,), powers=(1,)),
            Slot("mixture", Kind.TABLE, (ROWS, count), dtype=Dtype.WIDE, squares=(2,), powers=(0, 2, 4)),
            Slot("recent_energy", Kind.TABLE, dtype=Dtype.WIDE, low=0.0, powers=(2,)),
        )

    def __init__(self, layout: Layout, tensors: Mapping[str, Tensor], options: Options) -> None:
        super().__init__(layout, tensors, options)
        self.momenta = tensors["momenta"]
        self.table = tensors["mixture"].permute(1, 2, 0)  # (3, decays, k)
        self.decays = tuple(options["momentum_decays"])
        self._decays = torch.tensor(self.decays, dtype=self.table.dtype, device=self.table.device)
        self._lengths, self.recent_energy = layout.lengths, tensors["recent_energy"]
        # One with a decay of zero is the gradient, which each step writes anew.
        lasting = [momentum for momentum, decay in zip(self.momenta, self.decays, strict=True) if decay > 0]
        self._in_coordinates = lasting if self.trace is None else [self.trace, *lasting]

    def start_(self, missing: Mapping[str, Sequence[int]], x: Sequence[Tensor]) -> None:
        super().start_(missing, x)
        self._start_weights_(missing["mixture"])

    def _start_weights_(self, places: Sequence[int]) -> None:
        count = len(self.decays)
        nearest = min(range(count), key=lambda index: abs(self.decays[index] - self.chosen["beta"]))
        shares = self._decays.new_full((count,), (1 - FIRST_SHARE) / max(count - 1, 1))
        shares[nearest] = FIRST_SHARE if count > 1 else 1.0
        for place in places:
            self.table[0, :, place] = shares.log()

    def reset_(self) -> None:
        """Momenta, and what belongs to them, are not learned."""
        self.table.zero_()
        self._start_weights_(range(len(self._lengths)))

    @property
    def in_coordinates(self) -> list[Tensor]:
        return self._in_coordinates

    def learn_from_response_(self, response: Tensor, at: Context) -> None:
        """Moves the weights along the hypergradient; lr is left out, for a size that all steps have in common tells
        nothing of the weights."""
        parts = (self.momenta * response).split(self._lengths, dim=1)
        c = torch.stack([part.sum(1) for part in parts], dim=1).to(self.table.dtype)
        c = (c / self._corrections(at, lambda cohort: steps_behind(cohort.steps))).nan_to_num_(0.0, 0.0, 0.0)
        w = self._weights()
        by = descent_per_parameter(at, partial(self._descent, at=at), self.table)
        descend_(self.table, -w * (c - (w * c).sum(0)), by, BOUND)

    @staticmethod
    def _descent(cohort: Cohort, at: Context) -> Descent:
        # After one step all corrected momenta are the same, and what is left of h is rounding.
        active = cohort.active * (cohort.last_lr > 0) * (cohort.steps > 2)
        return descent(at.options["mix_lr"], cohort.steps, active, cohort.age)

    def average_(self, g: Tensor, at: Context) -> None:
        """Takes the gradient into the momenta, and mixes them."""
        active = at.per_element(lambda cohort: cohort.active, g)
        self._take_in_energies_(g, at)
        for momentum, beta in zip(self.momenta, self.decays, strict=True):
            is_stale = self._is_stale(momentum, beta, at) if beta > COAST else None
            momentum.lerp_(g, active * (1 - beta))
            if is_stale is not None:
                factors = g.new_ones(len(self._lengths)).masked_fill_(is_stale, COAST / beta)
                on_host = g.device.type == "cpu"
                parts = list(momentum.split(self._lengths))
                torch._foreach_mul_(parts, factors.tolist() if on_host else list(factors.unbind()))
        w = self._weights() / self._corrections(at, lambda cohort: at_least_one(cohort.steps))
        shares = zip(self.momenta.split(self._lengths, dim=1), w.to(g.dtype).unbind(1), strict=True)
        mixed = torch.empty_like(self.m) if is_tensor(active) else self.m
        for part, (momenta, weights) in zip(mixed.split(self._lengths), shares, strict=True):
            torch.mv(momenta.T, weights, out=part)
        if is_tensor(active):
            self.m.copy_(torch.where(active > 0, mixed, self.m))

    def _take_in_energies_(self, g: Tensor, at: Context) -> None:
        """The first gradient that is not zero is all that there is of late."""
        active = at.per_parameter(lambda cohort: cohort.active, self.recent_energy)
        weights = torch.full_like(self.recent_energy, 1 - RECENT).masked_fill_(self.recent_energy == 0, 1)
        self.recent_energy.lerp_(energies(g, self._lengths).to(weights.dtype), weights * active)

    def _is_stale(self, momentum: Tensor, beta: float, at: Context) -> Tensor:
        """On which parameters one of the momenta, before it takes this gradient in, is to be forgotten faster."""
        steps = at.per_parameter(lambda cohort: steps_behind(cohort.steps), self.recent_energy)
        active = at.per_parameter(lambda cohort: cohort.active, self.recent_energy)
        is_stale = energies(momentum, self._lengths) > (LONG * (1 - beta**steps)) ** 2 * self.recent_energy
        if at.idle is not None:
            flags = torch.stack(list(at.idle)) if is_tensor(at.idle[0]) else torch.tensor(at.idle, device="cpu")  # type: ignore[arg-type]
            is_stale |= flags > 0
        return is_stale & (active > 0) if is_tensor(active) else is_stale

    def bias(self, at: Context) -> Number:
        return 1

    def _weights(self) -> Tensor:
        """w, shape (decays, k)."""
        return self.table[0].contiguous().softmax(0)

    def _corrections(self, at: Context, steps: Any) -> Tensor:
        """1 - b^t, shape (decays, 1 or k)."""
        t = at.per_parameter(steps, self.table)
        return 1 - self._decays[:, None] ** t

    def bind_kernel(self, group: Any) -> None:
        super().bind_kernel(group)
        group.momenta, group.mixture = self.momenta.data_ptr(), self.tensors["mixture"].data_ptr()
        group.decays, group.decay_count = self._decays.data_ptr(), len(self.decays)
        group.coast, group.largest_logit = COAST, BOUND
        group.recent_energy = self.recent_energy.data_ptr()
        group.recent_weight, group.long_momentum = 1 - RECENT, LONG

    def set_kernel(self, numbers: Any, cohort: Cohort, at: Context) -> None:
        super().set_kernel(numbers, cohort, at)
        numbers.mixture = tuple(self._descent(cohort, at))
        numbers.steps_behind = steps_behind(cohort.steps)


def steps_behind(steps: Number) -> Number:
    """Of how many gradients the momenta are made that led to step `steps`."""
    return steps - 1 + (steps < 2)
