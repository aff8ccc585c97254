"""Tensors sent between the ranks of a mesh: packed, as bytes, while the host goes on."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Finish = Callable[[], None]


class Exchange:
    """The ranks of a mesh, as one process group.

    Args:
        mesh: of any number of dimensions.
        device: of all tensors.

    Attributes:
        rank: this one in the group.
        coordinates: of the ranks in the mesh, in the group's order.
    """

    def __init__(self, mesh: "DeviceMesh", device: torch.device) -> None:
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
        self.coordinates = [tuple(coordinates) for coordinates in found]
        self.group, self.device, self.rank = group, device, dist.get_rank(group)

    def lists(self) -> list[list[Tensor]]:
        """For each rank none yet."""
        return [[] for _ in self.coordinates]

    def start(
        self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Tensor]], dtypes: set[torch.dtype]
    ) -> Finish:
        """Sends tensors to each rank, and fills those that come from each: alike there in number, order and shape. One
        all-to-all for each dtype.

        Args:
            outgoing, incoming: by rank.
            dtypes: of all of them on all ranks.

        Returns:
            What waits for them, and fills.
        """
        pending = [
            self._send(
                [[t.reshape(-1) for t in each if t.dtype == dtype] for each in outgoing],
                [[t for t in each if t.dtype == dtype] for each in incoming],
                dtype,
            )
            for dtype in sorted(dtypes, key=str)
        ]

        def finish() -> None:
            for each in pending:
                each()

        return finish

    def _send(self, sent: list[list[Tensor]], wanted: list[list[Tensor]], dtype: torch.dtype) -> Finish:
        targets = [t for each in wanted for t in each]
        packed = torch.cat([torch.empty(0, dtype=dtype, device=self.device), *(t for each in sent for t in each)])
        received = packed.new_empty(sum(t.numel() for t in targets))
        work = dist.all_to_all_single(
            received.view(torch.uint8),
            packed.view(torch.uint8),
            [dtype.itemsize * sum(t.numel() for t in each) for each in wanted],
            [dtype.itemsize * sum(t.numel() for t in each) for each in sent],
            group=self.group,
            async_op=True,
        )
        kept = [packed]  # until it has been sent

        def finish() -> None:
            work.wait()
            kept.clear()
            for target, part in zip(targets, received.split([t.numel() for t in targets]), strict=True):
                target.copy_(part.view(target.shape))

        return finish

    def sums(self, numbers: Tensor) -> list[float]:
        """Of a vector of each rank, the same bits on all of them. The host waits."""
        found = [torch.empty_like(numbers) for _ in self.coordinates]
        dist.all_gather(found, numbers, group=self.group)
        result: list[float] = torch.stack(found).sum(0).tolist()
        return result
