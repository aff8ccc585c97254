"""G put together from a network and parts: lr * T^T U^T U T.

U is the learned network (`lodo.preconditioners`). T is the product of the parts' factors (`lodo.parts`): a diagonal,
and a rotation into the coordinates in which it is one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lodo.context import Context
from lodo.inner_optimizer import Moments, Rates
from lodo.parts.part import Part
from lodo.preconditioners.base import Operator, Preconditioner
from lodo.scalars import Number


class Composite(Operator):
    """G / lr where there is more to it than a network. Read from an optimizer it is the optimizer's own, as a
    network is: `copy.deepcopy` keeps a snapshot.

    Attributes:
        network: U^T U.
        parts: those that have a factor.
        diagonal: of all of it, if the network is diagonal, else of T; shape (n,).
    """

    def __init__(self, network: Preconditioner, parts: Sequence[Part]) -> None:
        self.network, self.parts, self.size = network, list(parts), network.size
        self.diagonal = torch.ones(self.size, dtype=network.theta.dtype, device=network.theta.device)

    @property
    def theta(self) -> Tensor:  # type: ignore[override]
        return self.network.theta

    def refresh_(self, at: Context) -> None:
        """Computes `diagonal`, once a step; in place, for a CUDA graph reads it where it was when it was captured."""
        found = self._squares(at)
        self.diagonal.copy_(self.network.apply(found) if self.network.is_elementwise else found.sqrt_())

    def _squares(self, at: Context) -> Tensor:
        """The diagonal of T^2 in its own coordinates."""
        squares = torch.ones_like(self.diagonal)
        for part in self.parts:
            part.multiply_(squares, at)
        return squares

    def root(self, at: Context) -> Tensor:
        """The diagonal of T, shape (n,)."""
        return self._squares(at).sqrt_()

    def rotate(self, v: Tensor) -> Tensor:
        for part in self.parts:
            v = part.rotate(v)
        return v

    def rotate_back_(self, v: Tensor) -> Tensor:
        for part in reversed(self.parts):
            v = part.rotate_back_(v)
        return v

    def unscale(self, g: Tensor) -> Tensor:
        """What the network learns from in place of g."""
        for part in self.parts:
            g = part.unscale(g)
        return g

    def apply(self, v: Tensor) -> Tensor:
        if self.network.is_elementwise:
            return v * self.diagonal
        return self.network.apply(v * self.diagonal).mul_(self.diagonal)

    def precondition(self, g: Tensor) -> Tensor:
        return self.apply(self.unscale(g))

    def learn_(self, g: Tensor, m: Tensor, lr: Number, moments: Moments | None, rates: Rates) -> None:
        """As a network's, but from `unscale` of g; T is that of the last step until `refresh_` is called."""
        if not self.network.learns:
            return
        if self.network.is_elementwise:
            self.network.learn_logarithms_(self.precondition(g), m, lr, moments, rates)
        else:
            self.network.learn_(self.unscale(g) * self.diagonal, m * self.diagonal, lr, moments, rates)

    def bound_condition_(self, largest: float) -> None:
        self.network.bound_condition_(largest)

    def __repr__(self) -> str:
        return f"Composite({self.network!r}, {', '.join(type(part).__name__ for part in self.parts)})"
