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

Beyond the paper, parts (`lodo.parts`) may take part. G = lr * T^T U^T U T is then put together from their factors
(`lodo.preconditioners.composite`). A part may rotate: g is rotated as it comes in and the step as it goes out, all in
between and all that is kept of gradients is in its coordinates.

Lines 1 to 4 themselves are in `lodo.update.plain`, and once more, faster, in `lodo.update.fused`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lodo.context import Context
from lodo.parts import Undone
from lodo.parts.record import judged_share
from lodo.scalars import Number, is_tensor, norm, where
from lodo.state.group_state import GroupState, Together


def take_step_(live: GroupState, at: Context, params: list[Tensor]) -> None:
    """One step of one param group on the gradient in `live.gradient`, which it may overwrite.

    State that a cohort which is not active has keeps its bits (an `active` on an accelerator is not read to find out,
    and a zero may lose its sign there).
    """
    update, operator, g = live.update, live.operator, live.gradient
    if is_tensor(at.active):
        g.masked_fill_(~at.active, 0)  # so that no NaN meets a zero weight below
    live.momentum.load_()
    last = None
    if live.record is not None:
        at = at._replace(unit=live.unit)
        share, last = look_back(live, at, params)
        at = at._replace(share=share, unit=live.change_unit_(at.active))
    if live.average is not None:
        live.average.take_in_(live.parameters(params) if live.x is None else live.x, at)
    update.begin_(at)
    if live.record is not None:
        decayed = gradient_with_decay(live, at)
        update.learn_parts_(decayed, at)

    rotated = operator.rotate(g if at.share is None else g * at.share)
    update.learn_(rotated, at)  # 1, 2
    if last is not None:
        update.learn_from_step_(decayed if at.share is None else decayed * at.share, last, at)
    rotated = update_basis_(live, g, rotated if at.share is None else None, at)
    step = operator.rotate_back_(update.advance_(rotated, at))  # 3, 4
    live.momentum.store_(at.steps)
    subtract_(live, step, at, params)
    live.record_versions()
    live.has_stepped = True


