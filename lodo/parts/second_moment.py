"""Adam's second moment as a part of G: T = D^1/2, D = 1 / (sqrt(v) + eps) (Kingma and Ba, 2015), `base="adam"`.

With an untrained network the step is Adam's, until at step MEMORY / FORGET the average begins to last longer.

The size of gradients. v is of g / unit, and so is all that is kept of gradients: a power of two, 1 if the first
gradients are of ordinary size (`next_unit`). And v is raised at once where the momentum outgrows it (`follow_`), as
after a jump of the loss's scale: |m|^2 is at most LONGEST^2 times the sum of v over each parameter.
"""

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lodo.context import Cohort, Context
from lodo.declarations import Dtype, Kind, Option, Options, Role, Slot, one_of
from lodo.inner_optimizer import capped
from lodo.parts.part import Layout, Part
from lodo.scalars import Column, Number, at_least_one, is_tensor, where

FORGET = 1e-3  # share of v, and of the averages of g g^T, that a step replaces
MEMORY = 10.0  # but at step t at most MEMORY / t: later these are averages over a tenth of the steps
EPS = 1e-8
LONGEST = 4.0  # norm of a parameter's momentum, over the root of the sum of its v
ORDINARY = 2.0**8  # norms of gradients between its inverse and itself are taken as they are,
GROWTH = 2.0**20  # and may grow to so many units before the unit does
LARGEST_UNIT = 2.0**96  # and its inverse the smallest


class SecondMoment(Part):
    """Adam's second moment."""

    options = {"base": Option(None, one_of(None, "adam", "soap"), Role.FIXED, shapes_state=True)}  # noqa: RUF012
    is_factor = True
    has_kernel = True
    changes_gradients = corrects_momentum = True
    mark, fixed_by = "exp_avg_sq", "base"

    @classmethod
    def is_used(cls, options: Options) -> bool:
        return bool(options["base"] == "adam")

    @classmethod
    def slots(cls, options: Options, found: Container[str] = ()) -> tuple[Slot, ...]:
        return (Slot("exp_avg_sq", low=0.0, powers=(2,)), Slot("unit", Kind.TABLE, dtype=Dtype.WIDE, low=0.0))

    def __init__(self, layout: Layout, tensors: Mapping[str, Tensor], options: Options) -> None:
        super().__init__(layout, tensors, options)
        self.exp_avg_sq, self._units = tensors["exp_avg_sq"], Column(tensors["unit"])
        self._next_unit: Number = 1.0
        self._lengths = layout.lengths
        v, rotated = self.exp_avg_sq, self._rotated()
        self._counts = torch.tensor(self._lengths, dtype=v.dtype, device=v.device).clamp(min=1)
        shares = [_rounding(own, v.dtype, n) for own, n in zip(layout.dtypes, self._lengths, strict=True)]
        self.shares = [share if place in rotated else 0.0 for place, share in enumerate(shares)]
        """Of the sum of v over each parameter: where v is no more than this, it is rounding."""
        self._shares_for_kernel = torch.tensor(self.shares, dtype=torch.float64, device="cpu")

    def _rotated(self) -> set[int]:
        """The places of the parameters whose coordinates are not their own."""
        return set()

    @property
    def unit(self) -> Number:  # type: ignore[override]
        """What gradients are divided by; 1 before the first."""
        unit = self._units.get()
        return where(unit > 0, unit, 1.0)

    def normalize(self, energy: Number) -> Number:
        size = energy**0.5
        self._next_unit = next_unit(self._units.get(), size)
        return (size / where(self._next_unit > 0, self._next_unit, 1.0)) ** 2

    def change_unit_(self, g: Tensor, active: Number) -> float:
        before, unit = self._units.get(), self._next_unit
        if is_tensor(unit):
            unit = where(active, unit, before)
            self._units.set(unit)
            g.div_(where(unit > 0, unit, 1.0))
            return 1.0
        factor = before / unit if 0 < before != unit else 1.0
        if unit != before:
            self._units.set(unit)
        if unit > 0 and unit != 1:
            g.mul_(1 / unit)
        return float(factor)

    def update_(self, rotated: Tensor, at: Context) -> None:
        """v <- v + weight * (g^2 - v)."""
        weight = at.per_element(lambda cohort: cohort.active * forget_rate(cohort), rotated)
        self.exp_avg_sq.lerp_(rotated * rotated, weight)

    def follow_(self, m: Tensor, bias: Number | Tensor, at: Context) -> None:
        """Raises v on every parameter whose |m / bias|^2 is more than LONGEST^2 times the sum of its corrected v."""
        parts = list(self.exp_avg_sq.split(self._lengths))
        corrections = at.per_parameter(lambda cohort: bias_correction(cohort.steps), self.exp_avg_sq)
        squares = torch.stack(torch._foreach_norm(parts, 1.0)) / corrections
        momenta = torch.stack(torch._foreach_norm(list(m.split(self._lengths)))) / bias
        factors = (momenta / LONGEST).square() / squares
        is_active = at.per_parameter(lambda cohort: cohort.active, factors)
        is_due = (factors > 1) & factors.isfinite()
        is_due = is_due & (is_active > 0) if is_tensor(is_active) else is_due
        factors = torch.where(is_due, factors, 1.0)
        if factors.device.type != "cpu" or bool((factors > 1).any()):
            torch._foreach_mul_(parts, list(factors.unbind()))

    def gradient_scales(self, at: Context) -> Sequence[Tensor]:
        parts = list(self.exp_avg_sq.split(self._lengths))
        corrections = at.per_parameter(lambda cohort: bias_correction(cohort.steps - 1), self.exp_avg_sq)
        means = torch.stack(torch._foreach_norm(parts, 1.0)) / self._counts / corrections
        return means.sqrt().unbind()

    def multiply_(self, diagonal: Tensor, at: Context) -> None:
        """By D, with v corrected for its start at zero, in units of the gradients themselves."""
        corrections = at.per_element(lambda cohort: bias_correction(cohort.steps), self.exp_avg_sq)
        gains = torch.sqrt(self.exp_avg_sq / corrections).add_(EPS).mul_(self.unit).reciprocal_()
        gains.masked_fill_(self.exp_avg_sq == 0, 0)
        pairs = zip(self.exp_avg_sq.split(self._lengths), gains.split(self._lengths), self.shares, strict=True)
        for v, part, share in pairs:
            if share > 0:
                part.masked_fill_(v <= share * v.sum(), 0)
        diagonal.mul_(gains)

    def bind_kernel(self, group: Any) -> None:
        group.square, group.shares = self.exp_avg_sq.data_ptr(), self._shares_for_kernel.data_ptr()
        group.eps, group.longest = EPS, LONGEST

    def set_kernel(self, numbers: Any, cohort: Cohort, at: Context) -> None:
        numbers.square_weight = cohort.active * forget_rate(cohort)
        numbers.square_bias = bias_correction(cohort.steps)
        numbers.inverse_unit = 1 / self.unit


