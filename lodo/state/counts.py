"""How many steps each parameter of a group has taken, and with which learning rates: what makes the cohorts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lodo.context import Cohort, Context, Index, oldest
from lodo.declarations import Options
from lodo.scalars import Cell, Column, Number, at_least_one, both, either, is_tensor, where


class Counts:
    """The counts of one param group.

    Args:
        tensors: of the group's state, by the names of the slots.
        lengths: numbers of elements of the parameters.
        is_elementwise: whether the network belongs to the parameters. One that does not moves all of them: there a
            gradient that is missing counts as zero, once the parameter has taken a step.
        corrects_momentum: whether lr is to correct the momentum for its start at zero.

    Attributes:
        lr: of the present step, as the schedule has it.
        partition: the places of the parameters, those of a cohort together.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], lengths: Sequence[int], is_elementwise: bool, corrects_momentum: bool
    ) -> None:
        self._lengths, self._is_elementwise, self._corrects_momentum = lengths, is_elementwise, corrects_momentum
        self.step, self.skipped = Column(tensors["step"]), Column(tensors["skipped_steps"])
        self.last_lr = Column(tensors["last_lr"].reshape(-1))
        self.meta_step = Column(tensors["meta_step"].reshape(-1)) if "meta_step" in tensors else None
        self._network_step = Column(tensors["network_step"].reshape(-1)) if "network_step" in tensors else None
        self.scheduled_lr = Column(tensors["scheduled_lr"]) if "scheduled_lr" in tensors else None
        self.reset_at = Column(tensors["reset_at"]) if "reset_at" in tensors else None
        self._dtype = self.last_lr.tensor.dtype
        self.lr = Cell(torch.zeros_like(self.last_lr.tensor[0]))
        self._started = {place for place, count in enumerate(self.step.tensor.tolist()) if count > 0}
        self.partition = self._same_numbers()
        self._indexed: list[tuple[int, ...]] = []
        self._kept_index: Index
        pinned = self.step.tensor.device.type == "cuda"
        self._mailbox = torch.empty((), dtype=torch.int64, device="cpu", pin_memory=pinned)
        self._mailbox.copy_(self.skipped.tensor[0])
        self._skips_before = int(self._mailbox)

    def _same_numbers(self) -> list[tuple[int, ...]]:
        """The places of the parameters, together where all numbers are the same."""
        columns = [self.step, self.meta_step, self.last_lr, self.scheduled_lr, self.reset_at]
        shared = [column.tensor.tolist() for column in columns if column is not None and self._is_own(column)]
        found: dict[tuple[Any, ...], list[int]] = {}
        for place, key in enumerate(zip(*shared, strict=True)):
            found.setdefault(key, []).append(place)
        return [tuple(places) for places in found.values()]

    def _is_own(self, column: Column) -> bool:
        """Whether each parameter has a number of its own."""
        return self._is_elementwise or column not in (self.meta_step, self.last_lr)

    def begin(self, options: Options, active: Number, has_gradient: Sequence[bool]) -> Context:
        """Counts the step that is to be taken, and tells what is known of it.

        Args:
            options: of the group.
            active: whether the step is taken at all.
            has_gradient: whether each parameter has one.
        """
        if len(self.partition) > 1 and not is_tensor(active):
            self.partition = self._same_numbers()  # as a state that is loaded has them
        takes = has_gradient if all(has_gradient) else self._takes(active, has_gradient)
        self._split(takes)
        if not is_tensor(active) and len(self._started) < len(takes):
            self._started.update(place for place, is_taking in enumerate(takes) if is_taking is True)
        is_one = len(self.partition) == 1
        actives = [self._active(places[0], active, takes[places[0]]) for places in self.partition]
        for places, own in zip(self.partition, actives, strict=True):
            if own is not False:
                self.step.add(own, None if is_one else places)
        if self._network_step is not None:
            self._network_step.add(active)
        learns = [self._learning(options, places[0], own) for places, own in zip(self.partition, actives, strict=True)]
        learning = either(learns) if self._is_elementwise else self._learning(options, 0, active)
        if self.meta_step is not None and options["meta_lr"] > 0:
            if not self._is_elementwise or is_one:
                self.meta_step.add(learning)
            else:
                for places, own in zip(self.partition, learns, strict=True):
                    self.meta_step.add(own, places)
        return self._context(options, active, learning, actives, learns)

    def _learning(self, options: Options, place: int, active: Number) -> Number:
        """Whether a step of the cohort of a parameter is one at which the network is learned."""
        if options["meta_every"] == 1 or active is False:
            return active
        count = self._count(place) if self._network_step is None else self._network_step.get()
        return both(active, count % options["meta_every"] == 0)

    def _takes(self, active: Number, has_gradient: Sequence[bool]) -> Sequence[bool | None]:
        """Whether each parameter takes the step; None where only the device knows whether it has taken one before."""
        if self._is_elementwise:
            return has_gradient
        unknown = None if is_tensor(active) else False
        return [has or (place in self._started) or unknown for place, has in enumerate(has_gradient)]

    def _active(self, place: int, active: Number, takes: bool | None) -> Number:
        """Whether the cohort of a parameter takes the step."""
        if takes is None:
            return both(active, self.step.get(place) > 0)
        return active if takes else False

    def resting(self, options: Options) -> Context:
        """What is known between two steps."""
        nothing = [False] * len(self.partition)
        return self._context(options, False, False, nothing, nothing)

    def _context(
        self,
        options: Options,
        active: Number,
        learning: Number,
        actives: Sequence[Number],
        learns: Sequence[Number],
    ) -> Context:
        cohorts = [
            self._cohort(options, places, self._computable(own), self._computable(learns_too))
            for places, own, learns_too in zip(self.partition, actives, learns, strict=True)
        ]
        at = Context(options, self._lengths, cohorts, active, learning, self.lr.get(), self.last_lr.get())
        return at if len(cohorts) == 1 else at._replace(indices=self._index())

    def _index(self) -> Index:
        if self._indexed != self.partition:
            self._indexed = self.partition
            self._kept_index = Index(self.partition, self._lengths, self.step.tensor.device)
        return self._kept_index

    def _cohort(self, options: Options, places: tuple[int, ...], active: Number, learning: Number) -> Cohort:
        place = places[0]
        own = place if self._is_elementwise else 0
        steps = self._count(place)
        inner_steps = 0 if self.meta_step is None else self._computable(self.meta_step.get(own))
        lr = self.lr.get()
        if self._corrects_momentum:
            lr = lr / (1 - options["beta"] ** at_least_one(steps if self._is_elementwise else self._oldest()))
        age = inner_steps if self.reset_at is None else steps - self.reset_at.get(place)
        scheduled_lr = 0.0 if self.scheduled_lr is None else self.scheduled_lr.get(place)
        return Cohort(places, active, learning, steps, age, inner_steps, self.last_lr.get(own), lr, scheduled_lr)

    def _count(self, place: int) -> Number:
        """The steps taken, to compute with."""
        return self._computable(self.step.get(place))

    def _computable(self, count: Number) -> Number:
        """A tensor is not to be of integers, whose powers would be of float32."""
        return count.to(self._dtype) if is_tensor(count) else count

    def _oldest(self) -> Number:
        return oldest([self._count(places[0]) for places in self.partition])

    def _split(self, takes: Sequence[bool | None]) -> None:
        """Parts the cohorts of which only some parameters take the next step."""
        if all(takes):
            return
        found: list[tuple[int, ...]] = []
        for places in self.partition:
            kinds = (True, None, False)
            found.extend(tuple(place for place in places if takes[place] is kind) for kind in kinds)
        self.partition = [places for places in found if places]

    def keep_lr(self, at: Context, factor: Number) -> None:
        """Keeps the lr that the step is made with: what shortens it by a factor makes it a step of a smaller one."""
        is_one = len(at.cohorts) == 1
        for cohort in at.cohorts:
            if is_tensor(cohort.active) or cohort.active:
                places = None if is_one or not self._is_elementwise else cohort.places
                self.last_lr.set(where(cohort.active, cohort.lr * factor, cohort.last_lr), places)
                if self.scheduled_lr is not None:
                    lr = where(cohort.active, at.lr, cohort.scheduled_lr)
                    self.scheduled_lr.set(lr, None if is_one else cohort.places)

    def reset_(self) -> None:
        """Counts the steps since learning began anew from here on."""
        if self.reset_at is not None:
            self.reset_at.tensor.copy_(self.step.tensor)
            self.partition = self._same_numbers()

    def new_skips(self) -> int:
        """How many steps were skipped since this was made.

        On CUDA the count comes in by itself, some steps late: the host reads what has arrived and never waits.
        """
        self._mailbox.copy_(self.skipped.tensor[0], non_blocking=True)
        return int(self._mailbox.numpy()) - self._skips_before
