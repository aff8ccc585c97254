"""Averages of the iterates: against explicit weighted means, and what training knows of them: nothing."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import update_bn

import lodo
from lodo import scalars
from lodo.parts.average import _weights
from tests.helpers.distributed_runs import fsdp1, network
from tests.helpers.ranks import run
from tests.helpers.states import assert_same, through_file

CALLS = {
    "auto": lodo.RECOMMENDED,
    "with decay and a bound": {**lodo.RECOMMENDED, "weight_decay": 0.1, "max_step_norm": 0.1},
    "the paper's": {"lr": 0.1, "depth": 2},
    "diagonal": {"lr": 0.1, "preconditioner": "diagonal"},
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
SHARE = 0.25


def made(call, dtype=torch.float32, **options):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((5, 3), (4,), ())]
    return params, lodo.LODO(params, **call, **{"average_share": SHARE, **options})


def one_step(params, optimizer, number, missing=()):
    generator = torch.Generator().manual_seed(number)
    for place, p in enumerate(params):
        noise = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = None if place in missing else p.detach() + noise
    optimizer.step()


def copies(params):
    return [p.detach().clone() for p in params]


def mean(iterates):
    """Weighted by s (s + 1) (s + 2) at place s = 1, 2, ..., for a share of a quarter."""
    weights = torch.tensor([s * (s + 1) * (s + 2) for s in range(1, len(iterates) + 1)], dtype=torch.float64)
    stack = torch.stack([x.double() for x in iterates])
    return torch.tensordot(weights / weights.sum(), stack, dims=1)


# ---- what they are -------------------------------------------------------------------------------------------------


@every_call
@pytest.mark.parametrize("native", ["0", "1"])
def test_they_are_weighted_means_of_all_iterates_and_training_is_as_without(call, native, monkeypatch):
    monkeypatch.setenv("LODO_NATIVE", native)
    params, optimizer = made(call)
    twins, other = made(call, average_share=None)
    iterates = [copies(params)]
    for number in range(25):
        one_step(params, optimizer, number)
        one_step(twins, other, number)
        iterates.append(copies(params))
        assert_same(params, twins)
        with optimizer.averaged():
            for place, p in enumerate(params):
                expected = mean([each[place] for each in iterates])
                torch.testing.assert_close(p.double(), expected, rtol=1e-6, atol=1e-6)
        assert_same(params, twins)
    own = {"average", "averaged"}
    for p, twin in zip(params, twins, strict=True):
        assert_same({name: x for name, x in optimizer.state[p].items() if name not in own}, other.state[twin])


@pytest.mark.parametrize("call", [CALLS["auto"], CALLS["the paper's"]], ids=["auto", "the paper's"])
def test_each_parameter_averages_over_its_own_steps(call):
    """With the paper's networks a parameter without a gradient takes part, once it has had one."""
    params, optimizer = made(call)
    missing = [((2,) if number < 5 else (0, 1) if number % 3 == 0 else ()) for number in range(12)]
    iterates = [[p.detach().clone()] for p in params]
    for number, places in enumerate(missing):
        one_step(params, optimizer, number, places)
        for place, p in enumerate(params):
            had_some = place != 2 or number >= 5
            if place not in places or ("preconditioner" not in call and had_some):
                iterates[place].append(p.detach().clone())
    with optimizer.averaged():
        for p, own in zip(params, iterates, strict=True):
            torch.testing.assert_close(p.double(), mean(own), rtol=1e-6, atol=1e-6)


