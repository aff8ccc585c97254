"""Puts averages of the iterates (`lodo.parts.average`) in the place of the parameters, and these back."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lodo.parts.average import ITERATE
from lodo.state.group_state import GroupState
from lodo.state.layout import State
from lodo.state.sharding import rank_of_fsdp1

AT_AVERAGES = (
    "the parameters are at their averages, where LODO.eval has put them: LODO.train puts them back, and must be called "
    "before the next step"
)
NOT_FSDP1 = "averages of the iterates cannot be shown with FSDP1, which may compute with copies; FSDP2 can"


def are_shown(group: Mapping[str, Any], state: State) -> bool:
    """Whether the parameters of a group are at their averages now."""
    return any(ITERATE.name in state.get(p, ()) for p in group["params"])


def refuse_shown(groups: Iterable[Mapping[str, Any]], state: State) -> None:
    """Raises a RuntimeError if the parameters of a group are at their averages."""
    if any(are_shown(group, state) for group in groups):
        raise RuntimeError(AT_AVERAGES)


def show_(groups: Iterable[tuple[GroupState, Mapping[str, Any], State]]) -> None:
    """Puts the averages of those groups that keep some in the place of the parameters, which their states keep. Memory
    is asked for before anything has changed."""
    found = []
    for live, group, state in groups:
        params = group["params"]
        if live.average is not None and live.average.is_wanted:
            if rank_of_fsdp1(params) is not None:
                raise RuntimeError(NOT_FSDP1)
            x = live.parameters(params)
            found.append((live, params, state, x, live.average.including(x)))
    for live, params, state, x, average in found:
        for place, (p, own) in enumerate(zip(params, live.flat.views(x), strict=True)):
            state[p][ITERATE.name] = live.layout.shown(ITERATE, own, place)
        torch._foreach_copy_(list(live.flat.tensors(params)), live.flat.views(average))


def hide_(live: GroupState, group: Mapping[str, Any], state: State) -> None:
    """Puts the parameters back, with the bits that they had."""
    params = group["params"]
    for place, (p, tensor) in enumerate(zip(params, live.flat.tensors(params), strict=True)):
        kept = live.layout.opened(ITERATE, state[p], place)
        assert kept is not None  # a live group has it for each of its parameters
        tensor.copy_(kept)
    for p in params:
        del state[p][ITERATE.name]


@contextmanager
def shown(optimizer: Any, model: nn.Module | None, batches: Iterable[Any] | None) -> Iterator[None]:
    """Inside, the averages of a `lodo.LODO` are shown, and its model computes with them."""
    is_shown = optimizer.is_at_averages
    optimizer.eval()
    try:
        _reshard(model)
        with nullcontext() if model is None or batches is None else statistics_of(model, batches):
            yield
    finally:
        if not is_shown:
            optimizer.train()
        _reshard(model)


def _reshard(model: nn.Module | None) -> None:
    """Makes FSDP2 forget the gathered copies that it has kept of parameters which have moved since."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if model is not None and fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


@contextmanager
def statistics_of(model: nn.Module, batches: Iterable[Any]) -> Iterator[None]:
    """Inside, the batch normalisation layers of a model have the statistics of these batches, as
    `torch.optim.swa_utils.update_bn` computes them; afterwards those that they had. Layers in evaluation mode in a
    model that is training are frozen, and keep theirs. Torch's global random numbers go on as if nobody had asked.

    Raises:
        ValueError: there is no batch.
    """
    modes = {module: module.training for module in model.modules()}
    layers = [module for module in modes if isinstance(module, _BatchNorm) and module.training >= model.training]
    momenta = [layer.momentum for layer in layers]
    kept = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]
    try:
        _renew(model, [layer for layer in layers if layer.track_running_stats], batches)
        _set_modes(modes)
        yield
    finally:
        _set_modes(modes)
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def _renew(model: nn.Module, layers: Sequence[_BatchNorm], batches: Iterable[Any]) -> None:
    """`update_bn`, which would unfreeze layers that are in evaluation mode."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if not model.training:
        model.train()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # plain means
    count = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        for batch in batches if layers else ():
            model((batch[0] if isinstance(batch, list | tuple) else batch).to(device))
            count += 1
    if layers and count == 0:
        raise ValueError(f"batches must hold at least one batch, got none from {batches!r}")


def _set_modes(modes: Mapping[nn.Module, bool]) -> None:
    for module, is_training in modes.items():
        module.training = is_training
