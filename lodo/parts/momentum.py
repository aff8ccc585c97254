"""Line 3 of Algorithm 1: the momentum, m <- beta m + (1 - beta) g, and beyond the paper its trace.

With a trace the gradient also judges the steps before the last one: line 1 takes e in place of m, where
e <- trace_decay * e + m. `lodo.parts.mixture` has a momentum that is learned.
"""

from collections.abc import Container, Mapping, Sequence
from typing import Any

from torch import Tensor

from lodo import kernels
from lodo.context import Cohort, Context
from lodo.declarations import Dtype, Option, Options, Slot, as_float, number, one_of
from lodo.parts.part import Layout, Part
from lodo.rounding import DTYPES, name_of
from lodo.scalars import Number, at_least_one, decay_and_add_, is_tensor


class Momentum(Part):
    """One exponential moving average of the gradients, in the coordinates of G.

    Attributes:
        m: the momentum that steps are made of, shape (n,), in the dtype that is computed in: valid from `load_` to
            `store_`.
    """

    options = {  # noqa: RUF012
        "beta": Option(0.9, number(0, 1), plain=as_float),
        "trace_decay": Option(0.0, number(0, 1), shapes_state=True, plain=as_float),
        "momentum_dtype": Option(
            None, lambda name, value: one_of(*DTYPES)(name, name_of(value)), shapes_state=True, plain=name_of
        ),
    }
    has_kernel = True
    needs_record = False
    is_corrected = False
    """Whether m is corrected for its start at zero."""
    coasts = False
    """Whether it is to know which gradients are zero."""

    @classmethod
    def slots(cls, options: Options, found: Container[str] = ()) -> tuple[Slot, ...]:
        trace = (
            (Slot("momentum_trace", powers=(1,)),) if options["trace_decay"] > 0 or "momentum_trace" in found else ()
        )
        return (Slot("momentum", dtype=Dtype.MOMENTUM, powers=(1,)), *trace)

    def __init__(self, layout: Layout, tensors: Mapping[str, Tensor], options: Options) -> None:
        super().__init__(layout, tensors, options)
        self.kept, self.trace = tensors["momentum"], tensors.get("momentum_trace")
        self.load_()

    def start_(self, missing: Mapping[str, Sequence[int]], x: Sequence[Tensor]) -> None:
        """A trace that starts late starts with the momentum of the last step."""
        if self.trace is not None:
            pairs = list(zip(*(t.split(self.layout.lengths) for t in (self.trace, self.kept)), strict=True))
            for place in missing["momentum_trace"]:
                trace, momentum = pairs[place]
                trace.copy_(momentum)

    def load_(self) -> None:
        """Makes `m` of the momentum that is kept."""
        self.m = self.kept.to(self.layout.dtype)

    def store_(self, count: Number) -> None:
        """Rounds `m`, of step number `count`, into the momentum that is kept, unless they are the same."""
        if self.m is not self.kept:
            kernels.for_rounding(self.m).round_into_(self.kept, self.m, count)

    @property
    def judged(self) -> Tensor:
        """What the last step is judged for: the trace if there is one, else the momentum."""
        return self.m if self.trace is None else self.trace

    @property
    def in_coordinates(self) -> list[Tensor]:
        """All that is to be turned with the coordinates of G, each of shape (n,)."""
        return [self.m] if self.trace is None else [self.trace, self.m]

    def average_(self, g: Tensor, at: Context) -> None:
        """Line 3: takes the rotated gradient in."""
        self.m.lerp_(g, at.per_element(lambda cohort: cohort.active * (1 - at.options["beta"]), g))

    def bias(self, at: Context) -> Number | Tensor:
        """What m is yet to be divided by, for its start at zero; one for each parameter if they differ."""
        return at.per_parameter(lambda cohort: 1 - at.options["beta"] ** at_least_one(cohort.steps), self.m)

    def trace_(self, at: Context) -> None:
        """e <- trace_decay * e + m."""
        if self.trace is not None:
            forget = 1 - at.options["trace_decay"]
            is_active = at.per_element(lambda cohort: cohort.active, self.m)
            m = self.m if not is_tensor(is_active) else self.m * is_active
            decay_and_add_(self.trace, m, at.per_element(lambda cohort: 1 - cohort.active * forget, self.m))

    def bind_kernel(self, group: Any) -> None:
        group.trace = None if self.trace is None else self.trace.data_ptr()

    def set_kernel(self, numbers: Any, cohort: Cohort, at: Context) -> None:
        beta = at.options["beta"]
        numbers.beta, numbers.trace_decay = beta, at.options["trace_decay"]
        numbers.momentum_bias = 1 if self.is_corrected else 1 - beta ** at_least_one(cohort.steps)
