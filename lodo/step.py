"""Algorithm 1 (Liao et al., "Learning to Optimize Quasi-Newton Methods", TMLR 2023): the page to read first.

LODO keeps a learned operator G(theta) = lr * U^T U in place of the inverse Hessian and tunes theta while it
optimizes. Its loop is cut here where the user's backward pass ends: the loss after one step is the loss before the
next, so the gradient g that a step is called with also judges the step before, and one ordinary backward pass per
step is enough.

    1  h = d f(x_t) / d theta = - d/d theta <g, G(theta) m>       with the m and the lr of the last step
    2  theta <- InnerOptimizer(theta, h)
    3  m <- beta m + (1 - beta) g
    4  x <- x - G(theta) m

G is symmetric, so <g, G m> = lr <U g, U m>, and h is one explicit backward pass through U, no autograd.
"""

import torch
from torch import Tensor

from lodo import meta
from lodo.preconditioners import Preconditioner


def lodo_step(
    g: Tensor,
    m: Tensor,
    preconditioner: Preconditioner,
    moments: meta.Moments | None,
    count: Tensor,
    last_lr: Tensor,
    lr: Tensor,
    active: Tensor,
    *,
    beta: float,
    meta_lr: float,
    meta_optimizer: str,
) -> Tensor:
    """One step on the vector of one param group; returns G(theta) m, shape (n,), to subtract from the parameters.

    All of `m`, the preconditioner's theta, `moments`, `count` and `last_lr` are advanced in place. With `active` False
    none of them changes and the returned step is zero; no value is read back to the host to decide that.

    Args:
        g: gradient where the last step landed, shape (n,); zeroed if inactive.
        m: momentum, shape (n,).
        moments: of the inner Adam, None for the inner SGD.
        count: 0-dim, inner steps taken. The first one counts although h = 0 there.
        last_lr: 0-dim, lr of the last step.
        lr: 0-dim, lr of this step.
        active: 0-dim bool.
        beta, meta_lr, meta_optimizer: as for `lodo.LODO`; meta_lr 0 leaves theta and its inner optimizer alone.
    """
    inactive = ~active
    one_or_zero = active.to(m.dtype)
    g.masked_fill_(inactive, 0)  # so that no NaN meets a zero weight below
    if meta_lr > 0:
        rates = meta.next_rates(meta_optimizer, meta_lr, count, active, g.dtype)
        preconditioner.learn_(g, m, last_lr, moments, rates)
    m.lerp_(g, one_or_zero * (1 - beta))
    last_lr.lerp_(lr, one_or_zero)
    return preconditioner.apply(m).mul_(lr).masked_fill_(inactive, 0)


def judge(g: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
    """Two 0-dim bools about a gradient that a step is called with: is it sound, is the call idle.

    Sound: all finite, and not so large that the square of a hypergradient of its size would overflow, which would stay
    in the inner Adam's second moment for good. Idle: zero, with lr = 0, which is how distributed checkpointing makes an
    optimizer create its state; such a call must change nothing.
    """
    size = torch.linalg.vector_norm(g, ord=torch.inf)
    product = size * size * lr
    return product * product < torch.inf, size + lr == 0