def look_back(live: GroupState, at: Context, params: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Reads the parameters, and looks what has become of the last step.

    Returns:
        How much of it is left, between 0 and 1, shape (n,), None if nobody has changed the parameters since: what
        somebody has taken back judges nothing. And the last step, shape (n,), if parts are to learn from it and there
        is weight decay in it, else None.
    """
    if live.record is None or live.x is None:
        return None, None
    live.flat.gather(live.flat.tensors(params), live.x_views)
    if live.waits and not at.active:
        return None, None
    change = live.record.change(live.x, at, live.waits)
    is_judged = live.update.learns_from_step and at.options["weight_decay"] > 0
    last = last_step(live, live.x, at) if change is not None or is_judged else None
    undone = None
    if change is not None and last is not None:
        undone = Undone(change, last, live.x.abs().mul_(2 * live.flat.coarsest))
    for part in live.parts:
        part.correct_(live.gradient, undone, at)
    return None if undone is None else judged_share(undone), last if is_judged else None


def last_step(live: GroupState, x: Tensor, at: Context) -> Tensor:
    """What the last step subtracted from the parameters, now x, weight decay included, shape (n,)."""
    made = live.operator.apply(live.momentum.m)
    made = made.mul_(at.per_element(lambda cohort: cohort.last_lr * at.unit, made))
    step = live.operator.rotate_back_(made)
    if at.options["weight_decay"] > 0:
        lr = at.per_parameter(lambda cohort: cohort.scheduled_lr, step)
        step.add_(decay(live, x, lr, at))
    return step


def gradient_with_decay(live: GroupState, at: Context) -> Tensor:
    """The gradient of the loss that steps with weight decay descend on: it has weight_decay / 2 <x, x> in the metric of
    the gradients' own size, of which each parameter's mean is taken. Shape (n,)."""
    weight_decay = at.options["weight_decay"]
    if weight_decay == 0 or live.x is None:
        return live.gradient
    pull = live.x.clone()
    scales = next((found for part in live.parts if (found := part.gradient_scales(at)) is not None), None)
    if scales is not None:
        on_host = live.flat.device.type == "cpu"
        torch._foreach_mul_(live.flat.views(pull), [float(size) for size in scales] if on_host else list(scales))
    return live.gradient.add(pull, alpha=weight_decay)


def update_basis_(live: GroupState, g: Tensor, rotated: Tensor | None, at: Context) -> Tensor:
    """Brings the coordinates of G up to date, and all that is kept in them; returns the gradient in them."""
    for part in live.parts:
        rotated = part.update_basis_(g, rotated, live.momentum.in_coordinates, at)
    return live.operator.rotate(g) if rotated is None else rotated


def subtract_(live: GroupState, step: Tensor, at: Context, params: list[Tensor]) -> None:
    """Line 4: subtracts a step from the parameters that have a gradient, bounded, and with weight decay."""
    options, flat = at.options, live.flat
    tensors, moves = flat.tensors(params), [p.grad is not None for p in params]
    parts = [] if all(moves) else flat.views(step)
    factor: Number = 1.0
    is_finite: Number = True
    if parts and (options["max_step_norm"] is not None or live.record is not None):
        flat.mask_(parts, moves)
    if options["max_step_norm"] is not None or options["weight_decay"] != 0:
        flat.gather(tensors, live.gradient_views)  # into the memory of the gradient, which has done its work
    if options["max_step_norm"] is not None:
        flat.mask_(live.gradient_views, moves)
        factor, is_finite = shorten_(step, live.gradient, options["max_step_norm"], live.together)
        live.counts.skipped.add(is_finite == 0)
    live.counts.keep_lr(at, factor)
    if options["weight_decay"] != 0:
        # Part of the one subtraction, so that a low-precision parameter is rounded once.
        step.add_(decay(live, live.gradient, at.lr, at).mul_(at.active * is_finite))
        if parts and live.record is not None:
            flat.mask_(parts, moves)
    for part in live.parts:
        part.record_(step, at)
    write_(live, step, at, tensors, moves)


def write_(live: GroupState, step: Tensor, at: Context, tensors: Sequence[Tensor], moves: Sequence[bool]) -> None:
    """x <- x - step where `moves` says so, and keeps what has been written."""
    moved = [tensor for tensor, is_moved in zip(tensors, moves, strict=True) if is_moved]
    if live.record is None or live.x is None:
        parts = zip(live.flat.views(step), moves, strict=True)
        torch._foreach_sub_(moved, [part for part, is_moved in parts if is_moved])
        return
    written, views = live.record.written, live.written_views
    is_active = at.per_element(lambda cohort: cohort.active, step)
    kept = written.clone() if is_tensor(is_active) else None
    torch.sub(live.x, step, out=written)
    torch._foreach_copy_(moved, [view for view, is_moved in zip(views, moves, strict=True) if is_moved])
    if any(tensor.dtype != written.dtype for tensor in moved):
        live.flat.gather(tensors, views)  # as rounded
    if kept is not None and is_tensor(is_active):
        torch.where(is_active > 0, written, kept, out=written)


def decay(live: GroupState, x: Tensor, lr: Number | Tensor, at: Context) -> Tensor:
    """lr * weight_decay * S x, what weight decay subtracts, with the scales S of the parameters, if there are any: in
    proportion to the steps that are taken, as AdamW's is. `lr` may be one for each parameter."""
    rate = lr * at.options["weight_decay"]
    scales = next((found for part in live.parts if (found := part.step_scales()) is not None), None)
    if scales is None:
        return x * (at.spread(rate, x) if is_tensor(rate) and rate.dim() > 0 else rate)
    product = x.clone()
    factors = (scales * rate).clamp_(max=1)  # to zero, not beyond
    on_host = x.device.type == "cpu"
    torch._foreach_mul_(live.flat.views(product), factors.tolist() if on_host else list(factors.unbind()))
    return product


def shorten_(step: Tensor, x: Tensor, max_step_norm: float, together: Together | None = None) -> tuple[Number, Number]:
    """Scales a step down to at most |step| = max_step_norm * max(|x|, 1e-3 sqrt(n)), in place.

    The floor, a root mean square of 1e-3, lets parameters that start at zero leave it.

    Args:
        step: what is to be subtracted from the parameters, shape (n,).
        x: the parameters, shape (n,).
        max_step_norm: as for `lodo.LODO`.
        together: with whom, if other ranks have the rest of the group.

    Returns:
        The factor, and whether the step was finite. One that was not becomes zero, and so does the factor.
    """
    length_of, count = (norm, step.numel()) if together is None else (together.norm, together.size)
    length, size = length_of(step), length_of(x)
    is_finite = length < math.inf
    floor = 1e-3 * count**0.5
    limit = max_step_norm * where(size > floor, size, floor)
    is_long = length > limit
    factor = where(is_long, limit / where(is_long, length, 1.0), 1.0) * is_finite
    step.mul_(factor)
    if is_tensor(is_finite):
        step.masked_fill_(~is_finite, 0)
    elif not is_finite:
        step.zero_()
    return factor, is_finite


def check_gradients(groups: Sequence[Mapping[str, Any]], lives: Sequence[GroupState]) -> list[tuple[Number, Number]]:
    """`check_gradient` for each group. One unsound group makes those on its device unsound too: a step is taken whole
    or not.

    Groups that are sharded differently do not: what ranks have in common must not hang on what only one of them sees.
    """
    verdicts = []
    for group, live in zip(groups, lives, strict=True):
        is_squared = bool(group["meta_lr"] > 0 and group["meta_optimizer"] == "adam")
        lr = live.counts.lr.get() / (1 - group["trace_decay"])
        verdicts.append(check_gradient(live.measure(), lr, live.flat.dtype, is_squared))
    together: dict[Any, Number] = {}
    ranks = [live.flat.mesh if live.together is None else live.together.ranks for live in lives]
    for own, (is_sound, _) in zip(ranks, verdicts, strict=True):
        together[own] = is_sound & together.get(own, True)  # type: ignore[operator]
    return [(together[own], is_idle) for own, (_, is_idle) in zip(ranks, verdicts, strict=True)]


def check_gradient(energy: Number, lr: Number, dtype: torch.dtype, is_squared: bool) -> tuple[Number, Number]:
    """Whether a gradient is sound, and whether the call is idle, from the gradient's sum of squares and from
    lr / (1 - trace_decay).

    Sound: all finite; and where the inner optimizer squares the hypergradient, which is of order lr |g| |m|, and
    1 / (1 - trace_decay) times that with a trace, not so large that the square would overflow and stay in its second
    moment for good. Idle: zero, with lr = 0, which is how distributed checkpointing makes an optimizer create its
    state; such a call must change nothing.
    """
    size = energy * (lr + 1)  # one of the next steps may have a larger lr than this one, in a warm-up say
    largest = torch.finfo(dtype).max
    return (size * size if is_squared else energy) <= largest, energy + lr == 0
