"""The one schedule that a call without tuning may want: an end."""

from numbers import Integral, Real

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cooldown(optimizer: Optimizer, total_steps: int, share: float = 0.2) -> LambdaLR:
    """A learning rate that stays as it is, and falls in a straight line to zero over the last `share` of the steps.

    Noise that keeps the parameters away from a minimum falls with it. (Hu et al., "MiniCPM", 2024, and Haegele et al.,
    NeurIPS 2024, have it as warmup-stable-decay and as cooldown.) AutoLODO's scales, which learn ever more slowly, do
    not undo it. As with all of torch's schedulers its `step` is to be called after each of the optimizer's, and its
    state saved and loaded.

    Args:
        optimizer: any of torch's form.
        total_steps: of the training, those before a resume included: an int >= 1. The step after the last has a rate
            of zero.
        share: of them, > 0 and <= 1.

    Raises:
        ValueError: for arguments out of range; the optimizer is as before then.
    """
    if not isinstance(total_steps, Integral) or isinstance(total_steps, bool) or total_steps < 1:
        raise ValueError(f"total_steps must be an int >= 1, got {total_steps!r}")
    if not isinstance(share, Real) or isinstance(share, bool) or not 0 < share <= 1:
        raise ValueError(f"share must be a number > 0 and <= 1, got {share!r}")
    return LambdaLR(optimizer, lambda step: cooldown_factor(step, int(total_steps), float(share)))


def cooldown_factor(step: int, total_steps: int, share: float) -> float:
    """What the rate of step 0, 1, ... is multiplied by."""
    return min(1.0, max(0.0, (total_steps - step) / (share * total_steps)))
