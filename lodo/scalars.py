"""The few numbers that steer a step (lr, step count, largest gradient, ...), wherever they can be read for free.

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


class Cell:
    """A 0-dim tensor, part of the optimizer's state, read and written as a `Number`."""

    def __init__(self, tensor: Tensor, on_host: bool | None = None) -> None:
        """`on_host` says whether numbers are plain; by default where the tensor is on the CPU."""
        self.tensor = tensor
        self._view = tensor.numpy() if (tensor.device.type == "cpu" if on_host is None else on_host) else None

    def get(self) -> Number:
        """The value; a tensor is the cell itself, not a copy."""
        return self.tensor if self._view is None else self._view[()].tolist()

    def set(self, value: Number) -> None:
        """Writes a plain number or a one-element tensor."""
        if is_tensor(value):
            self.tensor.copy_(value.reshape(()))
        elif self._view is None:
            self.tensor.fill_(value)
        else:
            self._view[()] = value


def largest(vector: Tensor, out: Cell) -> Number:
    """The largest magnitude in `vector`, NaN if it holds one, as the number in `out`."""
    torch.linalg.vector_norm(vector, ord=torch.inf, out=out.tensor)
    return out.get()


def choose(condition: Number, yes: Number, no: Number) -> Number:
    """`yes` if the condition holds else `no`, without reading a condition on an accelerator."""
    if is_tensor(condition):
        return torch.where(condition, yes, no)
    return yes if condition else no
