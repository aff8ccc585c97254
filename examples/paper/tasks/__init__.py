"""The objectives of sections 5.1 to 5.4, by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.paper.tasks.base import Task
from examples.paper.tasks.bowl import NoisyBowl
from examples.paper.tasks.rosenbrock import Rosenbrock

__all__ = ["TASKS", "NoisyBowl", "Rosenbrock", "Task", "make_task"]

TASKS = ("bowl", "rosenbrock", "generation", "classification")


def make_task(name: str, seed: int, options: Mapping[str, Any], *, device: str, data_root: Path | None) -> Task:
    """The task `name`, all its randomness following from `seed`.

    Raises:
        ValueError: no task has that name, or it needs data and `data_root` is None.
    """
    if name == "bowl":
        return NoisyBowl(seed, **options)
    if name == "rosenbrock":
        return Rosenbrock(seed, **options)
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    if data_root is None:
        raise ValueError(f"the task {name!r} needs the folder of its data: --data-root")
    if name == "generation":
        from examples.paper.tasks.image_generation import ImageGeneration

        return ImageGeneration(seed, data_root=data_root, device=device, **options)
    from examples.paper.tasks.image_classification import ImageClassification

    return ImageClassification(seed, data_root=data_root, device=device, **options)
