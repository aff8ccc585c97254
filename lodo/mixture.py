"""A learned mixture of momenta: m = sum_b w_b m_b, where m_b is an exponential moving average with decay b.

How much momentum is good hangs on the noise and on how the curvature changes, and differs from task to task more than
any other hyperparameter: none at all is best to track a moving minimum, much of it in a noisy valley. The weights, a
softmax of u_j on tensor j, are judged as theta is, by the gradient where the last step landed:

    h_jb = -d/du_jb <g, G m> / lr = -w_jb (c_jb - sum_b' w_jb' c_jb'),    c_jb = <(G g)_j, (m_b)_j> / lr
    u_jb <- u_jb - min(mix_lr, DRIFT / t) * Adam's normalised h_jb,    |u_jb| <= 30        (`lodo.meta.descend_`)

All m_b are corrected for their start at zero. While the gradient of a tensor is zero its momenta decay by COAST at
least, so that it moves on for no longer than it would with Adam.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lodo import meta
from lodo.scalars import Number, is_tensor

BOUND = 30.0  # of |u|
COAST = 0.9
FIRST_SHARE = 0.9  # of the decay nearest to `beta`, at the start; the others share the rest


class Mixture:
    """The momenta of one param group.

    Args:
        momenta: (b, n) for b decays, before correction; advanced in place, as `table` is.
        table: (3, b, k) for k tensors.
        decays: of the momenta, in [0, 1).
        lengths: numbers of elements of the tensors.
    """

    def __init__(self, momenta: Tensor, table: Tensor, decays: Sequence[float], lengths: list[int]) -> None:
        self.momenta, self.table, self.decays_of, self._lengths = momenta, table, tuple(decays), lengths
        self.decays = torch.tensor(self.decays_of, dtype=table.dtype, device=table.device)

    def start_(self, beta: float) -> None:
        """Gives the weights their start."""
        count = len(self.decays_of)
        nearest = min(range(count), key=lambda index: abs(self.decays_of[index] - beta))
        shares = self.decays.new_full((count,), (1 - FIRST_SHARE) / max(count - 1, 1))
        shares[nearest] = FIRST_SHARE if count > 1 else 1.0
        self.table[0].copy_(shares.log()[:, None].expand_as(self.table[0]))

    def learn_(self, step: Tensor, mix_lr: float, steps: Number, active: Number, age: Number | None = None) -> None:
        """Moves the weights along the hypergradient.

        Args:
            step: (G / lr) g of the G that made the last step, g the gradient where it led; shape (n,). lr is left out
                because a size that all steps have in common tells nothing of the weights.
            mix_lr: the rate, before DRIFT bounds it.
            steps: taken, the one that is being made included.
            active: whether to.
            age: steps since learning began anew; None for all.
        """
        parts = (self.momenta * step).split(self._lengths, dim=1)
        c = torch.stack([part.sum(1) for part in parts], dim=1).to(self.table.dtype)
        c = (c / self._corrections(made_of(steps))[:, None]).nan_to_num_(0.0, 0.0, 0.0)
        w = self.table[0].softmax(0)
        meta.descend_(self.table, -w * (c - (w * c).sum(0)), descent(mix_lr, steps, active, age), BOUND)

    def mix_(self, m: Tensor, g: Tensor, steps: Number, active: Number, idle: Sequence[Number] | None = None) -> None:
        """Takes the gradient g into the momenta, and writes their mixture into m; both of shape (n,).

        `idle` says of each tensor whether its gradient is zero; None if no tensor's is.
        """
        active = active.to(m.dtype) if is_tensor(active) else active
        for momentum, beta in zip(self.momenta, self.decays_of, strict=True):
            momentum.lerp_(g, active * (1 - beta))
            if idle is not None and beta > COAST:
                parts, factor = list(momentum.split(self._lengths)), COAST / beta
                if is_tensor(idle[0]):  # then all are
                    flags = torch.stack(list(idle)).to(m.dtype)
                    torch._foreach_mul_(parts, list((1 - flags * (1 - factor)).unbind()))
                else:
                    torch._foreach_mul_(parts, [factor if is_idle else 1.0 for is_idle in idle])
        w = self.table[0].softmax(0) / self._corrections(steps + (steps < 1))[:, None]
        shares = zip(self.momenta.split(self._lengths, dim=1), w.to(m.dtype).unbind(1), strict=True)
        for part, (momenta, weights) in zip(m.split(self._lengths), shares, strict=True):
            torch.mv(momenta.T, weights, out=part)

    def _corrections(self, steps: Number) -> Tensor:
        return 1 - self.decays**steps


def descent(mix_lr: float, steps: Number, active: Number, age: Number | None = None) -> meta.Descent:
    """The numbers of step `steps` of `Mixture.learn_`, which has no effect in the first two: after one step all
    corrected momenta are the same, and what is left of h is rounding."""
    return meta.descent(mix_lr, steps, active * (steps > 2), age)


def made_of(steps: Number) -> Number:
    """Of how many gradients the momenta are made that led to step `steps`."""
    return steps - 1 + (steps < 2)
