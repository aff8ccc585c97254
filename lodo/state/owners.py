"""Whole tensors on several ranks (`sharding="whole"`): each parameter of a mesh of ranks has one owner, chosen by load.

Gradients, and the parameters as they are, go to the owners; each steps on the whole tensors that are its own, as one
process would, and what comes of it goes back to the shards. So what is learned, and what is kept, is that of one
process whatever the number of ranks. An exchange is one packed all-to-all: each rank sends and receives what one rank
has of the parameters, where FSDP2 gathers all of them twice in a step.

In `optimizer.state` whole tensors lie with their owner alone. `shown` spreads them over the ranks for a state dict, and
`taken` brings those of a state dict back to their owners (`lodo.state.loading`); torch's distributed checkpoints see
the state of one process, sharded evenly.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lodo.declarations import Kind, Slot
from lodo.parts.average import ITERATE
from lodo.parts.bases import sides_of, vectors_have_bases
from lodo.scalars import Number
from lodo.state.exchange import Exchange, Finish
from lodo.state.flat import FlatParameters
from lodo.state.group_state import GroupState
from lodo.state.layout import State, allocate, slots_of, views
from lodo.state.sharding import is_dtensor, local, local_gradient, shown_as, slices_on

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

PASSES = 32  # over the elements of a tensor, that a step takes besides the products with its bases

Slices = tuple[slice, ...]

ONE_PROCESS = (1, 0)
"""Of the shards of a group that one process has: see `lodo.state.sharding.signature`."""


def are_owned(group: Mapping[str, Any]) -> bool:
    """Whether the parameters of a group are to have owners."""
    params = group["params"]
    return group["sharding"] == "whole" and bool(params) and is_dtensor(params[0]) and params[0].device_mesh.size() > 1


def costs_of(shapes: Sequence[torch.Size]) -> list[int]:
    """About how much there is to do for each tensor in a step."""
    return [
        math.prod(shape) * (PASSES + sum(side.rank for side in sides))
        for shape, sides in zip(shapes, sides_of(shapes), strict=True)
    ]


def owners_of(shapes: Sequence[torch.Size], ranks: int, known: Mapping[int, int] | None = None) -> list[int]:
    """The rank that each tensor is given to, so that all have about as much to do: the longest first, each to whom has
    the least.

    Args:
        shapes: of all tensors of a group.
        ranks: how many there are.
        known: owners of some of them, by place, who keep them.
    """
    costs, loads, found = costs_of(shapes), [0] * ranks, dict(known or {})
    for place, owner in found.items():
        loads[owner] += costs[place]
    for place in sorted(set(range(len(shapes))) - found.keys(), key=lambda place: (-costs[place], place)):
        found[place] = min(range(ranks), key=loads.__getitem__)
        loads[found[place]] += costs[place]
    return [found[place] for place in range(len(shapes))]


def _placements(p: Tensor) -> "tuple[Placement, ...]":
    assert is_dtensor(p)
    return p.placements


class Owners:
    """The owners of the parameters of one param group, all on one mesh.

    Args:
        params: DTensors.
        known: the owners of parameters that had one, by their ids: who keep them.
        exchange: of their mesh, if there is one.

    Attributes:
        tensors: what this rank works on: the whole tensors of its own parameters, and one without elements for each
            dtype in the group, so that no rank has nothing, all compute alike, and vectors know of matrices elsewhere.
        places: of its own parameters in the group.
        ranks: what groups have in common that are stepped on by the same ranks.
        has_gradients: whether any parameter with elements had a gradient on any rank at the last `gather` of them.
        energy: sum of squares of all gradients, then.
        size: number of elements of all parameters.
    """

    def __init__(
        self, params: Sequence[Tensor], known: Mapping[int, int] | None = None, exchange: Exchange | None = None
    ) -> None:
        self._params = list(params)
        self.mesh: DeviceMesh = params[0].device_mesh  # type: ignore[attr-defined]
        device, shapes = local(params[0]).device, [p.shape for p in params]
        self.exchange = Exchange(self.mesh, device) if exchange is None else exchange
        self.ranks = device, self.mesh
        rank, coordinates = self.exchange.rank, self.exchange.coordinates
        kept = {place: known[id(p)] for place, p in enumerate(params) if known and id(p) in known}
        self.owners = owners_of(shapes, len(coordinates), kept)
        self.places = [place for place, owner in enumerate(self.owners) if owner == rank]
        wholes = [torch.zeros(shapes[place], dtype=params[place].dtype, device=device) for place in self.places]
        shape = (0,) if vectors_have_bases(shapes) else (0, 0)
        dtypes = dict.fromkeys(p.dtype for p in params)
        self.empties = [torch.empty(shape, dtype=dtype, device=device) for dtype in dtypes]
        self.tensors = [*wholes, *self.empties]
        self._of_empties: list[dict[str, Any]] = [{} for _ in self.empties]
        self._slices = [[slices_on(p.shape, _placements(p), self.mesh, at) for at in coordinates] for p in params]
        # The replica that each owner has its gradients from is its own.
        self._sends = [
            [_is_replica_of(p, at, coordinates[owner]) for at in coordinates]
            for p, owner in zip(params, self.owners, strict=True)
        ]
        self.size = sum(map(math.prod, shapes))
        self._has_gradient = [False] * len(params)
        self.has_gradients, self.energy = False, 0.0

    @property
    def wholes(self) -> list[Tensor]:
        """The whole tensors of this rank's parameters, in the order of `places`."""
        return self.tensors[: len(self.places)]

    def fits(self, params: Sequence[Tensor]) -> bool:
        """Whether these are still the parameters that it was made for."""
        if len(params) != len(self._params) or any(p is not own for p, own in zip(params, self._params, strict=True)):
            return False
        return local(params[0]).device == self.exchange.device

    @property
    def by_id(self) -> dict[int, int]:
        """The owners by the ids of the parameters, which it keeps alive."""
        return {id(p): owner for p, owner in zip(self._params, self.owners, strict=True)}

    def work(self, group: dict[str, Any], state: State) -> tuple[dict[str, Any], State]:
        """A group as this rank works on it, and its state, whose entries are those of `optimizer.state`."""
        own = [(whole, self._params[place]) for whole, place in zip(self.wholes, self.places, strict=True)]
        entries: State = {whole: state[p] for whole, p in own if p in state}
        return {**group, "params": self.tensors}, {**entries, **dict(zip(self.empties, self._of_empties, strict=True))}

    # ---- what is in optimizer.state -------------------------------------------------------------------------------

    def mark_(self, state: State) -> None:
        """Tells in `optimizer.state` what other ranks have: under all names a tensor without elements, in the place of
        theirs. torch reads there which names there are."""
        for place, p in enumerate(self._params):
            entry = state[p]
            if self.owners[place] != self.exchange.rank:
                for name in [name for name, value in entry.items() if is_placeholder(value)]:
                    del entry[name]
                entry.update((name, self._placeholder()) for name in self._of_empties[0])
            entry["shards"] = self.mark()

    def marks(self, names: set[str]) -> dict[str, Tensor]:
        """What is in the state of a parameter that another rank has, of which it keeps these."""
        return {**{name: self._placeholder() for name in names}, "shards": self.mark()}

    def mark(self) -> Tensor:
        """What is in the state of every parameter."""
        return torch.tensor(ONE_PROCESS, device=self.exchange.device)

    def _placeholder(self) -> Tensor:
        return torch.empty(0, device=self.exchange.device)

    def restore_(self, options: Mapping[str, Any], state: State) -> None:
        """Gives the tensors without elements what parameters have: what is kept follows from what there is, and must be
        alike on all ranks. With the counts of a parameter that is here, for then they are stepped on together."""
        if any(self._of_empties):
            return
        names = {name for p in self._params for name in state.get(p, ())}
        entries = [state.get(self._params[place], {}) for place in self.places]
        example = next((entry for entry in entries if "step" in entry), {})
        layout = FlatParameters(self.empties).layout
        for slot in slots_of(options, names):
            if slot.name not in names:
                continue
            tables = views(slot, allocate(slot, options, layout), layout)
            for entry, own in zip(self._of_empties, tables, strict=True):
                entry[slot.name] = own
                if slot.kind is Kind.TABLE and slot.name in example:
                    own.copy_(example[slot.name])

    def forget(self) -> None:
        """State was exchanged: what is known of it is no longer true."""
        self._of_empties = [{} for _ in self.empties]

    # ---- a step ---------------------------------------------------------------------------------------------------

    def gather(self, with_gradients: bool = True) -> Finish:
        """Starts to bring the parameters, and their gradients, to their owners; what it returns waits for them.

        A gradient that some ranks do not have is zero there. Where there is none at all nothing is sent.
        """
        gradients = [local_gradient(p) if with_gradients else None for p in self._params]
        has_gradient = [False] * len(gradients)
        if with_gradients:
            has_gradient = self._share_flags(gradients)
            if not self.has_gradients:
                for whole in self.tensors:
                    whole.grad = None
                return lambda: None
        outgoing, incoming = self.exchange.lists(), self.exchange.lists()
        for place, p in enumerate(self._params):
            if self._sends[place][self.exchange.rank]:
                outgoing[self.owners[place]].append(local(p))
                if has_gradient[place]:
                    g = gradients[place]
                    outgoing[self.owners[place]].append(torch.zeros_like(local(p)) if g is None else g.to(p.dtype))
        for whole, place in zip(self.wholes, self.places, strict=True):
            if with_gradients:
                whole.grad = torch.empty_like(whole) if has_gradient[place] else None
            for rank, part in enumerate(self._slices[place]):
                if self._sends[place][rank]:
                    incoming[rank].append(whole[part])
                    if has_gradient[place] and whole.grad is not None:
                        incoming[rank].append(whole.grad[part])
        for empty in self.empties if with_gradients else ():
            empty.grad = torch.empty_like(empty)
        return self.exchange.start(outgoing, incoming, {p.dtype for p in self._params})

    def _share_flags(self, gradients: Sequence[Tensor | None]) -> list[bool]:
        """Tells all ranks which parameters have a gradient anywhere, and the sum of squares of all gradients."""
        sent = [
            g if self._sends[place][self.exchange.rank] else None for place, g in enumerate(gradients)
        ]  # of replicas one
        told = torch.tensor([*(float(g is not None) for g in sent), 0.0], dtype=torch.float64)
        told = told.to(self.exchange.device)
        if own := [g for g in sent if g is not None]:
            told[-1] = torch.stack(torch._foreach_norm(own, dtype=torch.float64)).square_().sum()
        *flags, self.energy = self.exchange.sums(told)
        self._has_gradient = [flag > 0 for flag in flags]
        self.has_gradients = any(has and p.numel() > 0 for has, p in zip(self._has_gradient, self._params, strict=True))
        return self._has_gradient

    def scatter(self, all_of_them: bool = False) -> Finish:
        """Starts to bring the whole tensors back into the shards, those that had a gradient at the last `gather` of
        them, or all; what it returns waits for them."""
        shards = {
            place: local(p)
            for place, (p, has) in enumerate(zip(self._params, self._has_gradient, strict=True))
            if has or all_of_them
        }
        wholes = {place: whole for whole, place in zip(self.wholes, self.places, strict=True) if place in shards}
        return self._spread(wholes, shards, self._slices)

    def _spread(
        self, wholes: Mapping[int, Tensor], shards: Mapping[int, Tensor], slices: Sequence[Sequence[Slices]]
    ) -> Finish:
        """From the owners to all ranks: whole tensors into shards, by place.

        Args:
            wholes: of those places that are this rank's.
            shards: of all that are meant.
            slices: for all parameters, the part that each rank is to have, of the last dimensions.
        """
        outgoing, incoming = self.exchange.lists(), self.exchange.lists()
        for place, whole in wholes.items():
            for rank, part in enumerate(slices[place]):
                index: Any = (..., *part)
                outgoing[rank].append(whole[index])
        for place, shard in shards.items():
            incoming[self.owners[place]].append(shard)
        return self.exchange.start(outgoing, incoming, {shard.dtype for shard in shards.values()})

    def norm(self, vector: Tensor) -> Number:
        """The length of the vectors of all ranks together. The host waits."""
        (square,) = self.exchange.sums(torch.linalg.vector_norm(vector, dtype=torch.float64).square_().reshape(1))
        return square**0.5

    # ---- state dicts ----------------------------------------------------------------------------------------------

    def shown(self, live: GroupState, state: State) -> list[dict[str, Any]]:
        """The state of all parameters, spread over the ranks: what is shaped like a parameter as that is, packed
        tensors evenly, and all of what is small. All ranks must ask together.

        Args:
            live: of the group as this rank works on it.
            state: of it, as of `work`.
        """
        found: list[dict[str, Any]] = [{"shards": self.mark()} for _ in self._params]
        extra = [ITERATE] if ITERATE.name in self._of_empties[0] and ITERATE not in live.layout.slots else []
        for slot in (*live.layout.slots, *extra):
            dtype = self._of_empties[0][slot.name].dtype
            shapes, slices = self._spread_of(slot)
            shards = {
                place: torch.empty(
                    (*shape[: len(shape) - len(part)], *sizes_of(part)), dtype=dtype, device=self.exchange.device
                )
                for place, (shape, part) in enumerate(
                    zip(shapes, (each[self.exchange.rank] for each in slices), strict=True)
                )
            }
            own = {place: state[whole][slot.name] for whole, place in zip(self.wholes, self.places, strict=True)}
            self._spread(own, shards, slices)()
            for place, shard in shards.items():
                found[place][slot.name] = self._as_dtensor(slot, shard, place, shapes[place])
        return found

    def _spread_of(self, slot: Slot) -> tuple[list[tuple[int, ...]], Sequence[Sequence[Slices]]]:
        """The whole shape of each parameter's tensor, and the part of its last dimensions that each rank has in a state
        dict; of tables all."""
        coordinates = self.exchange.coordinates
        if slot.kind is Kind.ELEMENTS:
            return [(*slot.shape, *p.shape) for p in self._params], self._slices
        if slot.kind is Kind.PACKED:
            sizes = [(size,) for size in slot.room([[p.shape for p in self._params]])]
            return list(sizes), [[slices_on(size, self._even, self.mesh, at) for at in coordinates] for size in sizes]
        return [slot.shape for _ in self._params], [[()] * len(coordinates) for _ in self._params]

    @property
    def _even(self) -> "list[Placement]":
        from torch.distributed.tensor import Shard

        return [Shard(0) for _ in range(self.mesh.ndim)]

    def _as_dtensor(self, slot: Slot, shard: Tensor, place: int, whole: Sequence[int]) -> Tensor:
        if slot.kind is Kind.ELEMENTS:
            return shown_as(self._params[place], shard, len(slot.shape))
        if slot.kind is Kind.PACKED:
            from torch.distributed.tensor import DTensor

            return DTensor.from_local(shard, self.mesh, self._even, shape=torch.Size(whole), stride=(1,))
        return shard

    def taken(self, entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Of saved state, what belongs to the parameters of this rank, whole; nothing for the others. All ranks must
        ask together."""
        found: list[dict[str, Any]] = [{} for _ in entries]
        for place, entry in enumerate(entries):
            for name, value in sorted(entry.items()):
                whole = value
                if is_dtensor(value):  # to the device first: one that was offloaded has no process group where it is
                    there: Any = value.to(self.exchange.device)
                    whole = there.full_tensor()
                if self.owners[place] == self.exchange.rank:
                    found[place][name] = whole
        return found

    def agree(self, flag: bool) -> bool:
        """Whether something is so on any rank."""
        return self.exchange.sums(torch.tensor([float(flag)], device=self.exchange.device))[0] > 0


def _is_replica_of(p: Tensor, at: Sequence[int], to: Sequence[int]) -> bool:
    """Whether ranks with these coordinates are in the same replica of a parameter."""
    return all(a == b for a, b, how in zip(at, to, _placements(p), strict=True) if how.is_replicate())


def is_placeholder(value: Any) -> bool:
    """Whether it stands in the place of what another rank has."""
    return isinstance(value, Tensor) and tuple(value.shape) == (0,)


def sizes_of(part: Slices) -> list[int]:
    return [each.stop - each.start for each in part]
