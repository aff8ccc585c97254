"""Lines 1 to 4 of Algorithm 1 in few passes over memory, by compiled kernels on the CPU, for a diagonal G.

It knows no part: each writes where its tensors lie, and its numbers of a step, into the structures that the kernels
take.
"""

import ctypes
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lodo import inner_optimizer
from lodo.context import Context
from lodo.kernels import native
from lodo.kernels.structures import Cohort, Group
from lodo.preconditioners import Composite
from lodo.scalars import Number, at_least_one, is_readable
from lodo.update.plain import Plain


class Fused(Plain):
    """`Plain`, of the groups that `can_run` names."""

    operator: Composite

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        theta = self.network.theta
        offsets = [0, *accumulate(self.lengths)]
        self._offsets = (ctypes.c_int64 * len(offsets))(*offsets)
        self._cohort = (ctypes.c_int32 * len(self.lengths))()
        self._sums = (ctypes.c_double * len(self.lengths))()
        self._partition: list[Any] = []
        self._numbers: Any = (Cohort * 1)()
        self._group = Group(
            offsets=ctypes.addressof(self._offsets),
            cohort=ctypes.addressof(self._cohort),
            parameters=len(self.lengths),
            tiny=inner_optimizer.tiny(torch.float64),
            theta_eps=inner_optimizer.EPS,
            largest_theta=self.network.bound,
        )
        for part in self.parts:
            part.bind_kernel(self._group)
        self._advance, self._learn = (native.function(name, theta.dtype) for name in ("advance", "learn_all"))
        self._learn_parts = native.function("learn_parts", theta.dtype)
        self._learn_step = native.function("learn_step", theta.dtype)
        self._energies = native.function("energies", theta.dtype)
        self._step = theta.new_empty(offsets[-1])  # kept, for new memory costs about as much as the step

    @staticmethod
    def can_run(plain: Plain) -> bool:
        """Whether there are kernels for a group: G is diagonal in the coordinates of its parts, which all have them."""
        operator, theta = plain.operator, plain.network.theta
        return (
            isinstance(operator, Composite)
            and plain.network.is_elementwise
            and (plain.network.bound > 0 or not plain.network.learns)
            and all(part.has_kernel for part in plain.parts)
            and is_readable(theta)
            and native.available(theta)
        )

    def begin_(self, at: Context) -> None:
        super().begin_(at)
        self._set_numbers(at)

    def _set_numbers(self, at: Context) -> None:
        partition = [cohort.places for cohort in at.cohorts]
        if partition != self._partition:
            self._partition, self._numbers = partition, (Cohort * len(partition))()
            for number, places in enumerate(partition):
                for place in places:
                    self._cohort[place] = number
        self._group.threads = torch.get_num_threads()
        self._group.diagonal = self.operator.diagonal.data_ptr()  # which a user may move, for it is public
        for numbers, cohort in zip(self._numbers, at.cohorts, strict=True):
            numbers.active, numbers.steps = cohort.active, at_least_one(cohort.steps)
            numbers.lr, numbers.last_lr = cohort.lr * at.unit, cohort.last_lr * at.unit
            if self._learns(at):
                rates = inner_optimizer.cohort_rates(at, cohort, self.network.rate_cap, self.network.theta.dtype)
                numbers.inner = rates[:4]
            for part in self.parts:
                part.set_kernel(numbers, cohort, at)

    def _learns(self, at: Context) -> bool:
        return bool(self.network.learns and at.options["meta_lr"] > 0 and at.learning)

    def energies(self, g: Tensor) -> list[Number]:
        self._group.threads = torch.get_num_threads()
        self._energies(self._group, g.data_ptr(), self._sums)
        return list(self._sums)

    def learn_parts_(self, g: Tensor, at: Context) -> None:
        self._learn_parts(self._group, self._numbers, g.data_ptr())

    def learn_(self, g: Tensor, at: Context) -> None:
        learns, moments, group = self._learns(at), self.moments_in_use(at), self._group
        if learns and moments is not None and moments[0].dtype != g.dtype:
            self.learn_network_(g, at)  # rounding to bfloat16 is not the kernel's
            learns = False
        mean, square = (moments or (None, None)) if learns else (None, None)
        group.theta = self.network.theta.data_ptr() if learns else None
        group.theta_mean = None if mean is None else mean.data_ptr()
        group.theta_square = None if square is None else square.data_ptr()
        group.momentum = self.momentum.m.data_ptr()
        group.judges_step = self._judges_step(at)
        if learns or self._learns_from_response or group.judges_step:
            self._learn(group, self._numbers, g.data_ptr(), self.momentum.judged.data_ptr())
        if learns and at.options["max_condition"] is not None:
            self.operator.bound_condition_(at.options["max_condition"])

    def learn_from_step_(self, g: Tensor, step: Tensor, at: Context) -> None:
        self._learn_step(self._group, self._numbers, g.data_ptr(), step.data_ptr())

    def advance_(self, g: Tensor, at: Context) -> Tensor:
        step, group = self._step, self._group
        idle = None if at.idle is None else (ctypes.c_uint8 * len(self.lengths))(*map(bool, at.idle))
        group.idle = None if idle is None else ctypes.addressof(idle)
        group.gradient, group.step = g.data_ptr(), step.data_ptr()
        group.momentum = self.momentum.m.data_ptr()
        self._complete()
        return step

    def refresh_(self, at: Context) -> None:
        # By the kernel that the steps take, so that what is restored from a state has the same bits.
        self._set_numbers(at)
        self._group.gradient = self._group.step = self._group.idle = None
        self._complete()

    def _complete(self) -> None:
        if self.network.learns:
            torch.exp(self.network.theta, out=self.operator.diagonal)  # logarithms, as `can_run` asks for
        else:
            self.operator.diagonal.fill_(1)
        self._advance(self._group, self._numbers)
