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
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lodo.declarations import Kind, Slot
from lodo.parts.average import ITERATE
from lodo.parts.bases import LARGEST_VECTOR, sides_of
from lodo.scalars import Number
from lodo.state.flat import FlatParameters
from lodo.state.group_state import GroupState
from lodo.state.layout import State, allocate, slots_of, views
from lodo.state.sharding import is_dtensor, local, local_gradient, shown_as, slices_on

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

PASSES = 32  # over the elements of a tensor, that a step takes besides the products with its bases

Finish = Callable[[], None]
Slices = tuple[slice, ...]

ONE_PROCESS = (1, 0)
"""Of the shards of a group that one process has: see `lodo.state.sharding.signature`."""


def are_owned(group: Mapping[str, Any]) -> bool:
    """Whether the parameters of a group are to have owners."""
    params = group["params"]
    return group["sharding"] == "whole" and bool(params) and is_dtensor(params[0]) and params[0].device_mesh.size() > 1


def owners_of(shapes: Sequence[torch.Size], ranks: int) -> list[int]:
    """The rank that each tensor is given to, so that all have about as much to do: the longest first, each to whom has
    the least. Vectors that share a full basis stay together."""
    if all(len(shape) < 2 for shape in shapes) and sum(map(math.prod, shapes)) <= LARGEST_VECTOR:
        return [0] * len(shapes)
    costs = [
        math.prod(shape) * (PASSES + sum(side.rank for side in sides))
        for shape, sides in zip(shapes, sides_of(shapes), strict=True)
    ]
    loads, found = [0] * ranks, [0] * len(shapes)
    for place in sorted(range(len(shapes)), key=lambda place: -costs[place]):
        found[place] = min(range(ranks), key=loads.__getitem__)
        loads[found[place]] += costs[place]
    return found


@lru_cache(maxsize=64)
def _ranks_of(mesh: "DeviceMesh") -> "tuple[dist.ProcessGroup, list[tuple[int, ...]]]":
    """The ranks of a mesh as one process group, and their coordinates in the mesh, in the group's order."""
    ranks = mesh.mesh.flatten().tolist()
    group: dist.ProcessGroup | None
    if mesh.ndim == 1:
        group = mesh.get_group()
    elif sorted(ranks) == list(range(dist.get_world_size())):
        group = dist.group.WORLD
    else:
        group = dist.new_group(sorted(ranks), use_local_synchronization=True)
    assert group is not None
    found = [(mesh.mesh == rank).nonzero()[0].tolist() for rank in dist.get_process_group_ranks(group)]
    return group, [tuple(coordinates) for coordinates in found]


def _placements(p: Tensor) -> "tuple[Placement, ...]":
    assert is_dtensor(p)
    return p.placements


