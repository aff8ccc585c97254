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

Parts that go beyond the paper and can be left out:

- a trace: line 1 takes e in place of m, where e <- trace * e + m in line 3, so that the gradient also judges the steps
  before the last one;
- a mixture of momenta with learned weights in place of line 3 (see `lodo.mixture`);
- a base preconditioner and a scale per tensor: then G = lr * T^T U^T U T (see `lodo.composite`), line 1 goes through U
  in the coordinates T x, and g is taken into the base before line 3. A base may rotate: g is rotated as it comes in and
  the step as it goes out, all in between and all that is kept (m, e, the mixture's momenta) is in its coordinates.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lodo import meta
from lodo.fused import Fused
from lodo.mixture import Mixture
from lodo.preconditioners import Operator
from lodo.scalars import Number, add_decayed_, choose, is_tensor, norm


def lodo_step(
    g: Tensor,
    m: Tensor,
    preconditioner: Operator,
    moments: meta.Moments | None,
    count: Number,
    last_lr: Number,
    lr: Number,
    active: Number,
    learning: Number,
    *,
    beta: float,
    meta_lr: float,
    meta_optimizer: str,
    max_condition: float | None = None,
    e: Tensor | None = None,
    trace: float = 0.0,
    mixture: Mixture | None = None,
    mix_lr: float = 0.0,
    steps: Number = 0,
    age: Number | None = None,
    share: Tensor | None = None,
    idle: Sequence[Number] | None = None,
) -> Tensor:
    """One step on the vector of one param group; returns G(theta) m, shape (n,), to subtract from the parameters.

    Advances `m`, the preconditioner's theta and `moments` in place. If `active` does not hold they keep their bits
    (an `active` on an accelerator is not read to find out, and a zero may lose its sign there) and the returned step
    is zero.

    Args:
        g: gradient where the last step landed, shape (n,); zeroed if inactive.
        m: momentum, shape (n,), in the coordinates of `preconditioner.rotate`.
        moments: of the inner Adam, None for the inner SGD.
        count: inner steps taken, this one included. The first one counts although h = 0 there.
        last_lr: lr of the last step, times the factor by which `shorten_` scaled it.
        lr: lr of this step.
        active: whether this step is to be taken.
        learning: whether theta is to be learned in it (lines 1 and 2), which implies `active`.
        beta, meta_lr, meta_optimizer: as for `lodo.LODO`; meta_lr 0 leaves theta and its inner optimizer alone.
        max_condition: as for `lodo.LODO`. On an accelerator this one makes the host wait.
        e: trace of the momentum, shape (n,), advanced in place; None for the paper's method, whose trace is 0.
        trace: its decay.
        mixture: of momenta, in place of the single one; it advances, and `m` becomes the mixture.
        mix_lr: as for `lodo.LODO`.
        steps: taken, this one included; what the base preconditioner counts by.
        age: of these, the steps since learning began anew; None for all.
        share: how much is left of the last step, between 0 and 1, shape (n,); None if all of it is. What somebody has
            taken back judges nothing.
        idle: whether the gradient of each tensor is zero; None if that of none is.
    """
    if is_tensor(active):
        g.masked_fill_(~active, 0)  # so that no NaN meets a zero weight below
        active, learning = active.to(m.dtype), learning.to(m.dtype)
    elif not active:
        return torch.zeros_like(m)
    rotated = preconditioner.rotate(g if share is None else g * share)
    judged = m if e is None else e
    is_learning = meta_lr > 0 and (is_tensor(learning) or learning)
    rates = None
    if is_learning:
        rates = meta.rates(meta_optimizer, meta_lr, count, learning, m.dtype, preconditioner.drift, age)
    if isinstance(preconditioner, Fused):
        preconditioner.judge_(rotated, judged, last_lr, moments, rates, mixture, mix_lr, steps, age)
    else:
        if mixture is not None:
            mixture.learn_(preconditioner.reply(rotated), mix_lr, steps, active * (last_lr > 0), age)
        if rates is not None:
            preconditioner.learn_(rotated, judged, last_lr, moments, rates)
    if rates is not None and max_condition is not None and learning:
        preconditioner.bound_condition_(max_condition)
    kept = [*([] if e is None else [e]), m if mixture is None else mixture.momenta]
    rotated = preconditioner.observe_(g, rotated if share is None else None, kept, active, steps, age)
    if isinstance(preconditioner, Fused):
        numbers = {"lr": lr, "beta": beta, "trace": trace, "age": age, "idle": idle}
        return preconditioner.rotate_back(preconditioner.advance_(rotated, m, e, mixture, steps, **numbers))
    if mixture is None:
        m.lerp_(rotated, active * (1 - beta))
    else:
        mixture.mix_(m, rotated, steps, active, idle)
    preconditioner.settle_(m, 1 if mixture is not None else 1 - beta ** (steps + (steps < 1)), steps, active)
    if e is not None:
        add_decayed_(e, m * active if is_tensor(active) else m, 1 - active * (1 - trace))
    step = preconditioner.rotate_back(preconditioner.apply(m).mul_(lr))
    return step.masked_fill_(active == 0, 0) if is_tensor(active) else step


def shorten_(step: Tensor, x: Tensor, max_step_norm: float) -> tuple[Number, Number]:
    """Scales a step down to at most |step| = max_step_norm * max(|x|, 1e-3 sqrt(n)), in place.

    The floor, a root mean square of 1e-3, lets parameters that start at zero leave it.

    Args:
        step: what is to be subtracted from the parameters, shape (n,).
        x: the parameters, shape (n,).
        max_step_norm: as for `lodo.LODO`.

    Returns:
        The factor, and whether the step was finite. One that was not becomes zero, and so does the factor.
    """
    length, size = norm(step), norm(x)
    is_finite = length < math.inf
    floor = 1e-3 * step.numel() ** 0.5
    limit = max_step_norm * choose(size > floor, size, floor)
    is_long = length > limit
    factor = choose(is_long, limit / choose(is_long, length, 1.0), 1.0) * is_finite
    step.mul_(factor)
    if is_tensor(is_finite):
        step.masked_fill_(~is_finite, 0)
    elif not is_finite:
        step.zero_()
    return factor, is_finite


def judge(energy: Number, lr: Number, dtype: torch.dtype, is_squared: bool) -> tuple[Number, Number]:
    """Whether a gradient is sound, and whether the call is idle, from the gradient's sum of squares and from
    lr / (1 - trace).

    Sound: all finite; and where the inner optimizer squares the hypergradient, which is of order lr |g| |m|, and
    1 / (1 - trace) times that with a trace, not so large that the square would overflow and stay in its second moment
    for good. Idle: zero, with lr = 0, which is how distributed checkpointing makes an optimizer create its state; such
    a call must change nothing.
    """
    size = energy * (lr + 1)  # one of the next steps may have a larger lr than this one, in a warm-up say
    largest = torch.finfo(dtype).max
    return (size * size if is_squared else energy) <= largest, energy + lr == 0
