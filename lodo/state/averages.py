"""Puts averages of the iterates (`lodo.parts.average`) in the place of the parameters, and these back."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import update_bn

from lodo.parts.average import ITERATE
from lodo.state.group_state import GroupState
from lodo.state.layout import State, carrier


def are_shown(params: Sequence[Tensor], state: State) -> bool:
    """Whether the parameters of a group are at their averages now."""
    return bool(params) and ITERATE.name in state.get(carrier(params), ())


def show_(groups: Sequence[tuple[GroupState, Sequence[Tensor]]], state: State) -> None:
    """Puts the averages of those groups that keep some in the place of the parameters, which `state` keeps. Memory is
    asked for before anything has changed."""
    found = []
    for live, params in groups:
        if live.average is not None and live.average.is_wanted:
            x = live.parameters(params)
            found.append((live, params, x, live.average.including(x)))
    for live, params, x, average in found:
        for place, (p, own) in enumerate(zip(params, live.flat.views(x), strict=True)):
            state[p][ITERATE.name] = live.layout.shown(ITERATE, own, place)
        torch._foreach_copy_(list(live.flat.tensors(params)), live.flat.views(average))


def hide_(live: GroupState, params: Sequence[Tensor], state: State) -> None:
    """Puts the parameters back, with the bits that they had."""
    for place, (p, tensor) in enumerate(zip(params, live.flat.tensors(params), strict=True)):
        kept = live.layout.opened(ITERATE, state[p], place)
        assert kept is not None  # a live group has it for each of its parameters
        tensor.copy_(kept)
    for p in params:
        del state[p][ITERATE.name]


@contextmanager
def shown(
    show: Callable[[], None], hide: Callable[[], None], model: nn.Module | None, batches: Iterable[Any] | None
) -> Iterator[None]:
    """Inside, the averages are shown, and a model has the statistics of these batches, if there are any."""
    show()
    try:
        with nullcontext() if model is None or batches is None else statistics_of(model, batches):
            yield
    finally:
        hide()


@contextmanager
def statistics_of(model: nn.Module, batches: Iterable[Any]) -> Iterator[None]:
    """Inside, the batch normalisation layers of a model have the statistics of these batches; afterwards those that
    they had. Torch's own `update_bn` computes them. Random numbers go on as if nobody had asked."""
    layers = [module for module in model.modules() if isinstance(module, _NormBase)]
    kept = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)), torch.no_grad():
            update_bn(batches, model)
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
