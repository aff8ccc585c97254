"""G put together from its parts: lr * T^T U^T U T with T = D^1/2 Q^T S^1/2.

U is the learned network (`lodo.preconditioners`), D and Q the base preconditioner (`lodo.bases`), S the learned scale
per tensor (`lodo.scale`). S commutes with Q, which acts on each tensor by itself, so that T = (S D)^1/2 Q^T.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lodo import meta
from lodo.bases import AdamBase
from lodo.preconditioners import Identity, LogDiagonal, Operator, Preconditioner
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

    _gains: Tensor | None
    _root: Tensor | None
    _kept: Tensor | None

    def __init__(self, network: Preconditioner, base: AdamBase | None, scale: Scale | None, steps: Number) -> None:
        self.network, self.base, self.scale = network, base, scale
        self.size, self.drift = network.size, network.drift
        self._gains = self._kept = None
        self._refresh(steps)

    @property
    def theta(self) -> Tensor:  # type: ignore[override]
        return self.network.theta

    @property
    def root(self) -> Tensor:
        """The diagonal of (S D)^1/2, shape (n,)."""
        if self._root is None:
            self._root = self._squares().sqrt_()
        return self._root

    def whiten(self, v: Tensor) -> Tensor:
        """T v, shape (n,), for v in the coordinates of the parameters: in these the network acts and learns."""
        return self.rotate(v) * self.root

    def rotate(self, v: Tensor) -> Tensor:
        return v if self.base is None else self.base.rotate(v)

    def rotate_back(self, v: Tensor) -> Tensor:
        return v if self.base is None else self.base.rotate_back(v)

    def balance(self, g: Tensor) -> Tensor:
        """S^-1 g: what the network learns from."""
        return g if self.scale is None else self.scale.times(g, -1.0)

    def apply(self, v: Tensor) -> Tensor:
        if self._gains is not None:
            return v * self._gains
        return self.network.apply(v * self.root).mul_(self.root)

    def reply(self, g: Tensor) -> Tensor:
        return self.apply(self.balance(g))

    def learn_(self, g: Tensor, m: Tensor, lr: Number, moments: meta.Moments | None, rates: meta.Rates) -> None:
        """As a network's, but from `balance` of g; T is that of the last step until `settle_` is called."""
        if isinstance(self.network, LogDiagonal):
            self.network.learn_from_(self.reply(g), m, lr, moments, rates)
        elif self.theta.numel() > 0:
            self.network.learn_(self.balance(g) * self.root, m * self.root, lr, moments, rates)

    def bound_condition_(self, largest: float) -> None:
        self.network.bound_condition_(largest)

    @property
    def unit(self) -> Number:
        """What the gradients that the optimizer computes with are divided by (`lodo.bases`)."""
        return 1.0 if self.base is None else self.base.unit

    def observe_(
        self,
        g: Tensor,
        rotated: Tensor | None,
        kept: Sequence[Tensor],
        active: Number,
        steps: Number,
        age: Number | None = None,
    ) -> Tensor:
        """Takes a gradient into the base."""
        if self.base is None:
            return g if rotated is None else rotated
        rotated = self.base.turn_(g, rotated, kept, active, steps, age)
        self.base.take_in_(rotated, active, steps, age)
        return rotated

    def settle_(self, m: Tensor, bias: Number, steps: Number, active: Number = True) -> None:
        """Takes into T what base and scale have learned."""
        if self.base is not None:
            self.base.settle_(m, bias, steps, active)
        self._refresh(steps)

    def _refresh(self, steps: Number) -> None:
        """Computes, once a step, all of the operator if it is diagonal, else `root`."""
        self._steps, self._root = steps, None
        found = self._squares()
        found = self.network.apply(found) if is_diagonal(self.network) else found.sqrt_()
        if self._kept is None:
            self._kept = found
        else:
            self._kept.copy_(found)  # in place, for a CUDA graph reads it where it was when it was captured
        if is_diagonal(self.network):
            self._gains = self._kept
        else:
            self._root = self._kept

    def _squares(self) -> Tensor:
        """The diagonal of S D."""
        if self.base is None:
            assert self.scale is not None
            return self.scale.times(torch.ones_like(self.scale.moves), 1.0)
        gains = self.base.gains(self._steps)
        return gains if self.scale is None else self.scale.times(gains, 1.0)

    def __repr__(self) -> str:
        base = "None" if self.base is None else repr(self.base.kind)
        return f"Composite({self.network!r}, base={base}, has_scale={self.scale is not None})"


def is_diagonal(network: Preconditioner) -> bool:
    """Whether all of G is with this network, in the coordinates of the base."""
    return isinstance(network, LogDiagonal | Identity)
