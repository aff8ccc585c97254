"""The options of a param group, in one table, and the errors that say what is allowed."""

from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from lodo import inner_optimizer
from lodo.declarations import Option, Role, as_float, flag, integer, number, one_of
from lodo.parts import PARTS
from lodo.preconditioners import BY_NAME, Composite, Preconditioner
from lodo.rounding import DTYPES, name_of


def check_lr(name: str, lr: Any) -> None:
    """A finite number >= 0, or a one-element tensor of one."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
        if lr.dtype == torch.bool or lr.is_complex() or lr.layout != torch.strided:
            raise ValueError(f"Tensor lr must be dense and of real numbers, got {lr!r}")
        lr = lr.item() if lr.device.type == "cpu" else 0.0  # a value on an accelerator is not waited for
    number(0)(name, lr)


def _check_preconditioner(name: str, value: Any) -> None:
    if isinstance(value, Composite):
        raise ValueError(f"{name} must be a network, which a Composite has as its `.network`; got a Composite")
    if not isinstance(value, Preconditioner):
        one_of(*BY_NAME)(name, value)


def _check_dtype(name: str, value: Any) -> None:
    one_of(*DTYPES)(name, name_of(value))


OPTIONS: dict[str, Option] = {
    "lr": Option(1.0, check_lr, plain=as_float),
    "meta_lr": Option(1e-3, number(0), shapes_state=True, plain=as_float),
    "weight_decay": Option(0.0, number(0), plain=as_float),
    "preconditioner": Option("block_permutation", _check_preconditioner, Role.FIXED),
    "depth": Option(None, integer(0, or_none=True), Role.FIXED),
    "block_size": Option(4, integer(1), Role.FIXED),
    "expansion": Option(2, number(1), Role.FIXED, plain=as_float),
    "permutation": Option("random", one_of("random", "shuffle"), Role.FIXED),
    "meta_optimizer": Option("adam", one_of(*inner_optimizer.KINDS), shapes_state=True),
    "meta_every": Option(1, integer(1)),
    "meta_state_dtype": Option(None, _check_dtype, shapes_state=True, plain=name_of),
    "max_step_norm": Option(None, number(0, or_none=True), plain=as_float),
    "max_condition": Option(None, number(1, or_none=True), plain=as_float),
    "maximize": Option(False, flag),
    "capturable": Option(False, flag),
    "seed": Option(0, integer(0), Role.START),
    "sharding": Option("local", one_of("local", "whole"), Role.FIXED),
    **{name: option for part in PARTS for name, option in part.options.items()},
}
"""Every option of a param group by name, those of the parts among them. The defaults are the paper's method."""

NETWORK = ("preconditioner", "depth", "block_size", "expansion", "permutation")
"""What a group's network is made by."""

RECOMMENDED: Mapping[str, Any] = {  # a plain dict, which configurations can copy and pickle
    "lr": 1e-3,
    "base": "soap",
    "preconditioner": "log_diagonal",
    "meta_lr": 3e-3,
    "trace_decay": 0.99,
    "scale_lr": 0.03,
    "momentum_decays": (0.0, 0.9, 0.99, 0.999),
}
"""The options of `lodo.AutoLODO`, which wants no tuning, where they are not those of `lodo.LODO`, the paper's method.
Chosen by figures, which docs/experiments.md has."""

HINTS = ("foreach", "fused", "differentiable", "amsgrad")
"""Arguments of torch's optimizers that may be given if they ask for nothing (None, False)."""

INSTEAD = {
    "betas": "the decay of the momentum is `beta`, those of a learned mixture `momentum_decays`",
    "momentum": "the decay of the momentum is `beta`, those of a learned mixture `momentum_decays`",
    "eps": "it needs none: coordinates without a gradient take no step",
    "foreach": "it always works on all parameters at once",
    "fused": "its kernels are chosen by themselves",
    "differentiable": "its steps cannot be differentiated",
    "amsgrad": "it has no such variant",
    **dict.fromkeys((*NETWORK, "meta_optimizer", "seed"), "it is for the networks of lodo.LODO"),
}
"""What to say of arguments that an optimizer does not have."""

all_values = itemgetter(*(name for name in OPTIONS if name not in ("lr", "seed")))
"""The values of all options that may change between steps, but for lr, which schedulers change all the time."""
state_values = itemgetter(*(name for name, option in OPTIONS.items() if option.shapes_state))
"""The values of those that state depends on."""


def refuse_part(learned: Preconditioner, is_part: bool) -> None:
    """Refuses a learned network for a param group that becomes several.

    Raises:
        ValueError: naming it.
    """
    if is_part:
        raise ValueError(
            f"preconditioner must be one of {', '.join(map(repr, BY_NAME))} for parameters that are not all sharded "
            f"over the same ranks, got {learned!r}"
        )


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


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses options of a param group that are out of range, or that do not go together.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    for name, option in OPTIONS.items():
        option.check(name, options[name])
    for part in PARTS:
        if part.is_used(options):
            part.check(options)
    kind = options["preconditioner"]
    network = type(kind) if isinstance(kind, Preconditioner) else BY_NAME[kind]
    if options["max_condition"] is not None and (not network.has_bound or options["capturable"]):
        raise ValueError(
            "max_condition must be None with preconditioner='residual', which has no such bound, and with "
            f"capturable=True, for it waits for the device; got {options['max_condition']!r}"
        )
    if options["sharding"] == "whole" and (not network.is_elementwise or options["capturable"]):
        raise ValueError(
            "sharding must be 'local' with preconditioners that act on a param group as a whole, "
            f"{', '.join(repr(name) for name, kind in BY_NAME.items() if not kind.is_elementwise)}, and with "
            f"capturable=True; got {options['sharding']!r}"
        )


def fixed_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that must stay for a param group with state."""
    return {name: options[name] for name, option in OPTIONS.items() if option.role is Role.FIXED}


def check_fixed(options: Mapping[str, Any], former: Mapping[str, Any]) -> None:
    """Refuses changes of options that must stay for a param group with state.

    Raises:
        ValueError: naming the option, what it was and what it is.
    """
    for name, option in OPTIONS.items():
        if option.role is Role.FIXED and option.plain(options[name]) != option.plain(former[name]):
            raise ValueError(
                f"{name} must stay {former[name]!r} for a param group that has state with it, got {options[name]!r}"
            )


def made_plain(options: dict[str, Any]) -> None:
    """Makes plain numbers and strings of all options, in place: NumPy's numbers would not pass
    `torch.load(weights_only=True)`."""
    for name, option in OPTIONS.items():
        options[name] = option.plain(options[name])
