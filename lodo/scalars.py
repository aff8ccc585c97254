"""The few numbers that steer a step (lr, step count, size of the gradient, ...), wherever they can be read for free.

On the CPU they are plain Python numbers: arithmetic on 0-dim tensors would cost more than a small network's whole
step. On an accelerator they stay 0-dim tensors, because reading one back would make the host wait. Formulas over
`Number` are written once for both.
"""

from collections.abc import Iterable, Sequence
from typing import TypeAlias, TypeGuard, cast

import torch
from torch import Tensor

Number: TypeAlias = float | Tensor
"""float, int or bool on the host; a 0-dim tensor on an accelerator."""


def is_tensor(number: object) -> TypeGuard[Tensor]:
    return isinstance(number, Tensor)


def is_readable(tensor: Tensor) -> bool:
    """Whether the host can read a tensor without waiting for a device."""
    return tensor.device.type == "cpu"


def wide(device: torch.device) -> torch.dtype:
    """The dtype of tables and counts: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class Cell:
    """A 0-dim tensor, part of the optimizer's state, read and written as a `Number`.

    Nothing is cached: the memory behind a tensor may be exchanged, as when it is sent to another process.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._is_readable = is_readable(tensor)

    def get(self) -> Number:
        """The value; a tensor is the cell itself, not a copy."""
        return self.tensor.numpy().item() if self._is_readable else self.tensor

    def set(self, value: Number) -> None:
        """Writes a plain number or a one-element tensor; one on the CPU is read, so that no device is waited for."""
        if is_tensor(value) and value.device.type != "cpu":
            self.tensor.copy_(value.detach().reshape(()))
        else:
            number = value.item() if is_tensor(value) else value  # NumPy has no bfloat16
            if self._is_readable:
                self.tensor.numpy()[()] = number
            else:
                self.tensor.fill_(number)


class Column:
    """A tensor of shape (k,), one number for each of the k parameters of a group, read and written as `Number`s.

    On the host it is NumPy that reads and writes the memory, which must stay where it is: who has a column looks
    whether it has (`lodo.state.group_state.GroupState.is_bound_to`).
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._array = tensor.numpy() if is_readable(tensor) else None
        self._cells = () if self._array is not None else tensor.unbind()

    def get(self, place: int = 0) -> Number:
        """The number of the parameter at a place of the group."""
        return self._cells[place] if self._array is None else self._array.item(place)

    def set(self, value: Number, places: Sequence[int] | None = None) -> None:
        """Writes the numbers at these places, None for all."""
        if self._array is None:
            for cell in self._chosen(places):
                cell.copy_(value) if is_tensor(value) else cell.fill_(value)
        elif places is None:
            self._array.fill(value)
        else:
            self._array[list(places)] = value

    def add(self, value: Number, places: Sequence[int] | None = None) -> None:
        """Adds a whole number to those at these places, None for all."""
        if self._array is None:
            for cell in self._chosen(places):
                cell.add_(value)
        elif len(self._array) == 1:  # which NumPy is slower with
            self._array[0] = self._array.item(0) + int(value)
        elif places is None:
            self._array += int(value)
        else:
            self._array[list(places)] += int(value)

    def _chosen(self, places: Sequence[int] | None) -> Sequence[Tensor]:
        return [self.tensor] if places is None else [self._cells[place] for place in places]


def energy(vector: Tensor) -> Number:
    """The sum of squares of `vector`; NaN or infinite if it holds such a number."""
    return Cell(torch.dot(vector, vector)).get()


def norm(vector: Tensor) -> Number:
    """The length of `vector`, with no overflow in between: sums of float32 squares may."""
    return Cell(torch.linalg.vector_norm(vector, dtype=wide(vector.device))).get()


def energies(vector: Tensor, lengths: Sequence[int]) -> Tensor:
    """The sum of squares of each of the parts that a vector is cut into, shape (k,), with no overflow in between."""
    return torch.stack(torch._foreach_norm(list(vector.split(lengths)), dtype=wide(vector.device))).square_()


def where(condition: Number, yes: Number, no: Number) -> Number:
    """`yes` if the condition holds else `no`, without reading a condition on an accelerator."""
    if is_tensor(condition):
        return torch.where(condition > 0, cast(Tensor, yes), cast(Tensor, no))
    return yes if condition else no


def both(a: Number, b: Number) -> Number:
    """Whether both conditions hold."""
    return a & b  # type: ignore[operator]


def either(conditions: Sequence[Number]) -> Number:
    """Whether one of several conditions holds."""
    if len(conditions) == 1:
        return conditions[0]
    on_device = [condition for condition in conditions if is_tensor(condition)]
    return torch.stack(on_device).any() if on_device else any(conditions)


def stacked(numbers: Iterable[Number]) -> Tensor:
    """Numbers on an accelerator, as one tensor."""
    return torch.stack(cast(list[Tensor], list(numbers)))


def at_least_one(count: Number) -> Number:
    """The count, or 1 instead of 0: what divides by 1 - b^t is not to divide by zero."""
    return count + (count < 1)


def decay_and_add_(trace: Tensor, vector: Tensor, decay: Number) -> None:
    """trace <- decay * trace + vector, in place; a decay may be given for each element."""
    if is_tensor(decay):
        torch.addcmul(vector, trace, decay, out=trace)  # rounded once, as below
    else:
        torch.add(vector, trace, alpha=cast(float, decay), out=trace)
