"""Parameters that are DTensors, as FSDP2 and HSDP make them: a rank has a network, or eigenbases, scales and momenta,
for its own shards, and nothing is communicated. And those of FSDP1, which are the same to LODO but look like any other
tensor.

Every rank of the mesh works on the local tensors of its parameters. Its network, and whatever else it keeps for a
group, is shown in `optimizer.state` as a one-dimensional DTensor that is sharded like the parameters: a rank's part is
its own tensor, flattened and padded with zeros to the size that the rank which needs most numbers has. So torch's
distributed checkpoints save and gather every rank's, and replicas (of HSDP) count as such.
"""

import itertools
import math
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


def is_dtensor(value: Any) -> "TypeGuard[DTensor]":
    """Whether a value is a DTensor, without loading the module: where nobody has loaded it there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_fsdp1(p: Tensor) -> bool:
    """Whether FullyShardedDataParallel has flattened a parameter: it then is a plain tensor of this rank's elements."""
    return getattr(p, "_fsdp_flattened", False)


def rank_of_fsdp1(params: Sequence[Tensor]) -> tuple[int, int] | None:
    """This rank and the number of ranks, where the parameters are this rank's elements of FSDP1's."""
    if not is_fsdp1(params[0]) or torch.distributed.get_world_size() == 1:
        return None
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, in the same memory; another tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def local_gradient(p: Tensor) -> Tensor | None:
    """The gradient of this rank's part of `p`. One that is still to be summed over ranks, as tensor parallelism may
    leave it, is summed here."""
    if is_dtensor(p) and is_dtensor(p.grad) and p.grad.placements != p.placements:
        return local(p.grad.redistribute(placements=p.placements))
    return None if p.grad is None else local(p.grad)


def shown_as(p: Tensor, part: Tensor, lead: int = 0) -> Tensor:
    """A tensor for this rank's part of `p` as the DTensor, or the plain tensor, that `p` is; in the same memory.

    `lead` is the number of dimensions that it has before those of p.
    """
    if not is_dtensor(p):
        return part
    from torch.distributed.tensor import DTensor

    # copy.deepcopy fails on a DTensor whose local tensor starts in mid-storage; through DLPack it gets its own storage.
    whole = from_dlpack(part)
    placements = [shown_as_placement(at, lead) for at in p.placements]
    shape = torch.Size((*part.shape[:lead], *p.shape))
    stride = p.stride() if lead == 0 else torch.empty(shape, device="meta").stride()
    return DTensor.from_local(whole, p.device_mesh, placements, shape=shape, stride=stride)


def shown_as_placement(at: "Placement", lead: int) -> "Placement":
    """The placement of a tensor with `lead` dimensions before those that `at` is of."""
    from torch.distributed.tensor import Shard

    if hasattr(at, "split_factor"):  # of tensor parallelism under FSDP2; in torch 2.11 it is a Shard too
        return type(at)(at.dim + lead, split_factor=at.split_factor)  # type: ignore[attr-defined, call-arg]
    return Shard(at.dim + lead) if isinstance(at, Shard) else at


def check_sharding(params: Sequence[Tensor], is_whole: bool = False) -> None:
    """Refuses parameters whose replicas would drift apart, and DTensors whose state could not be shown.

    Args:
        params: of one group.
        is_whole: whether each is to have one owner (`lodo.state.owners`).

    Raises:
        ValueError: for parameters that are not all sharded over the same ranks, for pending sums, and for shards that
            are not on their mesh's kind of device.
    """
    if not any(is_dtensor(p) or is_fsdp1(p) for p in params):
        return
    for p in params:
        if is_dtensor(p) and any(placement.is_partial() for placement in p.placements):
            raise ValueError(f"LODO does not support parameters with pending sums, got placements {p.placements}")
        if is_dtensor(p) and local(p).device.type not in (p.device_mesh.device_type, "meta"):
            raise ValueError(
                f"the shards of a parameter must be on the device of its mesh, {p.device_mesh.device_type!r}, got "
                f"{local(p).device.type!r}; LODO does not support FSDP's offloading"
            )
        _check_chunks(p)
    spreads = [(is_fsdp1(p), _together(p, is_whole)) for p in params]
    if any(spread != spreads[0] for spread in spreads):
        found = sorted({_kind(p) for p in params})
        raise ValueError(
            "the parameters of one group must be sharded over the same ranks, or the network of each rank would move a "
            f"replicated one differently; got {', '.join(found)}; make one group for each"
        )


