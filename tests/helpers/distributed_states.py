"""Checkpoints of several ranks, saved and loaded in all the ways of torch.distributed.checkpoint."""

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from tests.helpers.distributed_runs import assert_same_shards, own_share, train


def save(folder, model, optimizer, **options):
    state = get_state_dict(model, optimizer, options=StateDictOptions(**options))
    if options.get("full_state_dict"):
        if dist.get_rank() == 0:
            torch.save(state, folder / "full.pt")
        dist.barrier()
    else:
        dcp.save(dict(zip(("model", "optimizer"), state, strict=True)), checkpoint_id=folder)


def load(folder, model, optimizer, planner=None, **options):
    options = StateDictOptions(**options)
    if options.broadcast_from_rank0:
        state = torch.load(folder / "full.pt", weights_only=True) if dist.get_rank() == 0 else ({}, {})
    elif options.full_state_dict:
        state = torch.load(folder / "full.pt", weights_only=True)
    else:
        state = get_state_dict(model, optimizer, options=options)
        template = dict(zip(("model", "optimizer"), state, strict=True))
        dcp.load(template, checkpoint_id=folder, planner=planner, no_dist=not dist.is_initialized())
        state = template["model"], template["optimizer"]
    # Not `set_state_dict`: it leaves the model alone on the ranks that pass nothing and wait for the broadcast.
    set_model_state_dict(model, state[0], options=options)
    set_optimizer_state_dict(model, optimizer, state[1], options=options)


def resumed(folder, make, options):
    """Trains, saves, goes on; loads into what another process would make, and goes on with that."""
    model, optimizer = make()
    train(model, optimizer, 0, 8, own_share(model))
    save(folder, model, optimizer, **options)
    other_model, other = make()
    load(folder, other_model, other, **options)
    assert_same_shards(other_model, other, model, optimizer)
    train(model, optimizer, 8, 16, own_share(model))
    train(other_model, other, 8, 16, own_share(model))
    assert_same_shards(other_model, other, model, optimizer)


WAYS = {
    "sharded": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "offloaded": {"cpu_offload": True},
    "trained only": {"ignore_frozen_params": True, "strict": False},
    "gathered": {"full_state_dict": True},
    "full": {"full_state_dict": True, "cpu_offload": True},
    "broadcast": {"full_state_dict": True, "cpu_offload": True, "broadcast_from_rank0": True},
}


def resumed_in_all_ways(folder, cases):
    for make, ways in cases:
        for name in ways:
            path = folder / f"{make.__name__}-{name}"
            if dist.get_rank() == 0:
                path.mkdir()
            dist.barrier()
            resumed(path, make, WAYS[name])
