"""The optimizers: how each is made, and along which axes its settings are searched."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import lodo
from benchmarks.larger.problem import Problem
from benchmarks.larger.tasks import Options, Task

WEIGHT_DECAY = 0.1
WIDEST = 8  # half decades from the centre at which an axis ends


@dataclass(frozen=True)
class Axis:
    """A learning rate that is searched at half decades around a published one.

    Attributes:
        reach: half decades that are tried at first, on either side of the centre.
    """

    name: str
    centre: float
    reach: int = 2

    def value(self, place: int) -> float:
        """The rate at so many half decades above the centre."""
        return float(f"{self.centre * 10 ** (place / 2):.2g}")

    def lacking(self, losses: Mapping[int, float]) -> list[int]:
        """The places that are to be tried next, given the losses at those that have been; none when all is done.

        While the best of them stands at an end, the axis is widened by one place beyond it.
        """
        if missing := [place for place in range(-self.reach, self.reach + 1) if place not in losses]:
            return missing
        best = self.best(losses)
        low, high = min(losses), max(losses)
        wider = low - 1 if best == low else high + 1
        return [wider] if best in (low, high) and abs(wider) <= WIDEST else []

    def best(self, losses: Mapping[int, float]) -> int:
        """The place of the lowest loss; of equal ones that nearest to the centre."""
        return min(losses, key=lambda place: (losses[place], abs(place)))


@dataclass(frozen=True)
class Contender:
    """One optimizer.

    Attributes:
        make: the optimizers that step together, from the problem and the settings.
        settings: those that the search begins with, on a task.
        axes: searched one after the other, each at the best place of those before it.
        is_scheduled: its learning rates rise over the first twentieth of the steps, and fall to zero by a cosine.
    """

    name: str
    make: Callable[[Problem, Options], list[Optimizer]]
    settings: Callable[[Task], Options]
    axes: tuple[Axis, ...] = ()
    is_scheduled: bool = True
    needs_pytorch_optimizer: bool = False


def _groups(params: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and filters, which decay, and vectors, which do not."""
    listed = list(params)
    parts = ([p for p in listed if p.ndim >= 2], weight_decay), ([p for p in listed if p.ndim < 2], 0.0)
    return [{"params": part, "weight_decay": decay} for part, decay in parts if part]


def _adamw(problem: Problem, settings: Options) -> list[Optimizer]:
    groups = _groups(problem.params, settings["weight_decay"])
    return [torch.optim.AdamW(groups, lr=settings["lr"], betas=tuple(settings["betas"]), fused=True)]


def _muon(problem: Problem, settings: Options) -> list[Optimizer]:
    """pytorch_optimizer's for the hidden matrices and filters, which it flattens (torch's refuses filters); AdamW with
    the betas of Muon's authors for the rest."""
    from pytorch_optimizer import Muon  # a large package, only where it is used

    decay = settings["weight_decay"]
    own = set(problem.hidden)
    group = {"params": problem.hidden, "use_muon": True}
    rest = _groups((param for param in problem.params if param not in own), decay)
    return [
        Muon([group], lr=settings["lr"], weight_decay=decay),
        torch.optim.AdamW(rest, lr=settings["adamw_lr"], betas=(0.9, 0.95), eps=1e-10, fused=True),
    ]


def _soap(problem: Problem, settings: Options) -> list[Optimizer]:
    from pytorch_optimizer import SOAP  # see above

    groups = _groups(problem.params, settings["weight_decay"])
    return [SOAP(groups, lr=settings["lr"], precondition_frequency=settings["precondition_frequency"])]


def _lodo(problem: Problem, settings: Options) -> list[Optimizer]:
    return [lodo.AutoLODO(problem.params)]


REFERENCE, ANCHOR, LODO = "AdamW", "AdamW, lr 1e-3", "LODO"
CONTENDERS: Mapping[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender(
            REFERENCE,
            _adamw,
            lambda task: {"lr": 1e-3, "betas": list(task.betas), "weight_decay": WEIGHT_DECAY},
            (Axis("lr", 1e-3),),
        ),
        Contender(
            "Muon",
            _muon,
            lambda task: {"lr": 0.02, "adamw_lr": 3e-3, "weight_decay": WEIGHT_DECAY},
            (Axis("lr", 0.02), Axis("adamw_lr", 3e-3, reach=1)),
            needs_pytorch_optimizer=True,
        ),
        Contender(
            "SOAP",
            _soap,
            lambda task: {"lr": 3e-3, "weight_decay": WEIGHT_DECAY, "precondition_frequency": 10},
            (Axis("lr", 3e-3),),
            needs_pytorch_optimizer=True,
        ),
        Contender(
            ANCHOR,
            _adamw,
            lambda task: {"lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.01},
            is_scheduled=False,
        ),
        Contender(LODO, _lodo, lambda task: {}, is_scheduled=False),
    )
}


def get_contender(name: str) -> Contender:
    """Looks a contender up.

    Raises:
        ValueError: no contender has that name.
    """
    if name not in CONTENDERS:
        raise ValueError(f"contender must be one of {'; '.join(CONTENDERS)}, got {name!r}")
    return CONTENDERS[name]