def signature(params: Sequence[Tensor]) -> tuple[int, int]:
    """How many shards there are of a group, and a checksum of which, 0 on one rank or without DTensors. State goes on
    bit for bit where both are the same."""
    dtensors: list[DTensor] = [p for p in params if is_dtensor(p)]
    if not any(p.device_mesh.size() > 1 for p in dtensors):
        return 1, 0
    sharding, spread = Sharding.of(params), _spread(params[0])
    sizes = () if spread is None else tuple(spread[0].size(i) for i in spread[1])
    placed = [[(at.dim, getattr(at, "split_factor", 1)) for at in p.placements if hasattr(at, "dim")] for p in dtensors]
    found = sizes, placed, [tuple(p.shape) for p in params]
    return 1 if sharding is None else sharding.shards, zlib.crc32(repr(found).encode())


def split_by_ranks(param_group: Any, sharding: Any) -> list[Any]:
    """Param groups of one with DTensors: one for all that are sharded over the same ranks, each with all options.

    Each rank steps on its shards as one process on tensors, which must move no replica of what others have too. Where
    tensors have owners, one for all on the same mesh.

    Args:
        param_group: as `torch.optim.Optimizer.add_param_group` takes it; what that refuses comes back as it is.
        sharding: the default of the option.
    """
    params = param_group.get("params") if isinstance(param_group, dict) else None
    if not isinstance(params, Iterable) or isinstance(params, Tensor | set):
        return [param_group]
    found: dict[Any, list[Any]] = {}
    for each in params:
        p = each[1] if isinstance(each, tuple) else each
        found.setdefault(_together(p, param_group.get("sharding", sharding) == "whole"), []).append(each)
    return [{**param_group, "params": own} for own in found.values() or [[]]]


def _kind(p: Tensor) -> str:
    if is_dtensor(p):
        return f"{p.placements} on {p.device_mesh}"
    return "a tensor of FullyShardedDataParallel" if is_fsdp1(p) else "a plain tensor"


def _spread(p: Tensor) -> "tuple[DeviceMesh, tuple[int, ...]] | None":
    """Over which dimensions of which mesh a parameter is sharded; None if over none."""
    if not is_dtensor(p):
        return None
    mesh = p.device_mesh
    dims = tuple(i for i, at in enumerate(p.placements) if not at.is_replicate() and mesh.size(i) > 1)
    return (mesh, dims) if dims else None


def _together(p: Tensor, is_whole: bool) -> Any:
    """What the parameters of one group have in common."""
    if is_whole and is_dtensor(p) and p.device_mesh.size() > 1:
        return p.device_mesh
    return _spread(p)


def _check_chunks(p: Tensor) -> None:
    """Refuses shards of other sizes than all ranks take for granted."""
    place = p.device_mesh.get_coordinate() if is_dtensor(p) else None
    if not is_dtensor(p) or place is None:
        return
    own = _shape_on(p.shape, p.placements, p.device_mesh, place)
    if local(p).shape != own:
        raise ValueError(
            f"the shards of a parameter must be those of torch.chunk, here of shape {tuple(own)}, got "
            f"{tuple(local(p).shape)} of {tuple(p.shape)} with placements {p.placements}"
        )


@dataclass(frozen=True)
class Sharding:
    """How the parameters of a group are spread over ranks, and how a rank's tensors are kept in `optimizer.state`.

    Attributes:
        mesh: of the parameters.
        placements: one-dimensional, of the tensors in `optimizer.state`: sharded over the same dimensions of the mesh.
        shards: how many different shards, and so networks, there are.
        largest: upper bound on the number of parameters in one shard; all ranks know the same.
    """

    mesh: "DeviceMesh"
    placements: "tuple[Placement, ...]"
    shards: int
    largest: int

    @staticmethod
    def of(params: Sequence[Tensor]) -> "Sharding | None":
        """The sharding of a group that `check_sharding` accepts; None if every rank has all of it."""
        spread = _spread(params[0]) if params else None
        if spread is None:
            return None
        from torch.distributed.tensor import Replicate, Shard

        mesh, dims = spread
        placements = tuple(Shard(0) if i in dims else Replicate() for i in range(mesh.ndim))
        shards = math.prod(mesh.size(i) for i in dims)
        return Sharding(mesh, placements, shards, sum(_largest_part(p) for p in params))

    @property
    def ranks(self) -> "tuple[DeviceMesh, tuple[Placement, ...]]":
        """What groups that are sharded over the same ranks have in common."""
        return self.mesh, self.placements

    def key(self, name: str) -> str:
        """The key in `optimizer.state`. It tells the number of shards: a distributed checkpoint of another number
        then lacks the key, where the same one with another size would be an error that no option gets around."""
        return f"{name}_in_{self.shards}_shards"

    def spread(self, own: Tensor, size: int) -> Tensor:
        """This rank's tensor as it is kept: flat, and padded with zeros to `size` numbers, which makes a copy of it."""
        from torch.distributed.tensor import DTensor

        flat = own.reshape(-1)
        if flat.numel() == size and flat.data_ptr() == own.data_ptr():
            flat = from_dlpack(flat.view(size))
        else:
            padded = own.new_zeros(size)
            padded[: own.numel()] = flat
            flat = padded
        return DTensor.from_local(flat, self.mesh, self.placements)

    def check_saved(self, what: str, value: Any, size: int) -> None:
        """Refuses what is no DTensor of this mesh and placement, with `size` numbers.

        Raises:
            ValueError: naming it.
        """
        if not is_dtensor(value) or value.device_mesh != self.mesh or value.placements != self.placements:
            raise ValueError(
                f"{what} must be a DTensor with placements {self.placements} on the mesh of the parameters, got "
                f"{_described(value)} in the saved state"
            )
        if value.shape != (size,):
            raise ValueError(
                f"{what} has shape {tuple(value.shape)} in the saved state, this optimizer expects {(size,)} (set by "
                "the preconditioner's options and by the shards)"
            )