class Owners:
    """The owners of the parameters of one param group, all on one mesh.

    Args:
        params: DTensors.

    Attributes:
        tensors: what this rank works on: the whole tensors of its own parameters, and one without elements, so that no
            rank has nothing, and that tells vectors of matrices elsewhere.
        places: of its own parameters in the group.
        has_gradients: whether any parameter with elements has a gradient on any rank, since the last `gather`.
        energy: sum of squares of all gradients, since then.
        size: number of elements of all parameters.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = list(params)
        self.mesh: DeviceMesh = params[0].device_mesh  # type: ignore[attr-defined]
        self.group, self.coordinates = _ranks_of(self.mesh)
        self.rank = dist.get_rank(self.group)
        shapes = [p.shape for p in params]
        self.owners = owners_of(shapes, len(self.coordinates))
        self.places = [place for place, owner in enumerate(self.owners) if owner == self.rank]
        device = local(params[0]).device
        wholes = [torch.zeros(shapes[place], dtype=params[place].dtype, device=device) for place in self.places]
        is_vectors = all(len(shape) < 2 for shape in shapes) and self.owners == [0] * len(shapes)
        self.nothing = torch.empty((0,) if is_vectors else (0, 0), dtype=params[0].dtype, device=device)
        self.tensors = [*wholes, self.nothing]
        self._of_nothing: dict[str, Any] = {}
        self._elsewhere = torch.empty(0, device=device)
        self._slices = [[slices_on(p.shape, _placements(p), self.mesh, at) for at in self.coordinates] for p in params]
        # The replica that each owner has its gradients from is its own.
        self._sends = [
            [self._is_sent(p, at, owner) for at in self.coordinates]
            for p, owner in zip(params, self.owners, strict=True)
        ]
        self.size = sum(map(math.prod, shapes))
        self.has_gradients = False
        self.energy: Number = 0.0

    def _is_sent(self, p: Any, at: Sequence[int], owner: int) -> bool:
        to = self.coordinates[owner]
        return all(a == b for a, b, how in zip(at, to, p.placements, strict=True) if how.is_replicate())

    def fits(self, params: Sequence[Tensor]) -> bool:
        """Whether these are still the parameters that it was made for."""
        return len(params) == len(self._params) and all(p is own for p, own in zip(params, self._params, strict=True))

    def work(self, group: dict[str, Any], state: State) -> tuple[dict[str, Any], State]:
        """A group as this rank works on it, and its state, whose entries are those of `optimizer.state`."""
        own = [(whole, self._params[place]) for whole, place in zip(self.tensors, self.places, strict=False)]
        entries: State = {whole: state[p] for whole, p in own if p in state}
        return {**group, "params": self.tensors}, {**entries, self.nothing: self._of_nothing}

    def mark_(self, state: State) -> None:
        """Tells in `optimizer.state` what other ranks have: under all names a tensor without elements, in the place of
        theirs. torch reads there which names there are."""
        for place, p in enumerate(self._params):
            entry = state[p]
            if self.owners[place] != self.rank:
                for name in [name for name, value in entry.items() if value is self._elsewhere]:
                    del entry[name]
                entry.update(dict.fromkeys(self._of_nothing, self._elsewhere))
            entry["shards"] = self.mark()

    def mark(self) -> Tensor:
        """What is in the state of every parameter."""
        return torch.tensor(ONE_PROCESS, device=self.nothing.device)

    # ---- a step ---------------------------------------------------------------------------------------------------

    def gather(self, with_gradients: bool = True) -> Finish:
        """Starts to bring the parameters, and their gradients, to their owners; what it returns waits for them.

        A gradient that some ranks do not have is zero there.
        """
        gradients = [local_gradient(p) if with_gradients else None for p in self._params]
        if with_gradients:
            self._share_flags(gradients)
        else:
            self._has_gradient = [False] * len(self._params)
        outgoing: list[list[Tensor]] = [[] for _ in self.coordinates]
        for place, p in enumerate(self._params):
            if self._sends[place][self.rank]:
                outgoing[self.owners[place]].append(local(p))
                if self._has_gradient[place]:
                    g = gradients[place]
                    outgoing[self.owners[place]].append(torch.zeros_like(local(p)) if g is None else g.to(p.dtype))
        for own, place in zip(self.tensors, self.places, strict=False):
            own.grad = torch.empty_like(own) if self._has_gradient[place] else None
        self.nothing.grad = torch.empty_like(self.nothing) if self.has_gradients else None
        incoming: list[list[Tensor]] = [[] for _ in self.coordinates]
        for own, place in zip(self.tensors, self.places, strict=False):
            for rank, part in enumerate(self._slices[place]):
                if self._sends[place][rank]:
                    incoming[rank].append(own[part])
                    if own.grad is not None:
                        incoming[rank].append(own.grad[part])
        return self._exchange(outgoing, incoming, {p.dtype for p in self._params})

    def _share_flags(self, gradients: Sequence[Tensor | None]) -> None:
        """Tells all ranks which parameters have a gradient anywhere, and the sum of squares of all gradients."""
        own = [g for place, g in enumerate(gradients) if g is not None and self._sends[place][self.rank]]
        flags = [float(g is not None) for g in gradients]
        told = torch.tensor([*flags, 0.0], dtype=torch.float64, device=self.nothing.device)
        if own:
            told[-1] = torch.stack(torch._foreach_norm(own, dtype=torch.float64)).square_().sum()
        found = [torch.empty_like(told) for _ in self.coordinates]
        dist.all_gather(found, told, group=self.group)
        *flags, self.energy = torch.stack(found).sum(0).tolist()
        self._has_gradient = [flag > 0 for flag in flags]
        self.has_gradients = any(has and p.numel() > 0 for has, p in zip(self._has_gradient, self._params, strict=True))

    def scatter(self) -> Finish:
        """Starts to bring the whole tensors back into the shards; what it returns waits for them."""
        return self._spread(self.tensors[:-1], [local(p) for p in self._params], self._slices)

    def _spread(self, wholes: Sequence[Tensor], shards: Sequence[Tensor], slices: Sequence[Sequence[Slices]]) -> Finish:
        """From the owners to all ranks: a tensor for each own parameter into one for each parameter.

        Args:
            wholes: for the own parameters.
            shards: for all parameters.
            slices: for all parameters, the part that each rank is to have, of the last dimensions.
        """
        outgoing: list[list[Tensor]] = [[] for _ in self.coordinates]
        for whole, place in zip(wholes, self.places, strict=True):
            for rank, part in enumerate(slices[place]):
                index: Any = (..., *part)
                outgoing[rank].append(whole[index])
        incoming: list[list[Tensor]] = [[] for _ in self.coordinates]
        for shard, owner in zip(shards, self.owners, strict=True):
            incoming[owner].append(shard)
        return self._exchange(outgoing, incoming, {shard.dtype for shard in shards})

    def _exchange(
        self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Tensor]], dtypes: set[torch.dtype]
    ) -> Finish:
        """Sends tensors to each rank, and fills those that come from each: alike there in number, order and shape. One
        all-to-all for each dtype, as bytes."""
        pending = []
        for dtype in sorted(dtypes, key=str):
            sent = [[t.reshape(-1) for t in each if t.dtype == dtype] for each in outgoing]
            wanted = [[t for t in each if t.dtype == dtype] for each in incoming]
            pending.append(self._send(sent, wanted, dtype))

        def finish() -> None:
            for work, _, received, targets in pending:
                work.wait()
                parts = received.split([target.numel() for target in targets])
                for target, part in zip(targets, parts, strict=True):
                    target.copy_(part.view(target.shape))

        return finish

    def _send(
        self, sent: Sequence[Sequence[Tensor]], wanted: Sequence[Sequence[Tensor]], dtype: torch.dtype
    ) -> tuple[Any, Tensor, Tensor, list[Tensor]]:
        targets = [t for each in wanted for t in each]
        nothing = torch.empty(0, dtype=dtype, device=self.nothing.device)
        packed = torch.cat([nothing, *(t for each in sent for t in each)])
        received = packed.new_empty(sum(t.numel() for t in targets))
        work = dist.all_to_all_single(
            received.view(torch.uint8),
            packed.view(torch.uint8),
            [dtype.itemsize * sum(t.numel() for t in each) for each in wanted],
            [dtype.itemsize * sum(t.numel() for t in each) for each in sent],
            group=self.group,
            async_op=True,
        )
        return work, packed, received, targets  # what is sent has to stay until then

    def norm(self, vector: Tensor) -> Number:
        """The length of the vectors of all ranks together."""
        square = torch.linalg.vector_norm(vector, dtype=torch.float64).square_().reshape(1)
        dist.all_reduce(square, group=self.group)
        return float(square) ** 0.5

    # ---- state dicts ----------------------------------------------------------------------------------------------

    def shown(self, live: GroupState, state: State) -> list[dict[str, Any]]:
        """The state of all parameters, spread over the ranks: what is shaped like a parameter as that is, packed
        tensors evenly, and all of what is small. All ranks must ask together."""
        found: list[dict[str, Any]] = [{"shards": self.mark()} for _ in self._params]
        shapes = [p.shape for p in self._params]
        at_averages = [ITERATE] if ITERATE.name in self._of_nothing and ITERATE not in live.layout.slots else []
        for slot in (*live.layout.slots, *at_averages):
            own = [state[whole][slot.name] for whole in self.tensors[:-1]]
            tensor = self._of_nothing[slot.name]
            if slot.kind is Kind.ELEMENTS:
                slices, wholes = self._slices, [(*slot.shape, *shape) for shape in shapes]
            elif slot.kind is Kind.PACKED:
                wholes = [(size,) for size in slot.room([shapes])]
                slices = [[slices_on(size, self._even, self.mesh, at) for at in self.coordinates] for size in wholes]
            else:
                slices, wholes = [[()] * len(self.coordinates) for _ in shapes], [slot.shape for _ in shapes]
            lead = len(slot.shape) if slot.kind is Kind.ELEMENTS else 0
            shards = [
                tensor.new_empty((*whole[:lead], *size_of(whole[lead:], part[self.rank])))
                for whole, part in zip(wholes, slices, strict=True)
            ]
            self._spread(own, shards, slices)()
            for place, shard in enumerate(shards):
                found[place][slot.name] = self._as_dtensor(slot, shard, place, wholes[place])
        return found

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
                whole = value.full_tensor() if is_dtensor(value) else value
                if self.owners[place] == self.rank:
                    found[place][name] = whole
        return found

    def fill_(self, options: Mapping[str, Any], names: set[str]) -> None:
        """Gives the tensor without elements all that parameters have, of which these entries were saved: what is kept
        follows from what there is, and must be alike on all ranks."""
        layout = FlatParameters([self.nothing]).layout
        slots = slots_of(options, names) if "step" in names else ()
        self._of_nothing = {slot.name: views(slot, allocate(slot, options, layout), layout)[0] for slot in slots}

    def agree(self, is_refused: bool) -> bool:
        """Whether any rank has refused something."""
        flag = torch.tensor([float(is_refused)], device=self.nothing.device)
        dist.all_reduce(flag, group=self.group)
        return bool(flag)


def size_of(whole: Sequence[int], part: Slices) -> list[int]:
    """The shape of a part of a tensor."""
    return (
        [len(range(*each.indices(length))) for each, length in zip(part, whole, strict=True)] if part else list(whole)
    )
