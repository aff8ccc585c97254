"""A learned scale for each tensor: G' = S^1/2 G S^1/2 with S = exp(s_j) on tensor j, all s_j = 0 at the start.

s_j is judged by all the steps that lately were taken, not by the last one alone: with the trace of the moves,

    E <- scale_trace E + (what the last step subtracted from the parameters, weight decay included)
    h_j = -<g_j, E_j>,    s_j <- s_j - min(scale_lr, DRIFT / t) * Adam's normalised h_j

(`lodo.meta.descend_`), and 1e-8 <= S <= 1e8 whatever is learned. h_j is the derivative with respect to s_j of the loss
where the steps have led, each counted by its age, if G mixes no tensors; if it does, the effect of a tensor's gradient
on the others' steps counts for them. A scale learned from the last step alone would fall too early under noise
(short-horizon bias). Moves that somebody takes back, as a projection does, are taken out of E.

Scales come to fall by orders of magnitude, and the hypergradients of all else on their tensors with them: against the
second moment that an inner Adam remembers they would vanish. So network and mixture learn from S^-1 g in place of g.
"""

import math

import torch
from torch import Tensor

from lodo import kernels, meta
from lodo.scalars import Cell, Number, add_decayed_, is_tensor

LARGEST_LOG = math.log(1e8)  # of S: nothing that judges it may drive it beyond


class Scale:
    """The scales of one param group.

    Args:
        table: (3, k) for k tensors; advanced in place, as `moves` and `levels` are.
        moves: the trace E, shape (n,).
        lengths: numbers of elements of the tensors.
        levels: (1 + k,): the last lr, and the largest lr * S so far.
    """

    def __init__(self, table: Tensor, moves: Tensor, lengths: list[int], levels: Tensor | None = None) -> None:
        self.table, self.moves, self._lengths = table, moves, lengths
        self.levels = table.new_zeros(1 + len(lengths)) if levels is None else levels
        self._last_lr = Cell(self.levels[0])
        self._parts = moves.split(lengths)
        self._offsets = kernels.offsets(lengths)
        self._is_native = kernels.native.available(moves)

    def follow_(self, lr: Number, active: Number) -> None:
        """Takes back what s has made up for while lr was small, when it rises.

        A rise of lr is a rise of the step that lr stands for, not of what the scale has made of it: it leaves lr * S on
        no tensor above both lr and the largest lr * S so far.
        """
        if not is_tensor(lr):
            before = self._last_lr.get()
            if lr > before:
                torch.minimum(self.table[0], (self.levels[1:].clamp(min=lr) / lr).log_(), out=self.table[0])
            if lr != before:
                self._last_lr.set(lr)
        else:
            s, last, peak = self.table[0], self.levels[0], self.levels[1:]
            lr = torch.where(active, lr.to(last.dtype), last)
            most = (torch.maximum(peak, lr) / lr).log().nan_to_num_(0.0, posinf=0.0)
            s.copy_(torch.where(lr > last, torch.minimum(s, most), s))
            last.copy_(lr)

    def correct_(self, change: Tensor, is_held: Tensor) -> None:
        """Takes out of the trace the moves that somebody has undone.

        Args:
            change: what was added to the parameters since the last step, shape (n,).
            is_held: where they were `taken_back`: the parameters would be there whatever the moves before.
        """
        self.moves.mul_(kept_share(self.moves, change)).masked_fill_(is_held, 0)

    def learn_(self, g: Tensor, scale_lr: float, steps: Number, active: Number, age: Number | None = None) -> None:
        """Moves the scales along the hypergradient.

        Args:
            g: gradient where the moves have led, shape (n,).
            scale_lr: the rate, before DRIFT bounds it.
            steps: taken, the one that is being made included.
            active: whether to.
            age: of these steps, those since learning began anew; None for all.
        """
        by = meta.descent(scale_lr, steps, active, age)
        if self._is_native:
            kernels.native.scale_learn_(self.table, self.levels, self.moves, g, self._offsets, by, LARGEST_LOG)
            return
        pairs = zip(g.split(self._lengths), self._parts, strict=True)
        h = torch.stack([torch.dot(part, move) for part, move in pairs]).neg_()
        meta.descend_(self.table, h, by, LARGEST_LOG)
        torch.maximum(self.levels[1:], self.table[0].exp().mul_(self.levels[0]), out=self.levels[1:])

    def record_(self, step: Tensor, trace: float, active: Number) -> None:
        """Takes the step that is being made, shape (n,), into the trace."""
        active = active.to(step.dtype) if is_tensor(active) else active
        add_decayed_(self.moves, step, 1 - active * (1 - trace))

    def times(self, vector: Tensor, power: float) -> Tensor:
        """S^power times a vector of shape (n,)."""
        product = vector.clone()
        factors = self.factors(power).to(vector.dtype)
        parts = list(product.split(self._lengths))
        torch._foreach_mul_(parts, factors.tolist() if vector.device.type == "cpu" else list(factors.unbind()))
        return product

    def factors(self, power: float = 1.0) -> Tensor:
        """S^power, shape (k,)."""
        return (power * self.table[0]).clamp_(-LARGEST_LOG, LARGEST_LOG).exp_()


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


def taken_back(step: Tensor, change: Tensor, rounding: Tensor, slack: float) -> Tensor:
    """Where a whole step was taken back, to `slack` of it, or to `rounding`. Other arguments as for `kept_share`."""
    return (change != 0) & ((change - step).abs_() <= rounding.add(step.abs(), alpha=slack))
