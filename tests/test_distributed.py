"""Training on several ranks: DistributedDataParallel, sharded parameters (FSDP2, HSDP, tensor parallelism)."""

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from oracle import KINDS
from ranks import run
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

import lodo

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


def local(tensor):
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


class Twin:
    """An ordinary LODO on copies of this rank's shards, which is given the gradients that the sharded one saw."""

    def __init__(self, params, **options):
        self.originals = list(params)
        self.params = [nn.Parameter(local(p).clone()) for p in self.originals]
        self.optimizer = lodo.LODO(self.params, **options)

    def step(self):
        for p, original in zip(self.params, self.originals, strict=True):
            p.grad = None if original.grad is None else local(original.grad).clone()
        if all(p.numel() == 0 for p in self.params):
            return
        self.optimizer.step()

    def assert_same(self, optimizer):
        """Parameters and state agree in every bit; what is kept for the group is this rank's, padded with zeros."""
        for p, original in zip(self.params, self.originals, strict=True):
            assert torch.equal(p, local(original))
            if p.numel() > 0:
                assert type(optimizer.state[original]["momentum"]) is type(original.data)
                assert torch.equal(self.optimizer.state[p]["momentum"], local(optimizer.state[original]["momentum"]))
        expected = self.optimizer.state[self.params[0]]
        found = optimizer.state[self.originals[0]]
        suffix = f"_in_{int(found['shards'])}_shards" if "shards" in found else ""
        for name, value in expected.items():
            if name not in ("momentum", "format"):
                kept = local(found[name + suffix])
                assert kept.dtype == value.dtype
                assert torch.equal(kept.flatten()[: value.numel()], value.flatten()), name
                assert not kept.flatten()[value.numel() :].any()


def fsdp(dtype=torch.float32, mesh=None):
    model = network(dtype)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


OPTIONS = {"lr": 0.1, "meta_lr": 1e-2, "weight_decay": 0.01}


def fsdp_and_twin(cases):
    """The layers have 7 and 3 rows: shards are uneven, and on 4 ranks the last has nothing of the second layer."""
    for options in cases:
        model = fsdp(options.pop("dtype", torch.float32))
        groups = [list(model[0].parameters()), list(model[2].parameters())]
        optimizer = lodo.LODO([{"params": group} for group in groups], **{**OPTIONS, **options})
        twins = [Twin(group, **{**OPTIONS, **options}) for group in groups]
        for step in range(12):
            optimizer.zero_grad()
            x = torch.randn(8, 5, dtype=next(model.parameters()).dtype)
            (model(x) - x[:, :3].sin()).square().mean().backward()
            if step == 5:
                model[2].bias.grad = None
            optimizer.step()
            for twin in twins:
                twin.step()
        for twin in twins:
            twin.assert_same(optimizer)
        assert optimizer.skipped_steps == 0
        begin = network(next(model.parameters()).dtype)
        assert not torch.equal(model[0].weight.detach().full_tensor(), begin[0].weight)


@pytest.mark.parametrize("world", [2, 4])
def test_fsdp_is_a_separate_optimizer_for_each_shard(world):
    cases = [{"preconditioner": kind} for kind in KINDS]
    cases += [
        {"permutation": "shuffle", "expansion": 1.5, "block_size": 3, "meta_optimizer": "sgd"},
        {"meta_state_dtype": "bfloat16", "momentum_dtype": "bfloat16", "meta_every": 2},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64, "maximize": True},
        {"meta_lr": 0.0},
    ]
    run(world, fsdp_and_twin, cases)


def one_rank_has_nothing(kind):
    """One row on two ranks: all that the second has is empty, and it keeps the same entries of the state, of the same
    sizes, so that ranks can exchange them."""
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(5, 1))
    optimizer = lodo.LODO(model.parameters(), preconditioner=kind, **OPTIONS)
    twin = Twin(model.parameters(), preconditioner=kind, **OPTIONS)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        twin.step()
    if dist.get_rank() == 0:
        twin.assert_same(optimizer)
    else:
        assert all(p.numel() == 0 for p in twin.params)
    assert optimizer.skipped_steps == 0
    entry = optimizer.state[model.weight]
    kept = {name: local(value) for name, value in entry.items() if name not in ("momentum", "format", "shards")}
    assert all(value.isfinite().all() for value in kept.values())
    return {name: value.shape for name, value in kept.items()}


def nothing_for_each_kind():
    return [one_rank_has_nothing(kind) for kind in KINDS]


def test_a_rank_may_have_nothing_of_a_group():
    first, second = run(2, nothing_for_each_kind)
    assert first == second