def forget_rate(cohort: Cohort) -> Number:
    """The weight of this step's gradient in v."""
    return capped(FORGET, MEMORY, at_least_one(cohort.age))


def bias_correction(steps: Number) -> Number:
    """What v is to be divided by for its start at zero; this no longer counts when MEMORY begins to."""
    return 1 - (1 - FORGET) ** at_least_one(steps)


def next_unit(unit: Number, size: Number) -> Number:
    """The unit for gradients whose norm is `size`, given the last one, or 0 before the first.

    1, or else the power of two below the first norm that is not zero, if that is out of the ordinary; and if one that
    the host can read grows to GROWTH units, the power of two below that.
    """
    if is_tensor(unit):
        assert is_tensor(size)
        first = torch.exp2(torch.log2(size).floor()).clamp(1 / LARGEST_UNIT, LARGEST_UNIT)
        first = torch.where((size >= 1 / ORDINARY) & (size <= ORDINARY), 1.0, first)
        return torch.where((unit == 0) & (size > 0) & size.isfinite(), first, unit)
    if not 0 < size < math.inf or (unit > 0 and size <= unit * GROWTH):
        return unit
    if unit == 0 and 1 / ORDINARY <= size <= ORDINARY:
        return 1.0
    return min(max(2.0 ** math.floor(math.log2(size)), 1 / LARGEST_UNIT), LARGEST_UNIT)


def _rounding(own: torch.dtype, computed: torch.dtype, size: int) -> float:
    """The share of the sum of v over a parameter of `size` elements below which a coordinate's v is rounding.

    Of a product of matrices by the dtype that it is computed in: some roundings of the norm of the gradient; of the
    gradients' own dtype: the rounding of each element, at random, and its fluctuation.
    """
    return (8 * torch.finfo(computed).eps) ** 2 + torch.finfo(own).eps ** 2 / max(size, 1)
