"""The inner optimizer: what moves theta, the parameters of the preconditioner, along the hypergradient h.

Adam in the authors' form (paper, Algorithm 1; betas 0.9 and 0.999, eps 1e-7):

    M <- b1 M + (1 - b1) h        V <- b2 V + (1 - b2) h^2
    theta <- theta - meta_lr * sqrt(1 - b2^t) / (1 - b1^t) * M / (sqrt(V) + eps)

or plain SGD (the ablation LODO-SGD): theta <- theta - meta_lr * h.

M and V are of theta's dtype, or bfloat16 (`meta_state_dtype`), rounded stochastically; the arithmetic is in theta's.

Beyond the paper there is a second one, `descend_`, for the few numbers that are learned for each parameter.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lodo.context import Cohort, Context
from lodo.rounding import random_words, to_bfloat16
from lodo.scalars import Number, at_least_one, is_tensor, stacked

BETA1 = 0.9
BETA2 = 0.999
EPS = 1e-7

# Of `descend_`. Losses fall by orders of magnitude: second moments that remembered longer would be too large.
ROWS = 3  # of its tables
TABLE_BETA2 = 0.995
RATE_CAP = 5.0  # see `descent`

KINDS = ("adam", "sgd")

Moments = tuple[Tensor, Tensor]
"""(M, V) of the inner Adam, each of theta's shape."""


class Rates(NamedTuple):
    """The numbers of one inner step: plain, 0-dim tensors of theta's dtype (the count of its own), or one for each
    element of theta."""

    step_size: Number
    forget1: Number  # 1 - b1
    keep2: Number  # b2
    forget2: Number  # 1 - b2
    count: Number  # type: ignore[assignment]  # the t above, which salts the stochastic rounding


def start_moments(theta: Tensor) -> Moments:
    """M and V before the first step."""
    return torch.zeros_like(theta), torch.zeros_like(theta)


def capped(rate: float, cap: float, t: Number) -> Number:
    """min(rate, cap / t): a harmonic cap on a rate at step t >= 1.

    Under it noise dies out, and yet what is learned can still move by a bounded amount while a training grows e times
    as long.
    """
    return torch.clamp(cap / t, max=rate) if is_tensor(t) else min(rate, cap / t)


def rates(
    kind: str,
    meta_lr: float,
    count: Number,
    active: Number,
    dtype: torch.dtype,
    cap: float | None = None,
    age: Number | None = None,
) -> Rates:
    """The rates of inner step number `count`, the t above.

    With a `cap`, meta_lr is `capped` by it, after `age` steps (None: t). The rates of an inactive step leave theta, M
    and V as they are, bit for bit but for the signs of zeros.
    """
    t = at_least_one(count)  # an inactive first step must not divide 0 by 0
    bias = 1 if kind == "sgd" else (1 - BETA2**t) ** 0.5 / (1 - BETA1**t)
    rate = meta_lr if cap is None else capped(meta_lr, cap, t if age is None else at_least_one(age))
    numbers = (active * rate * bias, active * (1 - BETA1), 1 - active * (1 - BETA2), active * (1 - BETA2))
    step_size, forget1, keep2, forget2 = stacked(numbers).to(dtype).unbind() if is_tensor(active) else numbers
    return Rates(step_size, forget1, keep2, forget2, t)


def rates_per_element(at: Context, cap: float | None, like: Tensor) -> Rates:
    """The rates of a step for a theta that has one number for each element of the parameters, shape (n,)."""
    by_cohort = {cohort.places: cohort_rates(at, cohort, cap, like.dtype) for cohort in at.cohorts}
    if len(at.cohorts) == 1:
        return by_cohort[at.cohorts[0].places]
    found = [at.per_element(lambda cohort, i=i: by_cohort[cohort.places][i], like) for i in range(4)]  # type: ignore[misc]
    return Rates(found[0], found[1], found[2], found[3], at.inner_steps)


def cohort_rates(at: Context, cohort: Cohort, cap: float | None, dtype: torch.dtype) -> Rates:
    """The rates of a step for the parameters of a cohort."""
    kind, meta_lr = at.options["meta_optimizer"], at.options["meta_lr"]
    learning = cohort.learning.to(dtype) if is_tensor(cohort.learning) else cohort.learning
    return rates(kind, meta_lr, cohort.inner_steps, learning, dtype, cap, cohort.age)


