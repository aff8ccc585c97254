"""The few numbers that steer a step (lr, step count, size of the gradient, ...), wherever they can be read for free.

On the CPU they are plain Python floats: arithmetic on 0-dim tensors would cost more than a small network's whole
step. On an accelerator they stay 0-dim tensors, because reading one back would make the host wait. Formulas over
`Number` are written once for both.
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor

Number = Any
"""float, int or bool on the host; a 0-dim tensor on an accelerator."""


def is_tensor(number: Number) -> TypeGuard[Tensor]:
    return isinstance(number, Tensor)


def is_readable(tensor: Tensor) -> bool:
    """Whether the host can read a tensor without waiting for a device."""
    return tensor.device.type == "cpu"


class Cell:
    """A 0-dim tensor, part of the optimizer's state, read and written as a `Number`.

    Nothing is cached: the memory behind a tensor may be exchanged, as when it is sent to another process.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._is_readable = is_readable(tensor)

    def get(self) -> Number:
        """The value; a tensor is the cell itself, not a copy."""
        return self.tensor.numpy().tolist() if self._is_readable else self.tensor

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


def energy(vector: Tensor) -> Number:
    """The sum of squares of `vector`; NaN or infinite if it holds such a number."""
    return Cell(torch.dot(vector, vector)).get()


def norm(vector: Tensor) -> Number:
    """The length of `vector`, with no overflow in between: sums of float32 squares may."""
    wide = torch.float32 if vector.device.type == "mps" else torch.float64
    return Cell(torch.linalg.vector_norm(vector, dtype=wide)).get()


def choose(condition: Number, yes: Number, no: Number) -> Number:
    """`yes` if the condition holds else `no`, without reading a condition on an accelerator."""
    if is_tensor(condition):
        return torch.where(condition, yes, no)
    return yes if condition else no


def add_decayed_(trace: Tensor, vector: Tensor, decay: Number) -> None:
    """trace <- decay * trace + vector, in place."""
    if is_tensor(decay):
        trace.mul_(decay).add_(vector)
    else:
        torch.add(vector, trace, alpha=decay, out=trace)
