"""How state lies in `optimizer.state`: per parameter, under the names of the slots (`lodo.declarations`).

What belongs to a parameter hangs on that parameter: its own count "step", "momentum", whatever the parts keep, and
"shards", which its group has (`lodo.state.sharding.signature`). What is of one size with it is a view of one vector of
the whole group, as kernels want it. Only a network that acts on the group as a whole ("theta", its inner Adam's
"theta_exp_avg" and "theta_exp_avg_sq", "meta_step", "last_lr") hangs on one parameter, the first that requires
gradients (what there is for others is lost when torch.distributed.checkpoint loads it).

On several ranks: what is shaped like a parameter that is a DTensor is a DTensor like it. The rest is of this rank's
shard alone, and lies there under keys such as "theta_in_4_shards", as DTensors that are made of the ranks' own tensors
(`lodo.state.sharding`). A state from another number of shards is loaded without it, but for `Slot.outlives_shards`.
FSDP1's parameters do not tell which shard they are: there "fsdp1_rank" holds the rank and the number of ranks.
"""

import math
from collections.abc import Container, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lodo.declarations import Dtype, Kind, Options, Slot
from lodo.parts import Layout, parts_of
from lodo.preconditioners import BY_NAME
from lodo.rounding import kept_dtype
from lodo.scalars import wide
from lodo.state.sharding import Sharding, is_dtensor, local, shapes_on_ranks, shown_as

STEP = Slot("step", Kind.TABLE, dtype=Dtype.COUNT, low=0.0)
COMMON = (STEP, Slot("skipped_steps", Kind.TABLE, dtype=Dtype.COUNT, low=0.0))
MARKS = ("shards", "fsdp1_rank", "step")

State = dict[Any, dict[str, Any]]
Entry = Mapping[str, Any]


def slots_of(options: Options, found: Container[str] = ()) -> tuple[Slot, ...]:
    """All that is kept for a param group with these options, where `found` is the names of what there is already."""
    parts = [slot for part in parts_of(options, found) for slot in part.slots(options, found)]
    return (*COMMON, *BY_NAME[options["preconditioner"]].slots(options, found), *parts)


def dtype_of(slot: Slot, options: Options, layout: Layout) -> torch.dtype:
    """What a slot is kept in, for parameters that lie so."""
    return {
        Dtype.COMPUTED: layout.dtype,
        Dtype.MOMENTUM: kept_dtype(options["momentum_dtype"], layout.dtype),
        Dtype.MOMENTS: kept_dtype(options["meta_state_dtype"], layout.dtype),
        Dtype.WIDE: wide(layout.device),
        Dtype.COUNT: torch.int64,
        Dtype.INDEX: torch.int32,
        Dtype.FLAG: torch.uint8,
    }[slot.dtype]


def allocate(slot: Slot, options: Options, layout: Layout) -> Tensor:
    """Zeros for all parameters of a group; not for networks, which start themselves."""
    shape: tuple[int, ...]
    if slot.kind is Kind.ELEMENTS:
        shape = (*slot.shape, sum(layout.lengths))
    elif slot.kind is Kind.TABLE:
        shape = (len(layout.shapes), *slot.shape)
    else:
        shape = (sum(layout.room(slot)),)
    return torch.zeros(shape, dtype=dtype_of(slot, options, layout), device=layout.device)


def views(slot: Slot, tensor: Tensor, layout: Layout) -> list[Tensor]:
    """Each parameter's own of what `allocate` gave."""
    if slot.kind is Kind.ELEMENTS:
        parts = tensor.split_with_sizes(layout.lengths, dim=-1)
        return [part.view((*slot.shape, *shape)) for part, shape in zip(parts, layout.shapes, strict=True)]
    if slot.kind is Kind.TABLE:
        return list(tensor.unbind())
    return list(tensor.split_with_sizes(layout.room(slot)))


def contiguous(entry: Entry) -> Entry:
    """The state of a parameter for a state dict, where tensors with leading dimensions are views that have gaps: gloo
    would broadcast what lies in the gaps."""
    return {
        name: value.contiguous() if isinstance(value, Tensor) and not is_dtensor(value) else value
        for name, value in entry.items()
    }


