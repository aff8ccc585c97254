"""The two tasks: their budgets, their options, and where their data come from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.larger.gpt import make_gpt, standard_library
from benchmarks.larger.problem import Problem
from benchmarks.larger.resnet import make_resnet, name_of
from examples.cifar import Cifar10, cifar10

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        steps: of a final run.
        search_steps: of a run of the search.
        betas: of AdamW, as they are usual there.
        make: the problem, from a seed, a device, the task's options and the folder of its data.
        name_data: what tells the data apart from others of their kind.
        needs_data: `make` and `name_data` need the folder.
    """

    name: str
    title: str
    steps: int
    search_steps: int
    betas: tuple[float, float]
    make: Callable[[int, str, Options, Path | None], Problem]
    name_data: Callable[[Path | None], str]
    needs_data: bool = False


@cache
def _images(root: Path) -> tuple[Cifar10, str]:
    data = cifar10(root)
    return data, name_of(data)


def _found(root: Path | None) -> tuple[Cifar10, str]:
    if root is None:
        raise ValueError("resnet needs --data-root, the folder of CIFAR-10's files")
    return _images(root)


def _gpt(seed: int, device: str, options: Options, root: Path | None) -> Problem:
    return make_gpt(seed, device, standard_library(), **options)


def _resnet(seed: int, device: str, options: Options, root: Path | None) -> Problem:
    return make_resnet(seed, device, _found(root)[0], **options)


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            "gpt",
            "a GPT on the bytes of Python's standard library",
            steps=1200,
            search_steps=1200,
            betas=(0.9, 0.95),
            make=_gpt,
            name_data=lambda root: standard_library().name,
        ),
        Task(
            "resnet",
            "a ResNet on CIFAR-10",
            steps=1408,  # four epochs of 45,000 images in batches of 128
            search_steps=704,
            betas=(0.9, 0.999),
            make=_resnet,
            name_data=lambda root: _found(root)[1],
            needs_data=True,
        ),
    )
}
