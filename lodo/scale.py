"""A learned scale for each tensor: G' = S^1/2 G S^1/2 with S = exp(s_j) on tensor j, all s_j = 0 at the start.

s_j is judged by all the steps that lately were taken, not by the last one alone: with the trace of the moves,

    E <- scale_trace E + (what the last step subtracted from the parameters)
    h_j = -<g_j, E_j>,    s_j <- s_j - min(scale_lr, DRIFT / t) * Adam's normalised h_j

h_j is the derivative with respect to s_j of the loss where the steps have led, each counted by its age, if G mixes no
tensors; if it does, the effect of a tensor's gradient on the others' steps counts for them. A scale learned from the
last step alone would fall too early under noise (short-horizon bias). DRIFT bounds how far a scale moves in the time
that a training takes to grow e times as long: the steps in E go on blaming a scale for a while after it has changed.
"""

import torch
from torch import Tensor

from lodo.meta import BETA1, BETA2
from lodo.scalars import Number, is_tensor

DRIFT = 5.0
TINY = 1e-30
ROWS = 3  # of the table that is kept: the s_j, and the first and second moments of Adam


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

    def learn_(self, g: Tensor, scale_lr: float, steps: Number, active: Number) -> None:
        """Moves the scales along the hypergradient.

        Args:
            g: gradient where the moves have led, shape (n,).
            scale_lr: the rate, before DRIFT bounds it.
            steps: taken, the one that is being made included.
            active: whether to.
        """
        log_scale, exp_avg, exp_avg_sq = self.table
        active = active.to(self.table.dtype) if is_tensor(active) else active
        pairs = zip(g.split(self._lengths), self._parts, strict=True)
        h = torch.stack([torch.dot(part, move) for part, move in pairs]).to(self.table.dtype).neg_()
        # Of numbers that are large but finite the product may overflow, or its square, which would stay in exp_avg_sq.
        largest = 0.5 * torch.finfo(h.dtype).max ** 0.5
        h.nan_to_num_(0.0, 0.0, 0.0).clamp_(-largest, largest)
        t = steps + (steps < 1)
        exp_avg.lerp_(h, active * (1 - BETA1))
        exp_avg_sq.lerp_(h * h, active * (1 - BETA2))
        root = torch.sqrt(exp_avg_sq / (1 - BETA2**t)).add_(TINY)
        fall = (exp_avg / (1 - BETA1**t)).div_(root)
        rate = torch.clamp(DRIFT / t, max=scale_lr) if is_tensor(t) else min(scale_lr, DRIFT / t)
        log_scale.sub_(fall.mul_(active * rate))

    def record_(self, step: Tensor, trace: float, active: Number) -> None:
        """Takes the step that is being made, shape (n,), into the trace."""
        active = active.to(step.dtype) if is_tensor(active) else active
        self.moves.mul_(1 - active * (1 - trace)).add_(step)

    def multiply_(self, vector: Tensor) -> None:
        """S^1/2 times a vector of shape (n,), in place."""
        roots = torch.exp(0.5 * self.table[0]).to(vector.dtype)
        parts = list(vector.split(self._lengths))
        if vector.device.type == "cpu":
            torch._foreach_mul_(parts, roots.tolist())
        else:
            torch._foreach_mul_(parts, list(roots.unbind()))