class StateLayout:
    """How the state of a param group with some options lies in `optimizer.state`.

    Attributes:
        slots: all there are.
        shapes: of the parameters, or of this rank's parts of them.
        size: n, their elements.
        sharding: None if this rank has all of them.
    """

    def __init__(self, params: Sequence[Tensor], options: Options, entries: Sequence[Entry] = ()) -> None:
        self.params, self.options = params, options
        self.found = {name.partition("_in_")[0] for entry in entries for name in map(str, entry)}
        self.slots = slots_of(options, self.found)
        self.sharding = Sharding.of(params)
        self.shapes = [local(p).shape for p in params]
        self.size = sum(shape.numel() for shape in self.shapes)
        self._rooms: dict[str, list[int]] = {}

    @cached_property
    def _on_ranks(self) -> list[list[torch.Size]]:
        """The shapes on all ranks."""
        return [self.shapes] if self.sharding is None else shapes_on_ranks(self.params)

    def key(self, slot: Slot) -> str:
        """The key of a slot in the state of a parameter."""
        if self.sharding is None or slot.kind is Kind.ELEMENTS:
            return slot.name
        return self.sharding.key(slot.name)

    def has_taken_steps(self, entry: Entry) -> bool:
        """Whether the state of a parameter is whole: without a count there is at most what goes on of other shards."""
        return self.key(STEP) in entry

    def shape(self, slot: Slot, place: int = 0) -> tuple[int, ...]:
        """Of this rank's tensor."""
        if slot.kind is Kind.ELEMENTS:
            return (*slot.shape, *self.shapes[place])
        if slot.kind is Kind.TABLE:
            return slot.shape
        if slot.kind is Kind.PACKED:
            if slot.name not in self._rooms:
                self._rooms[slot.name] = slot.room(self._on_ranks)
            return (self._rooms[slot.name][place],)
        return self._network_shape(slot, self.size)

    def _network_shape(self, slot: Slot, size: int) -> tuple[int, ...]:
        """Of a network of the whole group, if that had `size` elements."""
        assert slot.network_shape is not None
        shape = slot.network_shape(size, self.options)
        assert shape is not None
        return shape

    def shape_in_state(self, slot: Slot, place: int = 0) -> tuple[int, ...]:
        """Of what is in the state: of all ranks together, if these have shards."""
        if slot.kind is Kind.ELEMENTS:
            return (*slot.shape, *self.params[place].shape)
        if self.sharding is None:
            return self.shape(slot, place)
        return (self.sharding.shards * self._padded(slot, place),)

    def _padded(self, slot: Slot, place: int) -> int:
        """Numbers in the tensor of the rank that needs most."""
        if slot.kind is Kind.NETWORK:
            assert self.sharding is not None
            return math.prod(self._network_shape(slot, self.sharding.largest))
        return math.prod(self.shape(slot, place))

    @property
    def read_slots(self) -> tuple[Slot, ...]:
        """The tables that are in the state of shards under their own names too, as plain tensors of this rank's
        numbers: "step", for who reads it, and what goes on with another number of shards."""
        if self.sharding is None:
            return ()
        return tuple(slot for slot in self.slots if slot.kind is Kind.TABLE and (slot.outlives_shards or slot is STEP))

    def outlived(self, entry: Entry) -> dict[str, Any]:
        """What of the state of a parameter, of another number of shards, goes on beside its momentum: all or nothing,
        for one does not make sense without another."""
        names = [slot.name for slot in self.slots if slot.outlives_shards]
        return {name: entry[name] for name in names} if all(name in entry for name in names) else {}

    def opened(self, slot: Slot, entry: Entry, place: int = 0) -> Tensor | None:
        """This rank's tensor of what is in the state of the parameter at a place, in the same memory; None if there is
        none."""
        value = entry.get(self.key(slot))
        if value is None and slot.outlives_shards and not self.has_taken_steps(entry):
            return local(entry[slot.name]) if slot.name in entry else None
        if value is not None and slot.kind is Kind.ELEMENTS:
            return local(value)
        if value is None or self.sharding is None:
            return value
        shape = self.shape(slot, place)
        return local(value)[: math.prod(shape)].view(shape)

    def shown(self, slot: Slot, own: Tensor, place: int = 0) -> Tensor:
        """What is to be in the state for this rank's tensor: in the same memory, unless it has to be padded."""
        if slot.kind is Kind.ELEMENTS:
            return shown_as(self.params[place], own, len(slot.shape))
        if self.sharding is None:
            return own
        return self.sharding.spread(own, self._padded(slot, place))


def carrier(params: Sequence[Tensor]) -> Tensor:
    """The parameter in whose state a network is kept that acts on the whole group."""
    return next((p for p in params if p.requires_grad), params[0])
