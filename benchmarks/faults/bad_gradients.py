"""One gradient in a hundred holds a NaN, an infinity or a huge number somewhere; a twin never sees those steps.

Where gradients have a unit of their own (`base`), a huge number is one like any other, and not among them.
"""

import math
import random
import warnings
from typing import Any

import torch

from benchmarks.faults.training import CASES, KERNELS, Training, fingerprint, kernels

SHARE = 0.01
BAD = (math.nan, math.inf, -math.inf, 1e30, -1e38)
FLOAT64 = {1e30: 1e200, -1e38: -1e300}  # what is huge there
CHECK_EVERY = 500
COUNT = ("skipped_steps",)  # what the twin does not have


def cases() -> list[str]:
    return [f"{case}; {kernel}" for case in CASES for kernel in KERNELS]


def run(name: str, seed: int, steps: int) -> dict[str, Any]:
    """Trains with bad gradients for `steps` steps, and the twin for those that were good."""
    case, kernel = name.split("; ")
    with kernels(kernel), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that steps are skipped
        return compare(Training(case), Training(case), random.Random(f"{seed} {name}"), steps)


def compare(training: Training, twin: Training, chance: random.Random, steps: int) -> dict[str, Any]:
    bad = taken = unequal = unsound = 0
    for step in range(steps):
        training.set_gradients(step)
        if chance.random() < SHARE:
            spoil(training, chance)
            training.optimizer.step()
            bad += 1
        else:
            training.optimizer.step()
            twin.set_gradients(step)
            twin.optimizer.step()
            taken += 1
        if step % CHECK_EVERY == 0 or step == steps - 1:
            unsound += not training.is_finite()
            unequal += fingerprint(training.state(), COUNT) != fingerprint(twin.state(), COUNT)
    counts = {int(entry["skipped_steps"]) for entry in training.optimizer.state.values()}
    return {
        "steps": steps,
        "bad": bad,
        "counted exactly": counts == {bad},
        "checks": len({*range(0, steps, CHECK_EVERY), steps - 1}),
        "checks with NaN or infinity": unsound,
        "checks unlike the twin": unequal,
    }


def spoil(training: Training, chance: random.Random) -> None:
    """Writes one bad number, or several, somewhere into the gradients."""
    for _ in range(chance.choice((1, 1, 3))):
        p = chance.choice(training.params)
        assert p.grad is not None
        has_unit = training.optimizer.param_groups[0]["base"] is not None
        value = chance.choice(BAD[:3] if has_unit else BAD)
        value = FLOAT64.get(value, value) if p.dtype == torch.float64 else value
        p.grad.view(-1)[chance.randrange(p.numel())] = value