def shapes_on_ranks(params: Sequence[Tensor]) -> list[list[torch.Size]]:
    """The shapes of the shards of parameters on all ranks, in any order; equal ones once.

    Args:
        params: of one group, with a `Sharding`.
    """
    mesh, dims = _spread(params[0])  # type: ignore[misc]
    return _shapes_on_ranks(mesh, dims, tuple((p.shape, p.placements) for p in params if is_dtensor(p)))


@lru_cache(maxsize=64)
def _shapes_on_ranks(
    mesh: "DeviceMesh", dims: tuple[int, ...], spreads: "tuple[tuple[torch.Size, tuple[Placement, ...]], ...]"
) -> list[list[torch.Size]]:
    ranks = list(itertools.product(*(range(mesh.size(i)) if i in dims else [0] for i in range(mesh.ndim))))
    columns = {spread: [_shape_on(*spread, mesh, at) for at in ranks] for spread in set(spreads)}
    found = dict.fromkeys(zip(*(columns[spread] for spread in spreads), strict=True))
    return [list(shapes) for shapes in found]


def _shape_on(
    whole: torch.Size, placements: "Sequence[Placement]", mesh: "DeviceMesh", coordinates: Sequence[int]
) -> torch.Size:
    """The shape of the shard of a parameter that the rank with these coordinates in the mesh has."""
    return torch.Size(part.stop - part.start for part in slices_on(whole, placements, mesh, coordinates))


def slices_on(
    whole: Sequence[int], placements: "Sequence[Placement]", mesh: "DeviceMesh", coordinates: Sequence[int]
) -> tuple[slice, ...]:
    """The part of a tensor that the rank with these coordinates in the mesh has, as `torch.chunk` makes them."""
    bounds = [(0, length) for length in whole]
    splits = [(i, at) for i, at in enumerate(placements) if not at.is_replicate()]
    # Tensor parallelism under FSDP2: what the later dimensions of the mesh have left is split by the first.
    splits.sort(key=lambda split: hasattr(split[1], "split_factor"))
    for i, at in splits:
        dim: int = at.dim  # type: ignore[attr-defined]
        begin, end = bounds[dim]
        most = -(-(end - begin) // mesh.size(i))
        begin = min(end, begin + coordinates[i] * most)
        bounds[dim] = begin, min(end, begin + most)
    return tuple(slice(begin, end) for begin, end in bounds)


def _largest_part(p: Tensor) -> int:
    """The number of elements in the largest of a parameter's shards."""
    assert is_dtensor(p)
    shape = list(p.shape)
    for i, placement in enumerate(p.placements):
        if not placement.is_replicate():
            dim: int = placement.dim  # type: ignore[attr-defined]
            shape[dim] = -(-shape[dim] // p.device_mesh.size(i))
    return math.prod(shape)


def check_saved_like(what: str, value: Any, p: Tensor, lead: int = 0) -> None:
    """Refuses a saved tensor that is not spread over the ranks as its parameter is; `lead` as for `shown_as`.

    Raises:
        ValueError: naming what was saved and what is expected.
    """
    if is_dtensor(p) != is_dtensor(value) or (
        is_dtensor(p)
        and (
            value.device_mesh != p.device_mesh
            or tuple(value.placements) != tuple(shown_as_placement(at, lead) for at in p.placements)
        )
    ):
        raise ValueError(
            f"{what} is {_described(value)} in the saved state, its parameter is {_described(p)}; "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict converts one to the other"
        )


def _described(value: Any) -> str:
    if is_dtensor(value):
        return f"a DTensor with placements {value.placements} on {value.device_mesh}"
    return "a plain tensor" if isinstance(value, Tensor) else repr(value)
