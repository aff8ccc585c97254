"""What a step is made with: the numbers of its param group, and those of the parameters that share a history."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lodo.declarations import Options
from lodo.scalars import Number, is_tensor


class Cohort(NamedTuple):
    """Parameters of a group that have taken the same steps so far, and whose numbers are the same.

    Most groups are one cohort for ever. A parameter that joins late, or that has a gradient at some steps only, leaves
    it for one of its own: each counts its own steps, as with Adam.

    Attributes:
        places: of its parameters in the group.
        active: whether it takes this step; on an accelerator 0.0 or 1.0.
        learning: whether the network is learned for it in this step, which implies `active`; the same.
        steps: taken, this one included.
        age: of these, the steps since learning began anew (`lodo.LODO.reset`).
        inner_steps: taken by the inner optimizer of gains, this one included.
        last_lr: of its last step, as `max_step_norm` left it.
        lr: of this step, with the correction of the momentum for its start at zero.
        scheduled_lr: of its last step, as the schedule had it.
    """

    places: Sequence[int]
    active: Number
    learning: Number
    steps: Number
    age: Number
    inner_steps: Number
    last_lr: Number
    lr: Number
    scheduled_lr: Number = 0.0


class Index:
    """Where the numbers of cohorts belong: made once for a partition, for a device waits for what it is sent.

    Attributes:
        of_parameter: the number of each parameter's cohort, int64 (k,).
        lengths: numbers of elements, int64 (k,).
    """

    def __init__(self, partition: Sequence[Sequence[int]], lengths: Sequence[int], device: torch.device) -> None:
        index = torch.empty(len(lengths), dtype=torch.int64, device="cpu")
        for number, places in enumerate(partition):
            index[list(places)] = number
        self.of_parameter = index.to(device)
        self.lengths = torch.tensor(lengths, dtype=torch.int64, device="cpu").to(device)


class Context(NamedTuple):
    """What is known of a step before it is taken.

    Attributes:
        options: of the param group.
        lengths: numbers of elements of its parameters.
        cohorts: of its parameters.
        active, learning: of the group: whether any cohort takes the step, and learns in it.
        lr: of this step, as the schedule has it.
        last_lr: of the last step of the group's network, as `max_step_norm` left it.
        unit: what gradients, and all that is kept of them, are divided by (see `lodo.parts.second_moment`).
        idle: whether the gradient of each parameter is zero; None if that of none is.
        share: how much is left of the last step, between 0 and 1, shape (n,); None if all of it is.
        indices: of the cohorts, if there are several.
    """

    options: Options
    lengths: Sequence[int]
    cohorts: Sequence[Cohort]
    active: Number
    learning: Number
    lr: Number
    last_lr: Number
    unit: Number = 1.0
    idle: Sequence[Number] | None = None
    share: Tensor | None = None
    indices: Index | None = None

    def per_parameter(self, number: Callable[[Cohort], Number], like: Tensor) -> Number | Tensor:
        """A number of each cohort: itself if there is one, else for each parameter, shape (k,), in `like`'s dtype."""
        if len(self.cohorts) == 1:
            only = number(self.cohorts[0])
            return only.to(like.dtype) if isinstance(only, Tensor) else only
        numbers = [number(cohort) for cohort in self.cohorts]
        if not any(map(is_tensor, numbers)) and like.device.type == "cpu":
            return torch.tensor(numbers, dtype=like.dtype, device="cpu")[self._index_on(like.device).of_parameter]
        each = [n.to(like.dtype) if is_tensor(n) else like.new_full((), float(n)) for n in numbers]
        return torch.stack(each)[self._index_on(like.device).of_parameter]

    def per_element(self, number: Callable[[Cohort], Number], like: Tensor) -> Number | Tensor:
        """A number of each cohort: itself if there is one, else for each element, shape (n,), in `like`'s dtype."""
        found = self.per_parameter(number, like)
        return found if len(self.cohorts) == 1 else self.spread(found, like)

    def spread(self, numbers: Number | Tensor, like: Tensor) -> Tensor:
        """(k,) numbers, each repeated for the elements of its parameter: (n,)."""
        assert isinstance(numbers, Tensor)
        counts = self._index_on(like.device).lengths
        return torch.repeat_interleave(numbers.to(like.dtype), counts, output_size=sum(self.lengths))

    def _index_on(self, device: torch.device) -> "Index":
        return self.indices or Index([cohort.places for cohort in self.cohorts], self.lengths, device)

    def cohort_of(self, place: int) -> Cohort:
        """That of the parameter at a place."""
        return next(cohort for cohort in self.cohorts if place in cohort.places)

    @property
    def steps(self) -> Number:
        """What the group counts by where it must count as one: see `oldest`."""
        return self._oldest([cohort.steps for cohort in self.cohorts])

    @property
    def inner_steps(self) -> Number:
        """The same of the steps of the inner optimizer."""
        return self._oldest([cohort.inner_steps for cohort in self.cohorts])

    def _oldest(self, counts: Sequence[Number]) -> Number:
        """Of the cohorts that take this step, if any does: what stands still would salt all roundings alike."""
        moving = [
            n for n, cohort in zip(counts, self.cohorts, strict=True) if is_tensor(cohort.active) or cohort.active
        ]
        return oldest(moving or counts)


def oldest(steps: Sequence[Number]) -> Number:
    """The largest count."""
    if len(steps) == 1:
        return steps[0]
    on_device = [count for count in steps if is_tensor(count)]
    return torch.stack(on_device).max() if on_device else max(count for count in steps if not is_tensor(count))
