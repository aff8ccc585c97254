"""Digests of where short trainings end: the same before and after a change that is to change no bit.

    python -m benchmarks.same_bits                      # a line for each training: its name and a digest
    python -m benchmarks.same_bits --checkout DIR       # with the lodo of another checkout, in the same process

The call without tuning on four tasks of the shoot-out, and on one of them with each other way of keeping and executing;
the paper's method on its bowl. Everything on one thread. Digests are of parameters and losses, so they hold for one
machine and one build of torch.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

UNTUNED = ("transformer", "logistic", "pinn", "digits_mlp")
VARIANTS: dict[str, dict[str, Any]] = {
    "base adam": {"base": "adam"},
    "one momentum": {"momentum_decays": None},
    "no scales, no trace": {"scale_lr": 0.0, "trace_decay": 0.0},
    "bfloat16": {"meta_state_dtype": "bfloat16", "momentum_dtype": "bfloat16"},
    "every third": {"meta_every": 3, "weight_decay": 0.1, "max_step_norm": 0.1},
}


def digest(tensors: Iterable[Tensor], losses: Sequence[float]) -> str:
    found = hashlib.sha256(repr(losses).encode())
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def train(make: Callable[[list[Tensor]], Any], task: str, steps: int) -> str:
    """The digest of a training on a task of the shoot-out."""
    from benchmarks.shootout.tasks import get_task

    problem = get_task(task).build(0)
    torch.manual_seed(0)
    optimizer, losses = make(list(problem.params)), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    return digest(problem.params, losses)


def train_on_bowl(make: Callable[[list[Tensor]], Any], steps: int) -> str:
    """The digest of a training on the paper's noisy bowl."""
    from examples.paper.tasks.bowl import NoisyBowl

    task = NoisyBowl(seed=0, walk_seed=0)
    optimizer, losses = make(list(task.params)), []
    for _ in range(steps):
        task.draw()
        losses.append(task.backward())
        optimizer.step()
    return digest(task.params, losses)


def digests(steps: int) -> Iterable[tuple[str, str]]:
    import lodo

    for task in UNTUNED:
        yield f"AutoLODO, {task}", train(lodo.AutoLODO, task, steps)
    for native in ("1", "0"):
        os.environ["LODO_NATIVE"] = native
        kernels = "kernels" if native == "1" else "plain torch"
        for name, options in VARIANTS.items():
            make = partial(lodo.AutoLODO, **options)
            yield f"AutoLODO, {name}, {kernels}", train(make, "digits_mlp", 200)
        yield f"the paper's method, bowl, {kernels}", train_on_bowl(partial(lodo.LODO, lr=0.3), steps // 4)
        yield (
            f"the paper's method in the basis of Adam, bowl, {kernels}",
            train_on_bowl(partial(lodo.LODO, lr=0.01, base="adam", scale_lr=0.03), steps // 4),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, help="folder whose lodo, benchmarks and examples are used")
    parser.add_argument("--steps", type=int, default=1200)
    arguments = parser.parse_args()
    if arguments.checkout is not None:
        sys.path.insert(0, str(arguments.checkout.resolve()))
        for name in [name for name in sys.modules if name.split(".")[0] in ("lodo", "benchmarks", "examples")]:
            del sys.modules[name]
    torch.set_num_threads(1)
    for name, found in digests(arguments.steps):
        print(f"{found}  {name}", flush=True)


if __name__ == "__main__":
    main()
