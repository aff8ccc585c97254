"""Checkpoints of whole tensors on several ranks (`sharding="whole"`): they are those of one process."""

import copy
import io
import math
import os
import signal
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import lodo
from lodo.state.owners import Owners
from tests.helpers.distributed_runs import (
    assert_same,
    fsdp,
    local_or_same,
    network,
    own_share,
    train,
    whole,
    whole_hsdp_run,
    whole_run,
    whole_two_dimensional_run,
)
from tests.helpers.distributed_states import WAYS, load, resumed_in_all_ways, save
from tests.helpers.ranks import run

EACH = ("sharded", "flat", "offloaded", "gathered", "full", "broadcast")


def frozen_run():
    """torch leaves the state of frozen parameters out of what it loads."""
    model, _ = whole_run()
    model[0].requires_grad_(False)
    return model, lodo.AutoLODO(model.parameters(), sharding="whole")


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, ((whole_run, EACH),)),
        (4, ((whole_run, ("sharded", "full")), (whole_hsdp_run, ("sharded", "full")))),
        (4, ((whole_two_dimensional_run, ("sharded", "full", "broadcast")),)),
    ],
    ids=["2 ranks", "4 ranks", "2 x 2 ranks"],
)
def test_they_resume_bit_for_bit(tmp_path, world, cases):
    run(world, resumed_in_all_ways, tmp_path, cases)


def frozen_and_resumed(folder):
    model, optimizer = frozen_run()
    train(model, optimizer, 0, 6, own_share(model))
    save(folder, model, optimizer)
    for name in ("sharded", "trained only"):
        other_model, other = frozen_run()
        load(folder, other_model, other, **WAYS[name])
        train(other_model, other, 6, 9, own_share(other_model))
        if name == "sharded":
            train(model, optimizer, 6, 9, own_share(model))
        assert_same(*({key: whole(p) for key, p in each.named_parameters()} for each in (other_model, model)))
        assert not other.is_at_averages
        assert_same(*(each.state_dict()["state"][2]["momenta"].full_tensor() for each in (other, optimizer)))
    return True


def test_frozen_parameters_begin_anew_and_the_others_go_on(tmp_path):
    assert run(2, frozen_and_resumed, tmp_path) == [True, True]


def one_process_run():
    model = network(torch.float32)
    model.late = {"2.bias": 3}
    return model, lodo.AutoLODO(model.parameters(), average_share=0.5)


def local_run():
    model = fsdp()
    return model, lodo.AutoLODO(model.parameters(), average_share=0.5)


def contents(model, optimizer):
    """Parameters and all state, whole."""
    names = [name for name, _ in model.named_parameters()]
    state = optimizer.state_dict()["state"]
    return {name: whole(p) for name, p in model.named_parameters()}, {
        name: {key: whole(value) for key, value in state[i].items()} for i, name in enumerate(names)
    }


def saved_run(folder, make):
    model, optimizer = make()
    train(model, optimizer, 0, 8, own_share(model))
    save(folder, model, optimizer)
    save(folder, model, optimizer, full_state_dict=True, cpu_offload=True)
    saved = contents(model, optimizer)
    train(model, optimizer, 8, 12, own_share(model))
    return saved, {name: whole(p) for name, p in model.named_parameters()}


def loaded_run(folder, make, ways):
    results = []
    for name in ways:
        model, optimizer = make()
        if name == "full":  # into one that has its own state
            train(model, optimizer, 0, 2, own_share(model))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(folder, model, optimizer, **WAYS[name])
        results.append(contents(model, optimizer))
        train(model, optimizer, 8, 12, own_share(model))
        results.append({name: whole(p) for name, p in model.named_parameters()})
    return results


@pytest.mark.parametrize(
    ("worlds", "makers", "ways"),
    [
        ((4, 2), (whole_run, whole_run), ("sharded", "full", "broadcast")),
        ((2, 4), (whole_run, whole_run), ("sharded", "full")),
        ((1, 2), (one_process_run, whole_run), ("sharded", "full", "broadcast")),
        ((2, 1), (whole_run, one_process_run), ("sharded", "full")),
        ((4, 1), (whole_hsdp_run, one_process_run), ("sharded", "full")),
        ((2, 4), (whole_run, whole_hsdp_run), ("sharded", "full")),
    ],
    ids=["4 to 2", "2 to 4", "1 to 2", "2 to 1", "2 x 2 to 1", "2 to 2 x 2"],
)
def test_they_go_on_with_any_number_of_ranks_and_nothing_is_lost(tmp_path, worlds, makers, ways):
    ((expected, expected_after), *_) = run(worlds[0], saved_run, tmp_path, makers[0])
    for results in run(worlds[1], loaded_run, tmp_path, makers[1], ways):
        for found, after in zip(results[::2], results[1::2], strict=True):
            assert_same(found, expected)
            torch.testing.assert_close(after, expected_after, rtol=0, atol=1e-6)


