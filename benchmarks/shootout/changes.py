"""The recommended call with one thing changed: the evidence for its parts and for its numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.shootout.problem import Split

EVERYWHERE: tuple[Split, ...] = ("choose", "hold out", "fresh")


@dataclass(frozen=True)
class Change:
    """One change.

    Attributes:
        options: over those of the recommended call; None drops one.
        splits: of the tasks that it is tried on. Numbers are to be chosen by some of the tasks only.
    """

    options: Mapping[str, Any]
    splits: tuple[Split, ...] = ("choose",)


NOTHING_CHANGED = "as recommended"
CHANGES: Mapping[str, Change] = {
    NOTHING_CHANGED: Change({}, EVERYWHERE),
    'no eigenbases: `base="adam"`': Change({"base": "adam"}, EVERYWHERE),
    "no scales: `scale_lr=0.0`": Change({"scale_lr": 0.0}, EVERYWHERE),
    "one momentum: `momentum_decays=None`": Change({"momentum_decays": None}, EVERYWHERE),
    'no gains: `preconditioner="identity"`': Change({"preconditioner": "identity", "trace_decay": 0.0}, EVERYWHERE),
    "no trace: `trace_decay=0.0`": Change({"trace_decay": 0.0}, EVERYWHERE),
    "`scale_lr=0.01`": Change({"scale_lr": 0.01}),
    "`scale_lr=0.1`": Change({"scale_lr": 0.1}),
    "`scale_trace_decay=0.99`": Change({"scale_trace_decay": 0.99}),
    "`meta_lr=1e-3`": Change({"meta_lr": 1e-3}),
    "`meta_lr=1e-2`": Change({"meta_lr": 1e-2}),
    "`trace_decay=0.9`": Change({"trace_decay": 0.9}),
    "`trace_decay=0.999`": Change({"trace_decay": 0.999}),
    "`mix_lr=0.003`": Change({"mix_lr": 0.003}),
    "`mix_lr=0.03`": Change({"mix_lr": 0.03}),
    "`momentum_decays=(0.0, 0.9, 0.99)`": Change({"momentum_decays": [0.0, 0.9, 0.99]}),
    "`momentum_decays=(0.9, 0.99)`": Change({"momentum_decays": [0.9, 0.99]}),
    "`beta=0.99`, where the mixture starts": Change({"beta": 0.99}),
}
