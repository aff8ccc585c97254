"""What learning rates are multiplied by along a run."""

import math

from lodo.schedules import cooldown_factor

WARMUP = 0.05  # the share of the steps in which the learning rate rises from near 0
SCHEDULES = ("constant", "warmup", "warmup_cosine", "cooldown")
COOLED = 0.2  # the share of the steps, at the end, in which it falls again


def factor_at(schedule: str, step: int, steps: int) -> float:
    """What the learning rate is multiplied by at `step` of 0 to steps - 1.

    "constant": 1; "warmup": a straight rise to 1 over the first twentieth of the steps; "warmup_cosine": after that
    half a cosine from 1 to almost 0; "cooldown": 1, and over the last fifth a straight fall to almost 0
    (`lodo.cooldown`).
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if schedule == "constant":
        return 1.0
    if schedule == "cooldown":
        return cooldown_factor(step, steps, COOLED)
    rise = round(WARMUP * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise))) if schedule == "warmup_cosine" else 1.0