def update_(theta: Tensor, h: Tensor, moments: Moments | None, rates: Rates, first: int = 0) -> None:
    """One inner step of `theta` in place, along `h`, which it overwrites.

    They may be a contiguous slice of the whole, with the same slice of the moments; `first` is its place there.
    """
    if moments is None:
        theta.sub_(h.mul_(rates.step_size))
        return
    exp_avg, exp_avg_sq = (moment.to(theta.dtype) for moment in moments)  # no copies unless they are bfloat16
    exp_avg.lerp_(h, rates.forget1)
    exp_avg_sq.mul_(rates.keep2).add_(h.mul_(h).mul_(rates.forget2))
    theta.sub_(torch.sqrt(exp_avg_sq, out=h).add_(EPS).reciprocal_().mul_(exp_avg).mul_(rates.step_size))
    if moments[0].dtype == torch.bfloat16:
        words = random_words(first, theta.numel(), rates.count, theta.device)
        moments[0].copy_(to_bfloat16(exp_avg, words))
        moments[1].copy_(to_bfloat16(exp_avg_sq, words >> 16))


def tiny(dtype: torch.dtype) -> float:
    """In place of EPS in `descend_`, where what is normalised may be of any size whose square is a number at all."""
    return torch.finfo(dtype).tiny ** 0.5


class Descent(NamedTuple):
    """The numbers of one step of `descend_`: plain, 0-dim tensors, or one for each parameter."""

    rate: Number
    forget1: Number  # 1 - b1
    forget2: Number  # 1 - b2
    bias1: Number  # 1 - b1^t
    bias2: Number  # 1 - b2^t


def descent(rate: float, steps: Number, active: Number, age: Number | None = None) -> Descent:
    """Those of step t = `steps` of the optimizer, the one that is being made included; without effect if not `active`.

    The rate is `capped`: what judges a scale goes on blaming it for a while after it has changed, and without a cap it
    would run away. `age` counts the steps since learning began anew, by which it is capped; None for all. Corrections
    for a start at zero go by all steps: after `LODO.reset` the first steps are up to thrice as long.
    """
    t = at_least_one(steps)
    active = active.to(t.dtype) if is_tensor(active) and is_tensor(t) else float(active)
    by_age = active * capped(rate, RATE_CAP, t if age is None else at_least_one(age))
    return Descent(by_age, active * (1 - BETA1), active * (1 - TABLE_BETA2), 1 - BETA1**t, 1 - TABLE_BETA2**t)


def descent_per_parameter(at: Context, of_cohort: Callable[[Cohort], Descent], like: Tensor) -> Descent:
    """The numbers of a step for tables with a column for each parameter."""
    by_cohort = {cohort.places: of_cohort(cohort) for cohort in at.cohorts}
    if len(at.cohorts) == 1:
        return by_cohort[at.cohorts[0].places]
    return Descent(*(at.per_parameter(lambda cohort, i=i: by_cohort[cohort.places][i], like) for i in range(5)))  # type: ignore[misc]


def descend_(table: Tensor, h: Tensor, by: Descent, bound: float) -> None:
    """One step of a few numbers for each of the parameters (its scale, its weights of momenta) along h.

        M <- b1 M + (1 - b1) h        V <- b2 V + (1 - b2) h^2
        u <- u - min(rate, RATE_CAP / t) * (M / (1 - b1^t)) / sqrt(V / (1 - b2^t))
        with b1 = 0.9, b2 = 0.995 and |u| <= bound

    Args:
        table: u, M and V along the first dimension, parameters along the last; float64 where the device has it.
        h: shaped like u. Where it is not finite, which a product of large numbers may be, it counts as 0.
        by: of this step.
        bound: of |u|, whatever h.
    """
    u, exp_avg, exp_avg_sq = table.unbind()
    largest = 0.5 * torch.finfo(table.dtype).max ** 0.5  # a square that overflows would stay in V
    h = h.to(table.dtype).nan_to_num(0.0, 0.0, 0.0).clamp_(-largest, largest)
    exp_avg.lerp_(h, by.forget1)
    exp_avg_sq.lerp_(h * h, by.forget2)
    root = torch.sqrt(exp_avg_sq / by.bias2).add_(tiny(table.dtype))
    u.sub_((exp_avg / by.bias1).div_(root).mul_(by.rate)).clamp_(-bound, bound)
