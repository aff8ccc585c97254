"""Lines 1 to 4 of Algorithm 1 in two passes over memory, by compiled kernels on the CPU.

For a G that is diagonal in the coordinates of its base. `lodo.step` has the plain form, of many more.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lodo import kernels, meta
from lodo.bases import EPS, LONGEST, AdamBase
from lodo.composite import Composite, is_diagonal
from lodo.mixture import BOUND, COAST, Mixture, descent, made_of
from lodo.preconditioners import LogDiagonal, Preconditioner
from lodo.scalars import Number
from lodo.scale import LARGEST_LOG, Scale


class Fused(Composite):
    """A `Composite` of tensors with these numbers of elements, whose steps it takes with `judge_` and `advance_`."""

    _gains: Tensor

    def __init__(
        self, network: Preconditioner, base: AdamBase | None, scale: Scale | None, steps: float, lengths: Sequence[int]
    ) -> None:
        self._offsets = kernels.offsets(lengths)
        self._shares = None if base is None else torch.tensor(base.shares, dtype=torch.float64, device="cpu")
        super().__init__(network, base, scale, steps)

    def judge_(
        self,
        g: Tensor,
        judged: Tensor,
        lr: float,
        moments: meta.Moments | None,
        rates: meta.Rates | None,
        mixture: Mixture | None,
        mix_lr: float,
        steps: float,
        age: float | None = None,
    ) -> None:
        """Lines 1 and 2: the rotated gradient g judges the last step, made with `lr` from the vector `judged`.

        Theta learns if there are `rates`; the other arguments are those of `lodo.step.lodo_step`.
        """
        inner = None
        if rates is not None and isinstance(self.network, LogDiagonal):
            if moments is None or moments[0].dtype == g.dtype:
                inner = (self.theta, *(moments or (None, None)))
            else:
                self.learn_(g, judged, lr, moments, rates)  # rounding to bfloat16 is not the kernel's
        if inner is not None or mixture is not None:
            by = descent(mix_lr, steps, lr > 0, age)
            vectors, inner = (g, self._gains, judged), inner or (None, None, None)
            tensors = (*vectors, self._table, *inner, *_tensors(mixture), self._offsets)
            kernels.native.judge_(tensors, LARGEST_LOG, lr, made_of(steps), by, rates, BOUND, LogDiagonal.bound)

    def observe_(
        self,
        g: Tensor,
        rotated: Tensor | None,
        kept: Sequence[Tensor],
        active: float,
        steps: float,
        age: float | None = None,
    ) -> Tensor:
        """Turns the coordinates alone: `advance_` does the rest."""
        if self.base is None:
            return g if rotated is None else rotated
        return self.base.turn_(g, rotated, kept, active, steps, age)

    def advance_(
        self,
        g: Tensor,
        m: Tensor,
        e: Tensor | None,
        mixture: Mixture | None,
        steps: float,
        *,
        lr: float,
        beta: float,
        trace: float,
        age: float | None = None,
        idle: Sequence[float] | None = None,
    ) -> Tensor:
        """Lines 3 and 4: takes the rotated gradient g into the base and into m, and m into its trace e; returns the
        rotated step G m, of the G that has been learned."""
        step = torch.empty_like(m)
        flags = None if idle is None else torch.tensor(idle, dtype=torch.uint8, device="cpu")
        bias = 1.0 if mixture is not None or self.base is None else 1 - beta**steps
        self._advance(steps, (g, m, e, step), mixture, age, flags, lr, beta, trace, bias)
        return step

    def _refresh(self, steps: float) -> None:
        # By the kernel that the steps take, so that what is restored from a state has the same bits.
        self._steps, self._root = steps, None
        self._gains = torch.empty(self.size, dtype=self.theta.dtype, device=self.theta.device)
        self._advance(steps)

    def _advance(
        self,
        steps: float,
        vectors: tuple[Tensor | None, ...] = (None,) * 4,
        mixture: Mixture | None = None,
        age: float | None = None,
        idle: Tensor | None = None,
        *numbers: float,
    ) -> None:
        g, m, e, step = vectors
        if isinstance(self.network, LogDiagonal):
            torch.exp(self.theta, out=self._gains)
        else:
            self._gains.fill_(1)
        weight, bias = AdamBase.numbers(steps, age)
        square = None if self.base is None else self.base.exp_avg_sq
        of_base = (square, self._shares, idle)
        tensors = (self._gains, g, m, e, step, self._table, *of_base, *_tensors(mixture), self._offsets)
        fixed = (EPS, self.unit, LONGEST, COAST)
        kernels.native.advance_(tensors, LARGEST_LOG, steps + (steps < 1), weight, bias, *fixed, *numbers)
        self._steps, self._root = steps, None

    @property
    def _table(self) -> Tensor | None:
        return None if self.scale is None else self.scale.table


def put_together(
    network: Preconditioner, base: AdamBase | None, scale: Scale | None, steps: Number, lengths: Sequence[int]
) -> Composite:
    """G / lr of its parts, `Fused` if there are kernels for it; arguments as for that."""
    if is_diagonal(network) and kernels.native.available(network.theta):
        return Fused(network, base, scale, steps, lengths)
    return Composite(network, base, scale, steps)


def _tensors(mixture: Mixture | None) -> tuple[Tensor | None, ...]:
    return (None,) * 3 if mixture is None else (mixture.momenta, mixture.table, mixture.decays)
