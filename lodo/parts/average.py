"""An average of the iterates, to evaluate and to deploy: what annealing brings, without a schedule.

The end of a training at a constant rate wanders about a minimum with the noise of its last steps. An average of
the iterates is near its middle, and nobody has to say when the training ends, for the average is over a share of the
steps so far, whatever their number (polynomial-decay averaging: Shamir and Zhang, "Stochastic Gradient Descent for
Non-smooth Optimization", ICML 2013, section 4, with eta = 1 / share - 1):

    a <- a + w_t (x - a),    w_t = 1 / (1 + share * (t - 1))

after which a is the mean of the t iterates so far, weighted by about s^(1 / share - 1) at step s: with a share of 1
all count alike, with .1 those of about the last tenth. In long trainings not every iterate is taken in, but every 2nd,
4th, ..., with as much more weight, so that the share of the steps has at least SAMPLES of them: float32 would lose what
is smaller. Of noise that is independent from step to step more is left then, but iterates are not so.

It is of the parameters as each gradient was taken at them, so that what a user makes of a step, a projection say, is in
it. Training knows nothing of it.
"""

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lodo import scalars
from lodo.context import Context
from lodo.declarations import Dtype, Kind, Option, Options, Slot, as_float, number
from lodo.parts.part import Layout, Part
from lodo.scalars import wide

SAMPLES = 512

ITERATE = Slot("iterate", may_be_infinite=True, outlives_shards=True)
"""The parameters themselves, while the averages stand in their place (`lodo.state.averages`)."""


def _check_share(name: str, value: Any) -> None:
    if value is None:
        return
    try:
        number(0)(name, value)
        is_allowed = 0 < float(value) <= 1
    except ValueError:
        is_allowed = False
    if not is_allowed:
        raise ValueError(f"{name} must be a number > 0 and <= 1 or None, got {value!r}")


class Average(Part):
    """The averages of one param group."""

    options = {"average_share": Option(None, _check_share, shapes_state=True, plain=as_float)}  # noqa: RUF012
    has_kernel = True
    needs_record = False
    mark = "average"

    @classmethod
    def is_used(cls, options: Options) -> bool:
        return options["average_share"] is not None

    @classmethod
    def slots(cls, options: Options, found: Container[str] = ()) -> tuple[Slot, ...]:
        average = Slot("average", may_be_infinite=True, outlives_shards=True)
        averaged = Slot("averaged", Kind.TABLE, dtype=Dtype.COUNT, low=0.0, outlives_shards=True)
        return (average, averaged, ITERATE) if ITERATE.name in found else (average, averaged)

    def __init__(self, layout: Layout, tensors: Mapping[str, Tensor], options: Options) -> None:
        super().__init__(layout, tensors, options)
        # Here, for in a CUDA graph nothing can be sent to the device.
        self._lengths = torch.tensor(layout.lengths, dtype=torch.int64, device="cpu").to(layout.device)

    def start_(self, missing: Mapping[str, Sequence[int]], x: Sequence[Tensor]) -> None:
        for place in missing.get(ITERATE.name, ()):
            part = self.tensors[ITERATE.name].split(self.layout.lengths)[place]
            with torch.no_grad():
                part.view(self.layout.shapes[place]).copy_(x[place])

    def reset_(self) -> None:
        self.tensors["averaged"].zero_()

    @property
    def is_wanted(self) -> bool:
        """Whether the group still asks for averages."""
        return self.chosen["average_share"] is not None

    def take_in_(self, x: Tensor, at: Context) -> None:
        """Takes the parameters in, shape (n,), as they are before this step."""
        average, t = self.tensors["average"], self.tensors["averaged"]
        if not self.is_wanted:
            t.zero_()  # should they be asked for again, they begin anew
            return
        active = at.per_parameter(lambda cohort: cohort.active, t)
        t.add_(active)
        weights = _weights(t, self.chosen["average_share"]) * active
        if not scalars.is_readable(weights):
            by_element = self._spread(weights)
            average.add_((x - average).mul_(by_element).masked_fill_(by_element == 0, 0))
            average.copy_(torch.where(average.isnan(), x, average))
            return
        shares = weights.tolist()
        if len(set(shares)) == 1:
            _mix_(average, x, shares[0])
            return
        lengths = self.layout.lengths
        for part, own, weight in zip(average.split(lengths), x.split(lengths), shares, strict=True):
            _mix_(part, own, weight)

    def including(self, x: Tensor) -> Tensor:
        """The averages with the present parameters x in them, shape (n,); where none was taken in, x."""
        t = self.tensors["averaged"].to(wide(x.device))
        weights = self._spread(torch.where(t > 0, 1 / (1 + self.chosen["average_share"] * t), 0))
        found = self.tensors["average"].lerp(x, weights)
        return torch.where((weights > 0) & ~found.isnan(), found, x)

    def _spread(self, numbers: Tensor) -> Tensor:
        """(k,) numbers, each repeated for the elements of its parameter, (n,)."""
        average = self.tensors["average"]
        return torch.repeat_interleave(numbers.to(average.dtype), self._lengths, output_size=len(average))


def _mix_(average: Tensor, x: Tensor, weight: float) -> None:
    """On the CPU. A parameter may hold infinity, as masks do, and one that was NaN may be mended: what is NaN becomes
    x."""
    if weight > 0:
        average.lerp_(x, weight)
        if math.isnan(float(average.sum())):
            average.copy_(torch.where(average.isnan(), x, average))


def _weights(t: Tensor, share: float) -> Tensor:
    """Those that iterate number t, shape (k,), is taken in with; 0 for the ones that are left out."""
    t = t.to(wide(t.device))
    every = torch.exp2((t * (share / SAMPLES)).clamp_(min=1).log2_().floor_())
    return (every / (1 + share * (t - 1))).clamp_(max=1) * (t.remainder(every) == 0)