def mixtures():
    mesh = init_device_mesh("cpu", (2,))
    x = torch.arange(15.0).reshape(5, 3) / 10

    def made(*placements):
        return nn.Parameter(distribute_tensor(x, mesh, placements))

    plain, replicated = nn.Parameter(x.clone()), made(Replicate())
    optimizer, twin = lodo.LODO([plain, replicated], **OPTIONS), Twin([plain, replicated], **OPTIONS)
    rows, columns = made(Shard(0)), made(Shard(1))
    sharded, sharded_twin = lodo.LODO([rows, columns], **OPTIONS), Twin([rows, columns], **OPTIONS)
    for _ in range(5):
        plain.grad = plain.detach().sin()
        for p in (replicated, rows, columns):
            p.grad = p.detach().sin()
        # As tensor parallelism may leave it: each rank has a part of the sum.
        half = DTensor.from_local(local(replicated).sin() / 2, mesh, [Partial()])
        replicated.grad = half if len(optimizer.state) else replicated.grad
        optimizer.step()
        replicated.grad = replicated.grad.redistribute(placements=[Replicate()])
        twin.step(), sharded.step(), sharded_twin.step()
    twin.assert_same(optimizer)
    sharded_twin.assert_same(sharded)
    for group in ([plain, rows], [replicated, rows]):
        with pytest.raises(ValueError, match="make one group for each"):
            lodo.LODO(group)
    with pytest.raises(ValueError, match="pending sums"):
        lodo.LODO([nn.Parameter(DTensor.from_local(x, mesh, [Partial()]))])
    with pytest.raises(ValueError, match=r"one of .block_permutation., .* for sharded parameters, got BlockPerm"):
        lodo.LODO([rows], preconditioner=sharded.preconditioners[0])
    return local(replicated)


def test_groups_may_mix_what_is_sharded_over_the_same_ranks():
    first, second = run(2, mixtures)
    assert torch.equal(first, second)


