"""The options of a param group: which values are allowed, and the errors that say so."""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lodo import meta
from lodo.bases import BASES
from lodo.composite import Composite
from lodo.preconditioners import BY_NAME, Preconditioner
from lodo.rounding import DTYPES, name_of

RECOMMENDED: Mapping[str, Any] = {  # a plain dict, which configurations can copy and pickle
    "lr": 1e-3,
    "base": "soap",
    "preconditioner": "log_diagonal",
    "meta_lr": 3e-3,
    "trace": 0.99,
    "scale_lr": 0.03,
    "decays": (0.0, 0.9, 0.99, 0.999),
}
"""The options of `lodo.AutoLODO`, which wants no tuning, where they are not those of `lodo.LODO`, the paper's method.
Chosen by figures, which docs/experiments.md has."""

NETWORK = ("preconditioner", "depth", "block_size", "expansion", "permutation")
"""What a group's network is made by. It must stay once there is one."""

CHANGEABLE = (
    "meta_lr",
    "beta",
    "weight_decay",
    "meta_optimizer",
    "trace",
    "scale_lr",
    "scale_trace",
    "mix_lr",
    "meta_every",
    "meta_state_dtype",
    "momentum_dtype",
    "max_step_norm",
    "max_condition",
    "maximize",
    "capturable",
)
"""What may be written into a param group between steps, but for lr, which schedulers change all the time."""


FLOATS = (
    "lr",
    "meta_lr",
    "beta",
    "weight_decay",
    "expansion",
    "trace",
    "scale_lr",
    "scale_trace",
    "mix_lr",
    "max_step_norm",
    "max_condition",
)
"""Options that are numbers, or None."""

ADDED: dict[str, Any] = {
    "max_step_norm": None,
    "max_condition": None,
    "trace": 0.0,
    "base": None,
    "scale_lr": 0.0,
    "scale_trace": 0.998,
    "decays": None,
    "mix_lr": 0.01,
}
"""What optimizers that were pickled before there were these options have done."""


HINTS = ("foreach", "fused", "differentiable", "amsgrad")
"""Arguments of torch's optimizers that may be given if they ask for nothing (None, False)."""

INSTEAD = {
    "betas": "the decay of the momentum is `beta`, those of a learned mixture `decays`",
    "momentum": "the decay of the momentum is `beta`, those of a learned mixture `decays`",
    "eps": "it needs none: coordinates without a gradient take no step",
    "foreach": "it always works on all parameters at once",
    "fused": "its kernels are chosen by themselves",
    "differentiable": "its steps cannot be differentiated",
    "amsgrad": "it has no such variant",
    **dict.fromkeys((*NETWORK, "meta_optimizer", "seed"), "it is for the networks of lodo.LODO"),
}
"""What to say of arguments that an optimizer does not have."""


def refuse_others(name: str, others: Mapping[str, Any]) -> None:
    """Refuses arguments that the optimizer of this name does not have, unless they are HINTS that ask for nothing.

    Raises:
        TypeError: naming the argument and its value, and what there is instead.
    """
    for argument, value in others.items():
        if argument in HINTS and (value is None or value is False):
            continue
        allowed = "; None and False are allowed" if argument in HINTS else ""
        instead = f": {INSTEAD[argument]}" if argument in INSTEAD else ""
        raise TypeError(f"{name} has no argument {argument!r}, got {value!r}{instead}{allowed}")


def check_options(options: dict[str, Any]) -> None:
    """Refuses options of a param group that are out of range.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    check_lr(options["lr"])
    _check_number("meta_lr", options["meta_lr"], 0, math.inf)
    _check_number("beta", options["beta"], 0, 1)
    _check_number("weight_decay", options["weight_decay"], 0, math.inf)
    _check_number("expansion", options["expansion"], 1, math.inf)
    for name in ("trace", "scale_trace"):
        _check_number(name, options[name], 0, 1)
    for name in ("scale_lr", "mix_lr"):
        _check_number(name, options[name], 0, math.inf)
    _check_decays(options["decays"])
    _check_choice("base", options["base"], (None, *BASES))
    if options["base"] == "soap" and options["capturable"]:
        raise ValueError(
            "base must be None or 'adam' with capturable=True, for 'soap' waits for the device; got 'soap'"
        )
    if options["max_step_norm"] is not None:
        _check_number("max_step_norm", options["max_step_norm"], 0, math.inf, " or None")
    if options["max_condition"] is not None:
        _check_number("max_condition", options["max_condition"], 1, math.inf, " or None")
        kind = options["preconditioner"]
        if (kind.kind if isinstance(kind, Preconditioner) else kind) == "residual" or options["capturable"]:
            raise ValueError(
                "max_condition must be None with preconditioner='residual', which has no such bound, and with "
                f"capturable=True, for it waits for the device; got {options['max_condition']!r}"
            )
    if isinstance(options["preconditioner"], Composite):
        raise ValueError("preconditioner must be a network, which a Composite has as its `.network`; got a Composite")
    if not isinstance(options["preconditioner"], Preconditioner):
        _check_choice("preconditioner", options["preconditioner"], tuple(BY_NAME))
    _check_choice("permutation", options["permutation"], ("random", "shuffle"))
    _check_choice("meta_optimizer", options["meta_optimizer"], meta.KINDS)
    for name in ("meta_state_dtype", "momentum_dtype"):
        _check_choice(name, name_of(options[name]), tuple(DTYPES))
    _check_integer("meta_every", options["meta_every"], 1)
    if options["depth"] is not None:
        _check_integer("depth", options["depth"], 0)
    _check_integer("block_size", options["block_size"], 1)
    _check_integer("seed", options["seed"], 0)
    for name in ("maximize", "capturable"):
        if not isinstance(options[name], bool):
            raise ValueError(f"{name} must be a bool, got {options[name]!r}")


def check_lr(lr: Any) -> None:
    """Refuses a learning rate that is no finite number >= 0, or tensor of one.

    Raises:
        ValueError: naming it and what is allowed.
    """
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
        if lr.dtype == torch.bool or lr.is_complex() or lr.layout != torch.strided:
            raise ValueError(f"Tensor lr must be dense and of real numbers, got {lr!r}")
        lr = lr.item() if lr.device.type == "cpu" else 0.0  # a value on an accelerator is not waited for
    _check_number("lr", lr, 0, math.inf)


def _check_number(name: str, value: Any, low: float, high: float, others: str = "") -> None:
    try:
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not low <= number < high:
        upper = "finite" if high == math.inf else f"< {high}"
        raise ValueError(f"{name} must be a number >= {low} and {upper}{others}, got {value!r}")


def _check_integer(name: str, value: Any, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**63:
        raise ValueError(f"{name} must be an int >= {low}, got {value!r}")


def _check_decays(value: Any) -> None:
    if value is None:
        return
    try:
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise ValueError
        for decay in value:
            _check_number("decay", decay, 0, 1)
    except ValueError:
        raise ValueError(f"decays must be None or a tuple of numbers >= 0 and < 1, got {value!r}") from None


def _check_choice(name: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    if not isinstance(value, str | None) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
