"""G put together from its parts: lr * T^T U^T U T with T = D^1/2 Q^T S^1/2.

U is the learned network (`lodo.preconditioners`), D and Q the base preconditioner (`lodo.bases`), S the learned scale
per tensor (`lodo.scale`). S commutes with Q, which acts on each tensor by itself, so that T = (S D)^1/2 Q^T.
"""

import torch
from torch import Tensor

from lodo import meta
from lodo.bases import AdamBase
from lodo.preconditioners import Operator, Preconditioner
from lodo.scalars import Number
from lodo.scale import Scale


class Composite(Operator):
    """G / lr where there is more to it than a network. Read from an optimizer it is the optimizer's own, as a
    network is: `copy.deepcopy` keeps a snapshot.

    Attributes:
        network: U^T U.
        base: D and Q; None for the identity.
        scale: S; None for the identity.
    """

    def __init__(self, network: Preconditioner, base: AdamBase | None, scale: Scale | None, steps: Number) -> None:
        self.network, self.base, self.scale = network, base, scale
        self.size = network.size
        self._rotated: Tensor | None = None  # Q^T g, kept from line 1 to line 4 of a step
        self._refresh(steps)

    @property
    def theta(self) -> Tensor:  # type: ignore[override]
        return self.network.theta

    def whiten(self, v: Tensor) -> Tensor:
        """T v, shape (n,): the coordinates in which the network acts and learns."""
        return (v if self.base is None else self.base.rotate(v)) * self._root

    def apply(self, v: Tensor) -> Tensor:
        u = self.network.apply(self.whiten(v)).mul_(self._root)
        return u if self.base is None else self.base.rotate_back(u)

    def learn_(self, g: Tensor, m: Tensor, lr: Number, moments: meta.Moments | None, rates: meta.Rates) -> None:
        """As a network's; T is that of the last step until `observe_` is called."""
        if self.theta.numel() > 0:
            self._rotated = g if self.base is None else self.base.rotate(g)
            self.network.learn_(self._rotated * self._root, self.whiten(m), lr, moments, rates)

    def bound_condition_(self, largest: float) -> None:
        self.network.bound_condition_(largest)

    def observe_(self, g: Tensor, active: Number, steps: Number) -> None:
        """Takes a gradient of shape (n,) into the base, and what the scale has learned into T."""
        if self.base is not None:
            self.base.learn_(g, active, steps, self._rotated)
            self._rotated = None
        self._refresh(steps)

    def _refresh(self, steps: Number) -> None:
        """(S D)^1/2, shape (n,): computed once a step, used up to five times."""
        if self.base is not None:
            self._root = self.base.root(steps)
        else:
            assert self.scale is not None
            self._root = torch.ones_like(self.scale.moves)
        if self.scale is not None:
            self.scale.multiply_(self._root)

    def __repr__(self) -> str:
        base = "None" if self.base is None else repr(self.base.kind)
        return f"Composite({self.network!r}, base={base}, has_scale={self.scale is not None})"