def zero(steps):
    """ZeroRedundancyOptimizer next to ordinary optimizers on the parameters that it gives to each rank."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns, which the tests' own process forbids

    model = DistributedDataParallel(network())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=lodo.LODO, **OPTIONS)
    twin = network()
    numbers = {p: i for i, p in enumerate(model.parameters())}
    originals, copies = list(model.parameters()), list(twin.parameters())
    owned = [[numbers[p] for group in part for p in group["params"]] for part in optimizer._partition_parameters()]
    twins = [lodo.LODO([copies[i] for i in part], **OPTIONS) for part in owned]
    for step in range(steps):
        train(model, optimizer, step, step + 1, own_share())
        for p, original in zip(copies, originals, strict=True):
            p.grad = original.grad.clone()
        for other in twins:
            other.step()
    assert_same([p.detach() for p in originals], [p.detach() for p in copies])
    assert optimizer.optim.preconditioners[0].size == sum(copies[i].numel() for i in owned[dist.get_rank()])
    return [p.detach() for p in originals]


def test_zero_redundancy_optimizer_gives_each_rank_a_network_for_its_parameters():
    first, second = run(2, zero, 10)
    assert_same(first, second)


def sharded_nan():
    mesh = init_device_mesh("cpu", (2,))
    x = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    optimizer = lodo.LODO([x], **OPTIONS)
    x.grad = x.detach().sin()
    optimizer.step()
    before = copy.deepcopy((local(x), dict(optimizer.state[x])))
    bad = torch.ones(4, 3)
    bad[3, 1] = float("nan")  # in the second rank's shard
    x.grad = distribute_tensor(bad, mesh, [Shard(0)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    return torch.equal(local(x), before[0]), optimizer.skipped_steps


def test_a_nan_is_skipped_by_the_rank_that_has_it_in_its_shard():
    assert run(2, sharded_nan) == [(False, 0), (True, 1)]


def nan_next_to_a_replica():
    """As with tensor parallelism: one group is sharded, the other the same on both ranks."""
    mesh = init_device_mesh("cpu", (2,))
    x, y = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])), nn.Parameter(torch.ones(3))
    optimizer = lodo.LODO([{"params": [x]}, {"params": [y]}], **OPTIONS)
    for _ in range(3):
        x.grad, y.grad = x.detach().sin(), y.detach().sin()
        if dist.get_rank() == 1:
            local(x.grad)[0, 0] = float("nan")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    return local(x), y.detach()


def test_a_nan_in_a_shard_does_not_move_replicas_of_another_group_apart():
    (first, first_replica), (second, second_replica) = run(2, nan_next_to_a_replica)
    assert torch.equal(first_replica, second_replica)
    assert (first_replica < 1).all()
    assert (first < 1).all()
    assert torch.equal(second, torch.ones(2, 3))


def clipped_nan():
    model = fsdp()
    optimizer = lodo.LODO(model.parameters(), **OPTIONS)
    train(model, optimizer, 0, 2, own_share())
    before = [local(p).clone() for p in model.parameters()]
    model(torch.ones(2, 5)).sum().backward()
    if dist.get_rank() == 1:
        local(model[0].weight.grad)[0, 0] = float("nan")
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    return all(
        torch.equal(local(p), q) for p, q in zip(model.parameters(), before, strict=True)
    ), optimizer.skipped_steps


def test_gradient_clipping_carries_a_nan_to_all_ranks():
    assert run(2, clipped_nan) == [(True, 1), (True, 1)]


def hsdp(steps):
    model = fsdp(mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    optimizer = lodo.LODO(model.parameters(), **OPTIONS, **LEAN)
    train(model, optimizer, 0, steps, own_share())
    found = {f"parameter {i}": local(p) for i, p in enumerate(model.parameters())}
    for i, entry in enumerate(optimizer.state.values()):
        found |= {f"{i} {name}": local(value) for name, value in entry.items() if isinstance(value, torch.Tensor)}
    return found


def test_hsdp_replicas_of_a_shard_stay_bit_identical():
    first, second, third, fourth = run(4, hsdp, 100)
    assert_same(first, third)
    assert_same(second, fourth)
    assert not torch.equal(first["0 theta_in_2_shards"], second["0 theta_in_2_shards"])


def test_importing_lodo_does_not_load_dtensors():
    code = "import sys, lodo; assert 'torch.distributed.tensor' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(Path(lodo.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def ddp_run():
    model = DistributedDataParallel(network(torch.float32))
    return model, lodo.LODO(model.parameters(), **OPTIONS)


def fsdp_run(**options):
    """Two groups, one of them of another kind, with counts and rounding that must go on where they were."""
    model = fsdp()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "preconditioner": "diagonal"}]
    settings = {"meta_every": 3, "meta_state_dtype": "bfloat16", "momentum_dtype": "bfloat16", **options}
    return model, lodo.LODO(groups, **OPTIONS, **settings)


def hsdp_run():
    model = fsdp(mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return model, lodo.LODO(model.parameters(), **OPTIONS, **LEAN)


def bfloat16_run():
    model = fsdp(torch.bfloat16)
    return model, lodo.LODO(model.parameters(), permutation="shuffle", **OPTIONS)


def one_group_run():
    model = fsdp()
    return model, lodo.LODO(model.parameters(), **OPTIONS)


def plain_run():
    model = network(torch.float32)
    return model, lodo.LODO(model.parameters(), **OPTIONS)


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
        dcp.load(template, checkpoint_id=folder, planner=planner)
        state = template["model"], template["optimizer"]
    # Not `set_state_dict`: it leaves the model alone on the ranks that pass nothing and wait for the broadcast.
    set_model_state_dict(model, state[0], options=options)
    set_optimizer_state_dict(model, optimizer, state[1], options=options)


def resumed(folder, make, options):
    """Trains, saves, goes on; loads into what another process would make, and goes on with that."""
    model, optimizer = make()
    train(model, optimizer, 0, 8, own_share())
    save(folder, model, optimizer, **options)
    other_model, other = make()
    load(folder, other_model, other, **options)
    assert_same_shards(other_model, other, model, optimizer)
    train(model, optimizer, 8, 16, own_share())
    train(other_model, other, 8, 16, own_share())
    assert_same_shards(other_model, other, model, optimizer)


def assert_same_shards(model, optimizer, expected_model, expected):
    found, wanted = everything(model, optimizer), everything(expected_model, expected)
    assert_same(pytree.tree_map(type, found), pytree.tree_map(type, wanted))
    assert_same(pytree.tree_map(local_or_same, found), pytree.tree_map(local_or_same, wanted))


WAYS = {
    "sharded": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True, "cpu_offload": True},
    "broadcast": {"full_state_dict": True, "cpu_offload": True, "broadcast_from_rank0": True},
}


def resumed_in_all_ways(folder, makers, ways):
    for make in makers:
        for name, options in ((name, WAYS[name]) for name in ways):
            path = folder / f"{make.__name__}-{name}"
            if dist.get_rank() == 0:
                path.mkdir()
            dist.barrier()
            resumed(path, make, options)


@pytest.mark.parametrize(
    ("world", "makers", "ways"),
    [(2, (ddp_run, fsdp_run), tuple(WAYS)), (2, (bfloat16_run,), ("sharded",)), (4, (hsdp_run,), ("sharded", "full"))],
)
def test_distributed_checkpoints_resume_bit_for_bit(tmp_path, world, makers, ways):
    run(world, resumed_in_all_ways, tmp_path, makers, ways)


def momenta(model, optimizer):
    return {name: whole(optimizer.state[p]["momentum"]) for name, p in model.named_parameters()}


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def saved_run(folder, make):
    """Leaves a sharded and a full checkpoint; returns parameters and momentum."""
    model, optimizer = make()
    train(model, optimizer, 0, 8)
    save(folder, model, optimizer)
    save(folder, model, optimizer, full_state_dict=True, cpu_offload=True)
    return {name: whole(p) for name, p in model.named_parameters()}, momenta(model, optimizer)


def resharded_run(folder, make, ways):
    """Loads both; returns parameters and momentum. Everything else is as in a new optimizer."""
    results = []
    for name in ways:
        model, optimizer = make()
        if name == "sharded":  # into one that has its own state
            train(model, optimizer, 0, 2)
        _, new = make()
        for group in new.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        new.step()
        planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(folder, model, optimizer, planner, **WAYS[name])
        assert sum("another number of shards" in str(warning.message) for warning in caught) == 1
        assert optimizer.param_groups[0]["meta_lr"] == OPTIONS["meta_lr"]
        for entry, fresh in zip(optimizer.state.values(), new.state.values(), strict=True):
            assert entry.keys() == fresh.keys()
            for key in entry.keys() - {"momentum"}:
                assert_same(local_or_same(entry[key]), local_or_same(fresh[key]))
        results.append(({name: whole(p) for name, p in model.named_parameters()}, momenta(model, optimizer)))
        train(model, optimizer, 8, 10)
        assert optimizer.skipped_steps == 0
    return results


def local_or_same(value):
    return local(value) if isinstance(value, torch.Tensor) else value


SHARDED, FULL = ("sharded",), ("full", "broadcast")


@pytest.mark.parametrize(
    ("worlds", "makers", "ways"),
    [
        ((4, 2), (fsdp_run, fsdp_run), SHARDED + FULL),
        ((2, 4), (fsdp_run, fsdp_run), SHARDED + FULL),
        # A full state that every rank reads cannot go from one process to shards: torch stops at the 0-dimensional
        # numbers, which shards keep otherwise.
        ((1, 2), (plain_run, one_group_run), (*SHARDED, "broadcast")),
        ((2, 1), (one_group_run, plain_run), SHARDED + FULL),
    ],
    ids=["4 to 2", "2 to 4", "1 to 2", "2 to 1"],
)
def test_another_number_of_shards_keeps_the_momentum_and_renews_the_networks(tmp_path, worlds, makers, ways):
    (expected, *_) = run(worlds[0], saved_run, tmp_path, makers[0])
    for results in run(worlds[1], resharded_run, tmp_path, makers[1], ways):
        for found in results:
            assert_same(found, expected)


def misfits(folder):
    """A sharded optimizer refuses, before anything has changed, what it cannot go on from."""
    model, optimizer = one_group_run()
    train(model, optimizer, 0, 2)
    before = everything(model, optimizer)
    saved = optimizer.state_dict()
    first = saved["state"][0]
    theta = first["theta_in_2_shards"]
    cases = {
        "theta_in_2_shards must be a DTensor": {"theta_in_2_shards": local(theta)},
        r"theta_in_2_shards has shape \(\d+,\)": {
            "theta_in_2_shards": DTensor.from_local(local(theta).repeat(2), theta.device_mesh, theta.placements)
        },
        "theta missing": {"theta_in_2_shards": None},
        "momentum is a plain tensor": {"momentum": whole(first["momentum"])},
        "format 99": {"format": 99},
    }
    for message, changes in cases.items():
        entry = {name: value for name, value in {**first, **changes}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict({**saved, "state": {**saved["state"], 0: entry}})
        assert_same(*(pytree.tree_map(local_or_same, seen) for seen in (everything(model, optimizer), before)))
    other = lodo.LODO(network(torch.float32).parameters())
    with pytest.raises(ValueError, match="its parameter is a plain tensor"):
        other.load_state_dict(saved)


def test_a_state_that_does_not_fit_the_shards_is_refused(tmp_path):
    run(2, misfits, tmp_path)
