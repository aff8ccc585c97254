"""What ZeRO and FSDP1 save, state of other groups, and of parameters that are frozen when it is saved or loaded."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel

import lodo
from tests.helpers.distributed_runs import (
    OPTIONS,
    assert_same,
    assert_same_shards,
    everything,
    fsdp1,
    network,
    own_share,
    plain_run,
    train,
    zero_run,
)
from tests.helpers.oracle import KINDS
from tests.helpers.ranks import run


def zero_resumed(path):
    model, optimizer = zero_run()
    train(model, optimizer, 0, 8, own_share())
    for receiver in (1, 0):
        optimizer.consolidate_state_dict(to=receiver)
    if dist.get_rank() == 0:
        torch.save(optimizer.state_dict(), path)
    dist.barrier()
    other_model, other = zero_run()
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(torch.load(path, weights_only=True))
    assert_same_shards(other_model, other.optim, model, optimizer.optim)
    train(model, optimizer, 8, 16, own_share())
    train(other_model, other, 8, 16, own_share())
    assert_same_shards(other_model, other.optim, model, optimizer.optim)


def zero_refused(path):
    """Without a word to the other ranks, so that each can tell what it does."""
    model, optimizer = zero_run()
    optimizer.load_state_dict(torch.load(path, weights_only=True))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    try:
        optimizer.optim.step()
    except RuntimeError as error:
        assert_same([p.detach() for p in model.parameters()], before)
        return str(error)
    return ""


def test_zero_resumes_networks_bit_for_bit_on_as_many_ranks_and_is_refused_on_others(tmp_path):
    path = tmp_path / "zero.pt"
    run(2, zero_resumed, path)
    assert "as many ranks as it was saved with" in run(1, zero_refused, path)[0]
    # On three ranks the first has the same parameters as on two.
    first, *others = run(3, zero_refused, path)
    assert first == ""
    assert "it was made for other parameters" in max(others)


def zero_per_parameter(path, base, begin, end):
    """Goes on from what was saved, if there is anything, and saves; next to ordinary optimizers of the parameters that
    ZeRO gives to each rank. All ranks see the whole batch, for sums over other numbers of ranks are rounded
    otherwise."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns, which the tests' own process forbids

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))  # a matrix for each
    model.late = {"0.bias": 3, "2.weight": 11}
    options = {"base": base, "weight_decay": 0.01}
    params = list(model.parameters())
    optimizer = ZeroRedundancyOptimizer(params, optimizer_class=lodo.AutoLODO, **options)
    saved = torch.load(path, weights_only=True) if begin > 0 else None
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    numbers = {p: i for i, p in enumerate(params)}
    twins = []
    for part in optimizer._partition_parameters():
        own = [numbers[p] for group in part for p in group["params"]]
        twins.append(lodo.AutoLODO([copies[i] for i in own], **options))
        if saved is not None:
            state = {place: saved["optimizer"]["state"][i] for place, i in enumerate(own)}
            group = {**saved["optimizer"]["param_groups"][0], "params": list(range(len(own)))}
            twins[-1].load_state_dict({"state": state, "param_groups": [group]})
    for step in range(begin, end):
        train(model, optimizer, step, step + 1)
        for p, q in zip(params, copies, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        for twin in twins:
            twin.step()
    assert_same([p.detach() for p in params], [p.detach() for p in copies])
    for p, q in zip(params, copies, strict=True):
        if p in optimizer.optim.state:
            assert_same(optimizer.optim.state[p], next(twin.state[q] for twin in twins if q in twin.state))
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    dist.barrier()
    return [p.detach() for p in params]


@pytest.mark.parametrize("base", ["adam", "soap"])
def test_zero_resumes_the_call_that_wants_no_tuning_on_any_number_of_ranks(tmp_path, base):
    """All its state is that of single parameters. Rounding hangs on where they lie in their group, and in soap's
    coordinates without a gradient it grows."""
    path = tmp_path / "zero.pt"
    (expected,) = run(1, zero_per_parameter, tmp_path / "whole.pt", base, 0, 16)
    for world, begin in ((2, 0), (3, 4), (1, 8), (2, 12)):
        found = run(world, zero_per_parameter, path, base, begin, begin + 4)
    for values in found:
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-6 if base == "adam" else 1e-2)
    saved = torch.load(path, weights_only=True)["optimizer"]["state"]
    assert [int(saved[i]["step"]) for i in range(6)] == [16, 13, 5, 16, 16, 16]


