"""What has become of the last step: whether somebody else has changed the parameters since.

Moves that are taken back, as a projection onto a box does, are no fault of what led to them. Kept is `written`, the
parameters as the last step left them.
"""

from collections.abc import Container, Mapping, Sequence

import torch
from torch import Tensor

from lodo.context import Context
from lodo.declarations import Dtype, Kind, Options, Slot
from lodo.parts.part import Part, Undone
from lodo.scalars import is_tensor


class Record(Part):
    """The parameters as they were left, the lr that the schedule then had, and when learning began anew."""

    has_kernel = True
    needs_record = False

    @classmethod
    def slots(cls, options: Options, found: Container[str] = ()) -> tuple[Slot, ...]:
        return (
            Slot("written", may_be_infinite=True),
            Slot("scheduled_lr", Kind.TABLE, dtype=Dtype.WIDE, low=0.0),
            Slot("reset_at", Kind.TABLE, dtype=Dtype.COUNT, low=0.0),
        )

    @property
    def written(self) -> Tensor:
        return self.tensors["written"]

    def start_(self, missing: Mapping[str, Sequence[int]], x: Sequence[Tensor]) -> None:
        lengths = self.layout.lengths
        parts = [part.view(shape) for part, shape in zip(self.written.split(lengths), self.layout.shapes, strict=True)]
        with torch.no_grad():  # a constructor and `state_dict` come here too
            for place in missing["written"]:
                parts[place].copy_(x[place])

    def change(self, x: Tensor, at: Context, may_read: bool) -> Tensor | None:
        """What somebody has added to the parameters x since the last step, shape (n,); None if nothing.

        Before its first step a parameter has nothing to compare with, and while it takes none it is not looked at.
        """
        if may_read and (torch.equal(x, self.written) or at.steps <= 1):
            return None
        change = (x - self.written).nan_to_num_(0.0, 0.0, 0.0)
        if len(at.cohorts) > 1:
            is_known = at.per_element(lambda cohort: cohort.active * (cohort.steps > 1), change)
            assert is_tensor(is_known)
            return torch.where(is_known > 0, change, 0)
        return torch.where(at.active, change, 0) if is_tensor(at.active) else change


def kept_share(move: Tensor, change: Tensor) -> Tensor:
    """How much is left of moves, between 0 and 1, elementwise.

    Args:
        move: what was subtracted from the parameters.
        change: what somebody else has added to them since.

    Returns:
        1 where nothing was added, 0 where as much as the move or more, be it back or on: there the parameters are what
        they are because of somebody else.
    """
    share = 1 - (change / move).abs_()
    return torch.where(change == 0, 1.0, share.nan_to_num_(0.0, 0.0, 0.0).clamp_(min=0))


def judged_share(undone: Undone) -> Tensor:
    """How much is left of the last step, elementwise: nothing where it was taken back but for a hundredth, for what is
    learned goes by the direction of what is left, be it a rounding."""
    return kept_share(undone.step, undone.change).masked_fill_(taken_back(undone, slack=1e-2), 0)


def taken_back(undone: Undone, slack: float) -> Tensor:
    """Where a whole step was taken back, to `slack` of it, or to rounding."""
    change, step, rounding = undone
    return (change != 0) & ((change - step).abs_() <= rounding.add(step.abs(), alpha=slack))
