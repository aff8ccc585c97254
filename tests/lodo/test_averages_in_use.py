"""Averages of the iterates beside what models, users and ranks do meanwhile."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import update_bn

import lodo
from lodo import scalars
from tests.helpers.averages import CALLS, SHARE, copies, made, mean, one_step, walk
from tests.helpers.distributed_runs import fsdp1, network
from tests.helpers.ranks import run
from tests.helpers.states import assert_same

# ---- batch normalisation -------------------------------------------------------------------------------------------


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 1))

    def forward(self, x):
        return self.layers(x)


def test_batch_statistics_are_those_of_the_averages_and_put_back():
    torch.manual_seed(0)
    model, batches = Normalised(), [torch.randn(16, 4) for _ in range(4)]
    optimizer = lodo.AutoLODO(model.parameters(), average_share=0.1)
    for number in range(20):
        optimizer.zero_grad()
        (model(batches[number % 4]) - 1).square().mean().backward()
        optimizer.step()
    model.eval()
    kept, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with optimizer.averaged(model, batches):
        twin = copy.deepcopy(model)
        for layer in twin.modules():
            if isinstance(layer, nn.BatchNorm1d):
                layer.reset_running_stats()
        torch.set_rng_state(random)
        update_bn(batches, twin)
        assert_same(model.state_dict(), twin.state_dict())
        assert not model.training
        torch.set_rng_state(random)
    assert_same(model.state_dict(), kept)
    assert torch.equal(torch.get_rng_state(), random)


# ---- what users do meanwhile ---------------------------------------------------------------------------------------


def test_they_are_known_to_be_shown_whatever_becomes_of_the_first_parameter():
    params, optimizer = made(lodo.RECOMMENDED)
    walk(params, optimizer, 5)
    kept = copies(params)
    optimizer.eval()
    new = nn.Parameter(torch.ones(2))
    optimizer.param_groups[0]["params"].insert(0, new)
    with pytest.raises(RuntimeError, match="at their averages"):
        one_step([new, *params], optimizer, 5)
    optimizer.train()
    assert_same(params, kept)
    assert_same([new], [torch.ones(2)])
    optimizer.eval()
    del optimizer.param_groups[0]["params"][0]
    optimizer.train()
    assert_same(params, kept)
    one_step(params, optimizer, 5)


@pytest.mark.parametrize("share", [SHARE, None])
def test_they_may_be_shown_where_gradients_are_off_for_good(share):
    """Lightning validates so; the state may have been loaded just before, so that all of it is made there."""
    params, optimizer = made(lodo.RECOMMENDED, average_share=share)
    walk(params, optimizer, 5)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kept = copies(params)
    with torch.inference_mode():
        optimizer.eval()
        assert torch.equal(params[0], kept[0]) == (share is None)
    optimizer.train()
    assert_same(params, kept)
    one_step(params, optimizer, 5)


@pytest.mark.parametrize("way", ["deepcopy", "cast", "reset"])
def test_what_is_done_to_the_optimizer_while_they_are_shown(way):
    params, optimizer = made(lodo.RECOMMENDED)
    walk(params, optimizer, 6)
    kept = copies(params)
    optimizer.eval()
    if way == "deepcopy":
        params, optimizer = copy.deepcopy((params, optimizer))
    elif way == "reset":
        optimizer.reset()
    else:
        for p in params:
            p.data = p.data.double()
        kept = [value.double() for value in kept]
    optimizer.train()
    assert_same(params, kept)
    one_step(params, optimizer, 6)


def test_an_average_recovers_from_parameters_that_were_not_finite():
    for missing in ((), (1,)):
        params, optimizer = made({"lr": 0.1, "preconditioner": "diagonal"})
        one_step(params, optimizer, 0, missing)
        kept = copies(params)
        with torch.no_grad():
            params[0].fill_(math.nan)
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        with torch.no_grad():
            params[0].copy_(kept[0])
        for number in range(1, 4):
            one_step(params, optimizer, number, missing)
        with optimizer.averaged():
            assert all(bool(p.isfinite().all()) for p in params)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("is_device", [False, True])
@pytest.mark.parametrize("call", [CALLS["auto"], CALLS["diagonal"]], ids=["auto", "diagonal"])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_infinite_elements_are_kept_saved_and_loaded(call, is_device, requires_grad, monkeypatch):
    if is_device:
        monkeypatch.setenv("LODO_NATIVE", "0")
        monkeypatch.setattr(scalars, "is_readable", lambda tensor: False)
        call = {**call, "base": "adam"} if "base" in call else call
    values = torch.tensor([0.5, -math.inf, math.inf])
    mask, x = nn.Parameter(values.clone(), requires_grad=requires_grad), nn.Parameter(torch.ones(3))
    optimizer = lodo.LODO([mask, x], **call, average_share=SHARE)
    for _ in range(6):
        x.grad = torch.ones(3)
        mask.grad = torch.tensor([1.0, 0.0, 0.0]) if requires_grad else None
        optimizer.step()
    kept = copies([mask, x])
    with optimizer.averaged():
        assert_same(mask.detach()[1:], values[1:])
        assert bool(mask[0].isfinite())
        assert bool(x.isfinite().all())
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same([mask, x], kept)


def test_a_context_decides_when_it_is_entered():
    params, optimizer = made(lodo.RECOMMENDED)
    walk(params, optimizer, 4)
    kept = copies(params)
    optimizer.eval()
    context = optimizer.averaged()
    optimizer.train()
    with context:
        assert not torch.equal(params[0], kept[0])
    assert_same(params, kept)
    one_step(params, optimizer, 4)


def test_a_model_is_left_as_it_was_when_its_batches_are_no_good():
    torch.manual_seed(0)
    model = Normalised()
    optimizer = lodo.AutoLODO(model.parameters(), average_share=0.1)
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    model.eval()
    kept = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError), optimizer.averaged(model, [torch.randn(8, 4), torch.randn(8, 5)]):
        pytest.fail("entered")
    with pytest.raises(ValueError, match="batches must hold at least one batch"), optimizer.averaged(model, iter(())):
        pytest.fail("entered")
    assert_same(model.state_dict(), kept)
    assert model.layers[1].momentum == 0.1
    assert not any(module.training for module in model.modules())


def test_frozen_batch_statistics_stay_frozen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = lodo.AutoLODO(model.parameters(), average_share=0.1)
    batches = [3 + torch.randn(16, 4) for _ in range(3)]
    for batch in batches:
        model(batch).square().mean().backward()
        optimizer.step()
    model[0].eval()
    kept = copy.deepcopy(model.state_dict())
    with optimizer.averaged(model, [(batch, None) for batch in batches]):
        assert torch.equal(model[0].running_mean, kept["0.running_mean"])
        means = [model[1](model[0](batch)).mean(0) for batch in batches]
        torch.testing.assert_close(model[2].running_mean, sum(means) / 3)
    assert_same(model.state_dict(), kept)
    assert [module.training for module in model] == [False, True, True]


# ---- ranks ---------------------------------------------------------------------------------------------------------


def _sharded():
    model, rank = fully_shard(network(torch.float32)), torch.distributed.get_rank()
    width = model[0].in_features
    params = list(model.parameters())
    optimizer = lodo.LODO(params, depth=2, lr=0.1, average_share=SHARE)
    iterates = [copies(params)]
    for number in range(6):
        torch.manual_seed(10 * number + rank)
        optimizer.zero_grad()
        model(torch.randn(8, width)).square().mean().backward()
        optimizer.step()
        iterates.append(copies(params))
    optimizer.eval()
    for place, p in enumerate(params):
        expected = mean([x[place].full_tensor() for x in iterates])
        torch.testing.assert_close(p.full_tensor().double(), expected, rtol=1e-6, atol=1e-6)
        assert isinstance(optimizer.state[p]["average"], DTensor)
        assert isinstance(optimizer.state[p]["iterate"], DTensor)
    assert_same([x.to_local() for x in iterates[-1]], [optimizer.state[p]["iterate"].to_local() for p in params])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.train()
    assert_same([p.to_local() for p in params], [x.to_local() for x in iterates[-1]])

    # The copies that FSDP2 gathers of parameters, and keeps after a forward pass alone, are never others.
    x, found = torch.randn(8, width), []
    with torch.no_grad():
        found.append(model(x))
        with optimizer.averaged(model):
            found.append(model(x))
            plain = network(torch.float32)
            for own, p in zip(plain.parameters(), params, strict=True):
                own.copy_(p.full_tensor())
            torch.testing.assert_close(found[1], plain(x))
        found.append(model(x))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    optimizer.step()


def test_shards_are_averaged_by_themselves():
    run(2, _sharded)


def _in_fsdp1():
    model = fsdp1(True)
    optimizer = lodo.LODO(model.parameters(), depth=2, lr=0.1, average_share=SHARE)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 5, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    kept = copies(model.parameters())
    with pytest.raises(RuntimeError, match="FSDP1"):
        optimizer.eval()
    assert_same(list(model.parameters()), kept)
    optimizer.step()


@pytest.mark.filterwarnings("ignore:FSDP:FutureWarning")
def test_fsdp1_which_computes_with_copies_is_refused():
    run(2, _in_fsdp1)