def fsdp1_resumed(use_orig_params, kind):
    """Each rank's own state dict goes on; another rank's, and what FSDP1 makes of them, is refused."""
    model = fsdp1(use_orig_params)
    optimizer = lodo.LODO(model.parameters(), preconditioner=kind, **OPTIONS)
    train(model, optimizer, 0, 6, own_share())
    other_model = fsdp1(use_orig_params)
    other = lodo.LODO(other_model.parameters(), preconditioner=kind, **OPTIONS)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert_same(parameters_and_state(other_model, other), parameters_and_state(model, optimizer))
    for gather in (FullyShardedDataParallel.optim_state_dict, get_optimizer_state_dict):
        with pytest.raises((AssertionError, RuntimeError), match=r"Expected dtype|invalid tensor size"):
            gather(model, optimizer)
    states = [None, None]
    dist.all_gather_object(states, optimizer.state_dict())
    neighbour = 1 - dist.get_rank()
    # With `use_orig_params` the shapes of the momentum differ too, and are looked at first.
    message = "has shape" if use_orig_params else rf"gives to rank {neighbour} of 2, this is rank {1 - neighbour} of 2"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(states[neighbour])
    train(model, optimizer, 6, 12, own_share())
    train(other_model, other, 6, 12, own_share())
    assert_same(parameters_and_state(other_model, other), parameters_and_state(model, optimizer))


def parameters_and_state(model, optimizer):
    return [p.detach() for p in model.parameters()], optimizer.state_dict()["state"]


def fsdp1_resumed_in_all_ways():
    for kind in KINDS:
        for use_orig_params in (True, False):
            fsdp1_resumed(use_orig_params, kind)


def test_fsdp1_resumes_from_the_state_dict_of_each_rank_alone():
    run(2, fsdp1_resumed_in_all_ways)


def put_past_the_load(kind, numbers):
    """State of one number of groups in an optimizer of another, as ZeRO puts it there."""
    model = network()
    groups = {
        1: [{"params": model.parameters()}],
        2: [{"params": layer.parameters()} for layer in (model[0], model[2])],
    }
    saved, other = (lodo.LODO(groups[number], preconditioner=kind) for number in numbers)
    train(model, saved, 0, 2)
    other.state.update(saved.state)
    return model, saved, other


@pytest.mark.parametrize(
    ("kind", "numbers", "message"),
    [
        ("block_permutation", (1, 2), "it was made for other parameters"),
        ("block_permutation", (2, 1), "is that of several groups"),
        ("scalar", (2, 1), "is that of several groups"),
    ],
)
def test_networks_of_other_groups_that_are_put_past_the_load_are_refused(kind, numbers, message):
    model, _, other = put_past_the_load(kind, numbers)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=message):
        other.step()
    assert_same([p.detach() for p in model.parameters()], before)


def test_a_network_that_fits_goes_to_the_group_that_it_lies_with_and_the_other_group_is_warned_of():
    """A scalar fits every group."""
    model, saved, other = put_past_the_load("scalar", (1, 2))
    theta = saved.preconditioners[0].theta.clone()
    with pytest.warns(UserWarning, match="momentum without the network that it belongs to"):
        first, second = other.preconditioners
    assert torch.equal(first.theta, theta)
    assert torch.equal(second.theta, torch.ones_like(theta))
    train(model, other, 2, 4)
    assert [int(other.state[p]["step"]) for p in model.parameters()] == [4] * 4