def other_mode_run(folder, makers):
    """From whole tensors to each rank's own shards, or back: parameters and averages go on, with one message."""
    model, optimizer = makers[0]()
    train(model, optimizer, 0, 8, own_share(model))
    save(folder, model, optimizer)
    (parameters, state) = contents(model, optimizer)
    other_model, other = makers[1]()
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(folder, other_model, other, planner)
    assert sum("another number of shards" in str(warning.message) for warning in caught) == 1
    assert other.param_groups[0]["sharding"] == makers[1]()[1].param_groups[0]["sharding"]
    found_parameters, found = contents(other_model, other)
    assert_same(found_parameters, parameters)
    for name, entry in state.items():
        assert_same(found[name]["average"], entry["average"])
        assert not found[name]["momentum"].any()
    train(other_model, other, 8, 12, own_share(other_model))
    moved = contents(other_model, other)[0]
    assert all(p.isfinite().all() and not torch.equal(p, parameters[name]) for name, p in moved.items())
    return other.skipped_steps


@pytest.mark.parametrize("makers", [(whole_run, local_run), (local_run, whole_run)], ids=["to local", "to whole"])
def test_the_other_mode_begins_anew(tmp_path, makers):
    assert run(2, other_mode_run, tmp_path, makers) == [0, 0]


def averaged_run(folder):
    """Saved, and loaded, at the averages: the iterates are there."""
    model, optimizer = whole_run()
    train(model, optimizer, 0, 8, own_share(model))
    iterates = {name: whole(p) for name, p in model.named_parameters()}
    optimizer.eval()
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    other_model, other = whole_run()
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(torch.load(saved, weights_only=False))  # DTensors
    assert other.is_at_averages
    with pytest.raises(RuntimeError, match="averages"):
        other.step()
    other.train()
    assert_same({name: whole(p) for name, p in other_model.named_parameters()}, iterates)
    assert not other.is_at_averages
    train(other_model, other, 8, 9, own_share(other_model))
    return True


def test_a_state_saved_at_the_averages_has_the_iterates(tmp_path):
    assert run(4, averaged_run, tmp_path) == [True] * 4


def other_mode_of_few():
    """A rank that owns nothing does not see that state is of the other mode."""
    mesh = init_device_mesh("cpu", (4,))
    params = [nn.Parameter(distribute_tensor(torch.ones(6, 2), mesh, [Shard(0)]))]
    found = []
    for sharding in ("local", "whole"):
        optimizer = lodo.AutoLODO(params, sharding=sharding)
        params[0].grad = torch.ones_like(params[0])
        if found:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.load_state_dict(found[0])
            assert len(caught) == 1
        optimizer.step()
        found.append(optimizer.state_dict())
    return whole(params[0])


def test_ranks_that_own_nothing_load_the_other_mode_too():
    first, *others = run(4, other_mode_of_few)
    assert first.isfinite().all()
    assert_same(others, [first] * 3)


def damaged_run():
    """One rank alone can see the damage, for it owns the tensor; all refuse, and nothing has changed."""
    model, optimizer = whole_run()
    train(model, optimizer, 0, 4, own_share(model))
    saved = optimizer.state_dict()
    before = contents(model, optimizer)
    bad = copy.deepcopy(saved)
    local_or_same(bad["state"][0]["exp_avg_sq"]).fill_(math.nan)
    messages = []
    try:
        optimizer.load_state_dict(bad)
    except ValueError as error:
        messages.append(str(error))
    assert_same(contents(model, optimizer), before)
    optimizer.load_state_dict(saved)
    assert_same(contents(model, optimizer), before)
    optimizer.zero_grad()
    assert_same(contents(model, copy.deepcopy(optimizer))[1], before[1])
    return messages


def test_damaged_state_is_refused_by_all_ranks_or_none():
    found = [message for messages in run(2, damaged_run) for message in messages]
    assert sum("refused by another rank" in message for message in found) == 1
    assert sum("exp_avg_sq holds NaN" in message for message in found) == 1


def dies(folder, where):
    """One of four ranks is killed, between the two exchanges of a step or in the middle of a save."""
    model, optimizer = whole_run()
    train(model, optimizer, 0, 6, own_share(model))
    save(folder / "whole", model, optimizer)
    if dist.get_rank() == 3 and where == "step":
        optimizer.register_step_pre_hook(lambda *_: setattr(Owners, "scatter", killed))
    elif dist.get_rank() == 3:
        dcp.FileSystemWriter.write_data = killed
    if where == "step":
        train(model, optimizer, 6, 7, own_share(model))
    else:
        save(folder / "broken", model, optimizer)


def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def goes_on(folder):
    model, optimizer = whole_run()
    load(folder, model, optimizer)
    train(model, optimizer, 6, 12, own_share(model))
    return contents(model, optimizer)[0]


@pytest.mark.parametrize("where", ["step", "save"])
def test_a_killed_rank_loses_nothing_that_was_saved(tmp_path, where):
    """Two ranks go on as four would have, or one."""
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    with pytest.raises(AssertionError, match=r"(?i)connection (reset|closed)|closed by peer"):  # as the others see it
        run(4, dies, tmp_path, where)
    assert not (tmp_path / "broken" / ".metadata").exists()
    model, optimizer = one_process_run()
    train(model, optimizer, 0, 12)
    expected = {name: p.detach() for name, p in model.named_parameters()}
    for found in run(2, goes_on, tmp_path / "whole"):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