def test_scalars_that_nobody_reads_give_the_same(monkeypatch):
    monkeypatch.setenv("LODO_NATIVE", "0")
    found = []
    for is_device in (False, True):
        if is_device:
            monkeypatch.setattr(scalars, "is_readable", lambda tensor: False)
        params, optimizer = made(lodo.RECOMMENDED | {"base": "adam"}, torch.float64)
        for number in range(12):
            one_step(params, optimizer, number, (1,) if number < 3 else ())
        with optimizer.averaged():
            found.append(copies(params))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_what_users_make_of_a_step_is_in_them():
    params, optimizer = made(lodo.RECOMMENDED)
    iterates = [copies(params)]
    for number in range(20):
        one_step(params, optimizer, number)
        with torch.no_grad():
            for p in params:
                p.clamp_(min=0.5)
        iterates.append(copies(params))
    with optimizer.averaged():
        for place, p in enumerate(params):
            torch.testing.assert_close(p.double(), mean([x[place] for x in iterates]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_averaged_in_full_precision_and_rounded_once(dtype):
    params, optimizer = made(lodo.RECOMMENDED, dtype)
    iterates = [copies(params)]
    for number in range(15):
        one_step(params, optimizer, number)
        iterates.append(copies(params))
    kept = copies(params)
    for _ in range(3):  # nothing is lost by looking
        with optimizer.averaged():
            for place, p in enumerate(params):
                expected = mean([x[place] for x in iterates])
                ulp = torch.finfo(dtype).eps * expected.abs().clamp(min=1e-3)
                assert bool(((p.double() - expected).abs() <= 0.6 * ulp + 1e-7).all())
        assert_same(params, kept)


@pytest.mark.parametrize("share", [1, 0.5, 0.1, 1e-3])
def test_long_trainings_take_in_fewer_iterates_with_the_same_weights(share):
    """The mean of the numbers 1 to t is that of the full average to a part of the share, with no fewer than some
    hundreds of them."""
    t, average, full, taken = torch.zeros(1, dtype=torch.int64), 0.0, 0.0, []
    for number in range(1, 30_001):
        t += 1
        weight = float(_weights(t, share))
        average += weight * (number - average)
        full += (number - full) / (1 + share * (number - 1))
        if weight > 0:
            taken.append(number)
        if number % 7_500 == 0:
            assert average == pytest.approx(full, abs=0.02 * share * number + 1)
            assert sum(each > (1 - share) * number for each in taken) >= min(share * number, 256)
    assert len(taken) < 30_000 or share * 30_000 < 1_024


def test_an_average_of_many_noisy_iterates_is_not_lost_in_rounding():
    """With a weight of 1e-5 a step of float32 would stand still this near."""
    generator = np.random.default_rng(0)
    average, t = torch.full((64,), 1000.0), torch.tensor([1_000_000])
    target = torch.full((64,), 1000.5)
    for _ in range(200_000 // 64):
        t += 64  # 64 steps at once: as many as are left out
        weight = float(_weights(t, 0.1))
        if weight > 0:
            average.lerp_(target + torch.from_numpy(generator.normal(0, 0.01, 64)).float(), weight)
    assert bool(((average - target).abs() < 0.2).all())


# ---- showing them --------------------------------------------------------------------------------------------------


def test_steps_wait_until_the_parameters_are_back():
    params, optimizer = made(lodo.RECOMMENDED)
    one_step(params, optimizer, 0)
    one_step(params, optimizer, 1)
    kept = copies(params)
    optimizer.eval()
    optimizer.eval()
    shown, state = copies(params), copy.deepcopy(optimizer.state_dict())
    assert not torch.equal(shown[0], kept[0])
    with pytest.raises(RuntimeError, match=r"at their averages.*LODO\.train"):
        optimizer.step(lambda: pytest.fail("the model was evaluated"))
    assert_same(params, shown)
    assert_same(optimizer.state_dict(), state)
    with optimizer.averaged():  # inside it is as it was, and so it is afterwards
        assert_same(params, shown)
    assert_same(params, shown)
    optimizer.train()
    assert_same(params, kept)
    optimizer.train()
    assert_same(params, kept)
    one_step(params, optimizer, 2)


def test_before_there_are_any_nothing_happens():
    params, optimizer = made(lodo.RECOMMENDED)
    kept = copies(params)
    with optimizer.averaged():
        assert_same(params, kept)
    one_step(params, optimizer, 0)
    others, without = made(lodo.RECOMMENDED, average_share=None)
    one_step(others, without, 0)
    kept, state = copies(others), copy.deepcopy(without.state_dict())
    without.eval()
    assert_same(others, kept)
    without.train()
    assert_same((others, without.state_dict()), (kept, state))
    with pytest.raises(ValueError, match="average_share must be a number in some param group"):
        without.averaged()
    with pytest.raises(ValueError, match="model must be given for batches, got None"):
        optimizer.averaged(batches=[torch.ones(1)])


def test_parameters_come_back_after_an_error():
    params, optimizer = made(lodo.RECOMMENDED)
    for number in range(3):
        one_step(params, optimizer, number)
    kept = copies(params)
    with pytest.raises(KeyError), optimizer.averaged():
        raise KeyError
    assert_same(params, kept)


def test_frozen_parameters_and_groups_without_averages_stay_as_they_are():
    mask = nn.Parameter(torch.tensor([0.0, -math.inf]), requires_grad=False)
    params, others = [nn.Parameter(torch.randn(3)), mask], [nn.Parameter(torch.randn(2))]
    optimizer = lodo.AutoLODO([{"params": params, "average_share": 0.1}, {"params": others}])
    for number in range(5):
        one_step([params[0], *others], optimizer, number)
    kept = copies([*params, *others])
    with optimizer.averaged():
        assert not torch.equal(params[0], kept[0])
        assert_same([mask, *others], kept[1:])
    assert_same([*params, *others], kept)


def test_a_group_may_come_to_ask_for_them_and_cease_to():
    params, optimizer = made(lodo.RECOMMENDED, average_share=None)
    for number in range(10):
        one_step(params, optimizer, number)
    for _ in range(2):  # of old iterates nothing is left the second time
        optimizer.param_groups[0]["average_share"] = SHARE
        iterates = [copies(params)]
        for number in range(6):
            one_step(params, optimizer, number)
            iterates.append(copies(params))
        with optimizer.averaged():
            for place, p in enumerate(params):
                torch.testing.assert_close(p.double(), mean([x[place] for x in iterates]), rtol=1e-6, atol=1e-6)
        optimizer.param_groups[0]["average_share"] = None
        kept = copies(params)
        optimizer.eval()
        assert_same(params, kept)
        one_step(params, optimizer, 9)


@pytest.mark.parametrize("call", [CALLS["auto"], CALLS["the paper's"]], ids=["auto", "the paper's"])
def test_reset_begins_them_anew(call):
    params, optimizer = made(call)
    for number in range(10):
        one_step(params, optimizer, number)
    optimizer.reset()
    iterates = [copies(params)]
    for number in range(6):
        one_step(params, optimizer, number)
        iterates.append(copies(params))
    with optimizer.averaged():
        for place, p in enumerate(params):
            torch.testing.assert_close(p.double(), mean([x[place] for x in iterates]), rtol=1e-6, atol=1e-6)


# ---- saved and resumed ---------------------------------------------------------------------------------------------


@every_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_at_the_averages_goes_on_from_the_iterates(call, dtype):
    params, optimizer = made(call, dtype)
    for number in range(6):
        one_step(params, optimizer, number)
    optimizer.eval()
    saved = through_file({"model": copies(params), "optimizer": optimizer.state_dict()})
    optimizer.train()
    twins, other = made(call, dtype)
    with torch.no_grad():
        for twin, value in zip(twins, saved["model"], strict=True):
            twin.copy_(value)
    other.load_state_dict(saved["optimizer"])
    with pytest.raises(RuntimeError, match="at their averages"):
        one_step(twins, other, 6)
    other.train()
    assert_same(twins, params)
    for number in range(6, 12):
        one_step(params, optimizer, number)
        one_step(twins, other, number)
    assert_same(twins, params)
    assert_same(other.state_dict(), optimizer.state_dict())


def test_a_loaded_state_says_whether_averages_are_shown():
    params, optimizer = made(lodo.RECOMMENDED)
    for number in range(4):
        one_step(params, optimizer, number)
    saved, kept = copy.deepcopy(optimizer.state_dict()), copies(params)
    optimizer.eval()
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip(params, kept, strict=True):
            p.copy_(value)
    optimizer.train()
    assert_same(params, kept)
    one_step(params, optimizer, 4)


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
    for number in range(5):
        one_step(params, optimizer, number)
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
    for number in range(5):
        one_step(params, optimizer, number)
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
    for number in range(6):
        one_step(params, optimizer, number)
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
    for number in range(4):
        one_step(params, optimizer, number)
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
