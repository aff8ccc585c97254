"""What a part is: something that takes part in each step beside the network, with its own options and state.

A part is one file here and one line in `lodo.parts.PARTS`. It declares its options and its slots, and has those of the
hooks below that it needs; all do nothing by default. `lodo.step` tells in which order they are called. CONTRIBUTING.md
has a worked example.
"""

from collections.abc import Container, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lodo.context import Cohort, Context
from lodo.declarations import Option, Options, Slot
from lodo.scalars import Number


class Layout(NamedTuple):
    """Where the parameters of a group lie in vectors of shape (n,).

    Attributes:
        shapes: of the parameters, or of this rank's shards of them.
        dtypes: of the parameters.
        dtype: that the optimizer computes in.
        device: of all.
        elsewhere: the shapes on the other ranks, if the parameters are shards; those that are alike once.
    """

    shapes: Sequence[torch.Size]
    dtypes: Sequence[torch.dtype]
    dtype: torch.dtype
    device: torch.device
    elsewhere: Sequence[Sequence[torch.Size]] = ()

    @property
    def lengths(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    def room(self, slot: Slot) -> list[int]:
        """How many numbers of a PACKED slot each parameter has."""
        return slot.room([self.shapes, *self.elsewhere])


class Undone(NamedTuple):
    """What somebody else has done to the parameters since the last step; tensors of shape (n,).

    Attributes:
        change: what was added to them.
        step: what the last step had subtracted.
        rounding: of the parameters: by how much they may be off.
    """

    change: Tensor
    step: Tensor
    rounding: Tensor


class Part:
    """Base class of all parts.

    Args:
        layout: of the param group.
        tensors: those of the state, by the names of the part's slots: advanced in place.
        options: of the group, as it has them now: `chosen`.
    """

    options: ClassVar[Mapping[str, Option]] = {}
    is_factor: ClassVar[bool] = False
    """Whether G depends on it: whether it has `multiply_` or `rotate`."""
    has_kernel: ClassVar[bool] = False
    """Whether the compiled passes know it. A group with a part that they do not know runs in plain torch."""
    waits: ClassVar[bool] = False
    """Whether it makes the host wait for an accelerator."""
    learns_from_response: ClassVar[bool] = False
    """Whether it has `learn_from_response_`."""
    learns_from_step: ClassVar[bool] = False
    """Whether it has `learn_from_step_`."""
    mark: ClassVar[str | None] = None
    """The slot that tells that there is state of it. Such state goes on to be used when options no longer ask for it,
    unless they are fixed: then they may not change."""
    fixed_by: ClassVar[str | None] = None
    """The option, of `Role.FIXED`, that asks for it."""
    needs_record: ClassVar[bool] = True
    """Whether the optimizer is to keep track of what becomes of its steps (`lodo.parts.record`)."""

    unit: Number = 1.0
    """What gradients are divided by before parts see them."""
    changes_gradients: ClassVar[bool] = False
    """Whether what is kept of gradients is in coordinates or units of its own."""
    corrects_momentum: ClassVar[bool] = False
    """Whether a momentum that starts at zero is to be corrected for it, as Adam's is."""

    def __init__(self, layout: Layout, tensors: Mapping[str, Tensor], options: Options) -> None:
        self.layout, self.tensors, self.chosen = layout, tensors, options

    # ---- what it declares ---------------------------------------------------------------------------------------

    @classmethod
    def is_used(cls, options: Options) -> bool:
        """Whether the options of a group ask for it."""
        return True

    @classmethod
    def slots(cls, options: Options, found: Container[str] = ()) -> tuple[Slot, ...]:
        """What it keeps for a group with these options, where `found` is the names of what there is already."""
        return ()

    @classmethod
    def check(cls, options: Mapping[str, Any], is_flattened: bool = False) -> None:
        """Raises a ValueError for options that do not go together, or not with parameters that FSDP1 has flattened,
        whose shards have no shape of their own."""

    # ---- the life of its state ----------------------------------------------------------------------------------

    def start_(self, missing: Mapping[str, Sequence[int]], x: Sequence[Tensor]) -> None:
        """Brings state that is missing, and so zero, to what it is before a parameter's first step.

        Args:
            missing: the places of the parameters that lack it, by the names of its slots.
            x: the parameters.
        """

    def reset_(self) -> None:
        """Lets what it learns begin anew (`lodo.LODO.reset`)."""

    # ---- its factor of G = lr * T^T U^T U T, T = diagonal * rotation ----------------------------------------------

    def rotate(self, v: Tensor) -> Tensor:
        """A vector of shape (n,) in the orthogonal coordinates that this part computes in."""
        return v

    def rotate_back_(self, v: Tensor) -> Tensor:
        """The inverse of `rotate`; v is used up."""
        return v

    def multiply_(self, diagonal: Tensor, at: Context) -> None:
        """Multiplies its own factor of the diagonal of T^2 into another, shape (n,)."""

    def unscale(self, g: Tensor) -> Tensor:
        """What network and momenta are to learn from in place of the rotated gradient g, shape (n,)."""
        return g

    def step_scales(self) -> Tensor | None:
        """Factors of the steps, one for each parameter, that weight decay is to share; None for none."""
        return None

    def gradient_scales(self, at: Context) -> Sequence[Tensor] | None:
        """The root mean square of each parameter's gradients; None if it does not know."""
        return None

    # ---- a step, in this order --------------------------------------------------------------------------------------

    def normalize(self, energy: Number) -> Number:
        """Chooses the unit of gradients from their sum of squares; returns that in this unit."""
        return energy

    def change_unit_(self, g: Tensor, active: Number) -> float:
        """Divides the gradient by the unit; returns what the slots with `powers` are to be multiplied by."""
        return 1.0

    def correct_(self, g: Tensor, undone: Undone | None, at: Context) -> None:
        """Takes notice of what somebody else has done to the parameters; None for nothing. May change g, shape (n,)."""

    def prepare_(self, at: Context) -> None:
        """Takes notice of the options of this step, its lr say."""

    def learn_(self, g: Tensor, at: Context) -> None:
        """Learns from the gradient where the last step has led, shape (n,), not rotated, weight decay included."""

    def learn_from_response_(self, response: Tensor, at: Context) -> None:
        """Learns from (G / lr) g of that gradient, rotated, shape (n,)."""

    def learn_from_step_(self, g: Tensor, step: Tensor, at: Context) -> None:
        """Learns from that gradient and the last step, weight decay included, both of shape (n,) in the same
        coordinates; the step's size does not matter. Where somebody has taken the step back, g has the share that is
        left, and the step is whole."""

    def update_basis_(self, g: Tensor, rotated: Tensor | None, kept: Sequence[Tensor], at: Context) -> Tensor | None:
        """Takes a gradient into what `rotate` is made of, and brings that up to date.

        Args:
            g: gradient, shape (n,), not rotated.
            rotated: the same rotated; None if nobody has computed it.
            kept: rotated vectors that are kept, shape (n,): brought into the new coordinates in place.

        Returns:
            `rotated`, in the new coordinates if they have changed.
        """
        return rotated

    def update_(self, rotated: Tensor, at: Context) -> None:
        """Takes the rotated gradient of this step, shape (n,), into what it keeps."""

    def follow_(self, m: Tensor, bias: Number | Tensor, at: Context) -> None:
        """Adapts to the momentum m / bias that this step is made of, rotated, shape (n,)."""

    def record_(self, step: Tensor, at: Context) -> None:
        """Takes notice of the step as it is made, shape (n,): what is subtracted from the parameters."""

    # ---- the rest -----------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, float]:
        """What `lodo.LODO.diagnostics` tells of it."""
        return {}

    def bind_kernel(self, group: Any) -> None:
        """Writes where its tensors lie into a `lodo.kernels.structures.Group`."""

    def set_kernel(self, numbers: Any, cohort: Cohort, at: Context) -> None:
        """Writes the numbers of a step into a `lodo.kernels.structures.Cohort`."""
