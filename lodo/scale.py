"""A learned scale for each tensor: G' = S^1/2 G S^1/2 with S = exp(s_j) on tensor j, all s_j = 0 at the start.

s_j is judged by all the steps that lately were taken, not by the last one alone: with the trace of the moves,

    E <- scale_trace E + (what the last step subtracted from the parameters)
    h_j = -<g_j, E_j>,    s_j <- s_j - min(scale_lr, DRIFT / t) * Adam's normalised h_j

(`lodo.meta.descend_`). h_j is the derivative with respect to s_j of the loss where the steps have led, each counted by
its age, if G mixes no tensors; if it does, the effect of a tensor's gradient on the others' steps counts for them. A
scale learned from the last step alone would fall too early under noise (short-horizon bias).

Scales come to fall by orders of magnitude, and the hypergradients of all else on their tensors with them: against the
second moment that an inner Adam remembers they would vanish. So network and mixture learn from S^-1 g in place of g.
"""

import torch
from torch import Tensor

from lodo import kernels, meta
from lodo.scalars import Number, add_decayed_, is_tensor

LARGEST_LOG = 64.0  # of a factor S^power: float32 has no S^-1 for the smallest S, and infinity times zero is no number


class Scale:
    """The scales of one param group.

    Args:
        table: (3, k) for k tensors; advanced in place, as `moves` is.
        moves: the trace E, shape (n,).
        lengths: numbers of elements of the tensors.
    """

    def __init__(self, table: Tensor, moves: Tensor, lengths: list[int]) -> None:
        self.table, self.moves, self._lengths = table, moves, lengths
        self._parts = moves.split(lengths)
        self._offsets = kernels.offsets(lengths)
        self._is_native = kernels.native.available(moves)

    def learn_(self, g: Tensor, scale_lr: float, steps: Number, active: Number) -> None:
        """Moves the scales along the hypergradient.

        Args:
            g: gradient where the moves have led, shape (n,).
            scale_lr: the rate, before DRIFT bounds it.
            steps: taken, the one that is being made included.
            active: whether to.
        """
        by = meta.descent(scale_lr, steps, active)
        if self._is_native:
            kernels.native.scale_learn_(self.table, self.moves, g, self._offsets, by)
            return
        pairs = zip(g.split(self._lengths), self._parts, strict=True)
        h = torch.stack([torch.dot(part, move) for part, move in pairs]).neg_()
        meta.descend_(self.table, h, by)

    def record_(self, step: Tensor, trace: float, active: Number) -> None:
        """Takes the step that is being made, shape (n,), into the trace."""
        active = active.to(step.dtype) if is_tensor(active) else active
        add_decayed_(self.moves, step, 1 - active * (1 - trace))

    def times(self, vector: Tensor, power: float) -> Tensor:
        """S^power, within exp(+-LARGEST_LOG), times a vector of shape (n,)."""
        product = vector.clone()
        factors = (power * self.table[0]).clamp_(-LARGEST_LOG, LARGEST_LOG).exp_().to(vector.dtype)
        parts = list(product.split(self._lengths))
        torch._foreach_mul_(parts, factors.tolist() if vector.device.type == "cpu" else list(factors.unbind()))
        return product
