"""Training on several ranks: DistributedDataParallel."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

import lodo

if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

LEAN = {"depth": 4, "expansion": 1}


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def train(model, optimizer, begin, end, share=slice(None)):
    """Steps `begin` to `end` on a batch of 16, of which this rank sees its share."""
    for step in range(begin, end):
        x = torch.randn(16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))[share]
        x = x.to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        (model(x) - x[:, :3].sin()).square().mean().backward()
        optimizer.step()


def own_share():
    return slice(dist.get_rank(), None, dist.get_world_size())


def everything(model, optimizer):
    """Parameters and all of the optimizer's state, by name, as copies."""
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]})


def assert_same(found, expected):
    found, expected = pytree.tree_leaves_with_path(found), pytree.tree_leaves_with_path(expected)
    assert [path for path, _ in found] == [path for path, _ in expected]
    for (path, a), (_, b) in zip(found, expected, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, pytree.keystr(path)


def ddp_steps(steps, dtype, **options):
    model = DistributedDataParallel(network(dtype))
    optimizer = lodo.LODO(model.parameters(), lr=0.1, meta_lr=1e-2, weight_decay=0.01, **options)
    train(model, optimizer, 0, steps, own_share())
    return everything(model.module, optimizer)


@pytest.mark.parametrize("world", [2, 4])
def test_ddp_is_one_process_on_the_whole_batch(world):
    model = network()
    optimizer = lodo.LODO(model.parameters(), lr=0.1, meta_lr=1e-2, weight_decay=0.01)
    train(model, optimizer, 0, 10)
    expected = everything(model, optimizer)
    for found in run(world, ddp_steps, 10, torch.float64):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("world", [2, 4])
def test_ddp_replicas_stay_bit_identical(world):
    first, *others = run(world, ddp_with_settings, 200)
    for other in others:
        assert_same(other, first)


def ddp_with_settings(steps):
    """In float32, where rounding would tell, with every kind of state that depends on counts."""
    settings = {"meta_every": 2, "meta_state_dtype": "bfloat16", "momentum_dtype": "bfloat16", **LEAN}
    return ddp_steps(steps, torch.float32), ddp_steps(steps, torch.float32, **settings)


def ddp_with_a_nan():
    model = DistributedDataParallel(network())
    optimizer = lodo.LODO(model.parameters(), lr=0.1, meta_lr=1e-2)
    train(model, optimizer, 0, 3, own_share())
    before = everything(model.module, optimizer)
    x = torch.full((2, 5), float("nan") if dist.get_rank() == 1 else 1.0, dtype=torch.float64)
    optimizer.zero_grad()
    model(x).sum().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert any("skipped a step" in str(warning.message) for warning in caught)
    after = everything(model.module, optimizer)
    assert after["optimizer"][0].pop("skipped") - before["optimizer"][0].pop("skipped") == 1
    assert_same(after, before)
    train(model, optimizer, 3, 6, own_share())
    return everything(model.module, optimizer)


def test_a_nan_on_one_ddp_rank_is_skipped_on_all():
    first, second = run(2, ddp_with_a_nan)
    assert_same(first, second)
    assert first["optimizer"][0]["skipped"] == 1
    assert first["optimizer"][0]["steps"] == 6