@pytest.mark.parametrize("numbers", [(1, 2), (2, 1)])
@pytest.mark.parametrize("base", ["adam", "soap"])
def test_state_of_single_parameters_fits_all_groups_of_them(numbers, base):
    model = network()
    twin = network()
    groups = {
        1: lambda it: [{"params": it.parameters()}],
        2: lambda it: [{"params": layer.parameters()} for layer in (it[0], it[2])],
    }
    saved, other = (lodo.AutoLODO(groups[number](model), base=base) for number in numbers)
    whole = lodo.AutoLODO(groups[numbers[0]](twin), base=base)
    train(model, saved, 0, 3)
    other.state.update(saved.state)
    train(model, other, 3, 8)
    train(twin, whole, 0, 8)
    # Products of matrices are rounded as they lie in memory.
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12 if base == "soap" else 0)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("layer", [0, 2])
def test_the_network_of_a_group_with_frozen_parameters_is_loaded(layer, full):
    """torch loads no state of frozen parameters; into a full state dict it puts that of the new optimizer instead."""
    options = StateDictOptions(full_state_dict=full)

    def made():
        model = network()
        model[layer].requires_grad_(False)
        return model, lodo.LODO(model.parameters(), **OPTIONS)

    model, optimizer = made()
    train(model, optimizer, 0, 4)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    other_model, other = made()
    other_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other_model, other, saved, options=options)
    train(model, optimizer, 4, 8)
    train(other_model, other, 4, 8)
    assert_same(everything(other_model, other), everything(model, optimizer))


def test_the_network_moves_on_when_the_parameter_that_it_lies_with_is_frozen():
    (model, optimizer), (other_model, other) = plain_run(), plain_run()
    train(model, optimizer, 0, 4)
    train(other_model, other, 0, 4)
    optimizer.state[model[0].weight]["note"] = "of a hook"
    model[0].weight.requires_grad_(False)
    train(model, optimizer, 4, 8)
    other.register_step_pre_hook(lambda *_: setattr(other_model[0].weight, "grad", None))
    train(other_model, other, 4, 8)
    assert optimizer.state[model[0].weight].keys() == {"step", "skipped_steps", "shards", "momentum", "note"}
    assert optimizer.state[model[0].bias]["meta_step"] == optimizer.state[model[0].bias]["step"] == 8
    assert torch.equal(optimizer.preconditioners[0].theta, other.preconditioners[0].theta)
    assert_same(dict(model.named_parameters()), dict(other_model.named_parameters()))


def test_a_network_that_torch_leaves_out_is_warned_of():
    """Saved when all was trained, loaded where the first layer is frozen."""
    options = StateDictOptions(full_state_dict=True)
    model, optimizer = plain_run()
    train(model, optimizer, 0, 4)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    model, optimizer = plain_run()
    model[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="momentum without the network that it belongs to"):
        set_optimizer_state_dict(model, optimizer, saved, options=options)


def test_momentum_stays_with_the_coordinates_that_it_lies_in():
    """With base="soap" those of its parameter, whose factors torch loads, or leaves out, with it."""
    settings, options = {"lr": 1e-2, "base": "soap"}, StateDictOptions(full_state_dict=True)
    (model, _), (other, _) = plain_run(), plain_run()
    optimizer, loaded = (lodo.LODO(each.parameters(), **settings) for each in (model, other))
    train(model, optimizer, 0, 4)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    other[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="momentum without the network that it belongs to"):
        set_optimizer_state_dict(other, loaded, saved, options=options)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        entry, found = optimizer.state[p], loaded.state[q]
        assert entry["momentum"].any()
        if name.startswith("0"):
            assert not any(found[key].any() for key in ("step", "momentum", "exp_avg_sq", "seen"))
        else:
            own = ("step", "momentum", "exp_avg_sq", "unit", "factors", "eigenbasis", "seen", "written", "scheduled_lr")
            assert_same({key: found[key] for key in own}, {key: entry[key] for key in own})


def test_a_group_without_a_saved_state_starts_anew_if_that_is_allowed():
    model = network()
    optimizer = lodo.LODO(model[0].parameters(), **OPTIONS)
    train(model, optimizer, 0, 4)
    saved = get_optimizer_state_dict(model, optimizer)
    other = lodo.LODO([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.2)
    with pytest.raises(RuntimeError, match="Missing optimizer state"):
        set_optimizer_state_dict(model, other, saved)
    set_optimizer_state_dict(model, other, saved, options=StateDictOptions(strict=False))
    assert [group["lr"] for group in other.param_groups] == [OPTIONS["lr"], 0.2]
    assert torch.equal(other.preconditioners[0].theta, optimizer.preconditioners[0].theta)
    train(model, other, 4, 6)
    assert other.state[model[0].weight]["step"] == 6
    assert other.state[model[2].weight]["step"] == 2
