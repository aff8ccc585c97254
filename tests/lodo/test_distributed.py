"""Training on several ranks: DDP, ZeRO, sharded parameters (FSDP2, HSDP, tensor parallelism, FSDP1)."""

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import lodo
from lodo.declarations import Kind
from lodo.state.layout import slots_of
from lodo.state.sharding import shapes_on_ranks
from tests.helpers.distributed_runs import (
    LEAN,
    OPTIONS,
    PARTS,
    assert_same,
    assert_same_shards,
    everything,
    fsdp,
    fsdp1,
    local,
    network,
    own_share,
    train,
    two_dimensional_run,
)
from tests.helpers.oracle import KINDS
from tests.helpers.ranks import run


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
    return [ddp_steps(steps, torch.float32, **each) for each in ({}, settings, PARTS, {**PARTS, "base": "soap"})]


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
    for entry, former in zip(after["optimizer"].values(), before["optimizer"].values(), strict=True):
        assert entry.pop("skipped_steps") - former.pop("skipped_steps") == 1
    assert_same(after, before)
    train(model, optimizer, 3, 6, own_share())
    return everything(model.module, optimizer)


def test_a_nan_on_one_ddp_rank_is_skipped_on_all():
    first, second = run(2, ddp_with_a_nan)
    assert_same(first, second)
    assert [int(entry["skipped_steps"]) for entry in first["optimizer"].values()] == [1] * 4
    assert [int(entry["step"]) for entry in first["optimizer"].values()] == [6] * 4


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
        """Parameters and state agree in every bit. What is shaped like a parameter is spread as that is; the rest is
        this rank's alone, padded with zeros. Two counts are there as plain numbers too."""
        slots = {slot.name: slot for slot in slots_of(self.optimizer.param_groups[0])}
        marks = {tuple(optimizer.state[p]["shards"].tolist()) for p in self.originals}
        assert len(marks) == 1
        shards = [count for count, _ in marks]
        for p, original in zip(self.params, self.originals, strict=True):
            assert torch.equal(p, local(original))
            if all(p.numel() == 0 for p in self.params):
                continue
            expected, found = self.optimizer.state[p], dict(optimizer.state[original])
            if shards != [1]:
                for name in {"step", "averaged"} & expected.keys():
                    assert torch.equal(found.pop(name), expected[name])
            for name, value in expected.items():
                if name == "shards":
                    kept = found.pop(name)
                elif slots[name].kind is Kind.ELEMENTS:
                    kept = found.pop(name)
                    lead = kept.dim() - original.dim()
                    assert type(kept) is type(original.data)
                    assert kept.shape == (*value.shape[:lead], *original.shape)
                    if isinstance(kept, DTensor):
                        moved = [Shard(at.dim + lead) if isinstance(at, Shard) else at for at in original.placements]
                        assert list(kept.placements) == moved
                    assert torch.equal(local(kept), value), name
                elif shards == [1]:
                    kept = found.pop(name)
                    assert type(kept) is torch.Tensor
                    assert torch.equal(kept, value), name
                else:
                    kept = found.pop(f"{name}_in_{shards[0]}_shards")
                    assert isinstance(kept, DTensor)
                    own = local(kept)
                    assert own.dim() == 1
                    assert torch.equal(own[: value.numel()], value.flatten()), name
                    assert not own[value.numel() :].any()
                assert kept.dtype == value.dtype
            assert found.keys() <= {"fsdp1_rank"}


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
            if step < 4:
                model[0].bias.grad = None
            if step == 8:
                for each in (optimizer, *(twin.optimizer for twin in twins if twin.optimizer.state)):
                    each.reset()
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
        PARTS,
        {**PARTS, "preconditioner": "identity", "max_step_norm": 0.1},
        {**PARTS, "preconditioner": "block_permutation", "momentum_dtype": "bfloat16"},
        {**PARTS, "base": "soap"},
        {**lodo.RECOMMENDED, "lr": 1e-2, "average_share": 0.2},
        {**lodo.RECOMMENDED, "dtype": torch.bfloat16},
    ]
    run(world, fsdp_and_twin, cases)


def one_rank_has_nothing(kind, base):
    """One row on two ranks: all that the second has is empty, and it keeps the same entries of the state, of the same
    sizes, so that ranks can exchange them."""
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(5, 1))
    options = {
        **OPTIONS,
        "preconditioner": kind,
        "base": base,
        "trace_decay": 0.5,
        "scale_lr": 0.01,
        "momentum_decays": (0.0, 0.9),
    }
    optimizer, twin = lodo.LODO(model.parameters(), **options), Twin(model.parameters(), **options)
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
    assert bool(optimizer.diagnostics()[0]) == (dist.get_rank() == 0)
    shapes = {}
    for i, (p, entry) in enumerate(optimizer.state.items()):
        assert entry["step"] == 5
        assert all(local(value).isfinite().all() for value in entry.values())
        for name, value in entry.items():
            of_elements = value.shape[value.dim() - p.dim() :] == p.shape
            shapes[f"{i} {name}"] = value.shape if of_elements else (value.shape, local(value).shape)
    return shapes


def nothing_for_each_kind():
    return [one_rank_has_nothing(kind, base) for base in (None, "adam", "soap") for kind in (*KINDS, "identity")]


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
    for group in ([plain, rows], [replicated, rows], [("a", replicated), ("b", rows)]):
        groups = lodo.LODO([{"params": group, "lr": 0.5}]).param_groups
        assert [each["params"][0] is rows for each in groups] == [False, True]
        assert [each["lr"] for each in groups] == [0.5, 0.5]
    assert [each["param_names"] for each in groups] == [["a"], ["b"]]
    optimizer = lodo.LODO([plain])
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": [rows, plain]})
    assert [each["params"] for each in optimizer.param_groups] == [[plain]]
    learned = lodo.BlockPermutation.start(15, lodo.LODO([plain]).defaults, torch.float32, torch.device("cpu"))
    fitting = nn.Parameter(x.clone())
    with pytest.raises(ValueError, match="not all sharded over the same ranks"):
        optimizer.add_param_group({"params": [fitting, rows], "preconditioner": learned})
    assert fitting not in optimizer.state
    assert len(optimizer.param_groups) == 1
    uneven = DTensor.from_local(torch.ones(2 + dist.get_rank(), 3), mesh, [Shard(0)], shape=(5, 3), stride=(3, 1))
    with pytest.raises(ValueError, match=r"must be those of torch\.chunk"):
        lodo.LODO([nn.Parameter(uneven)])
    optimizer.param_groups[0]["params"].append(rows)
    plain.grad = rows.grad = None
    rows.grad = rows.detach().sin()
    with pytest.raises(ValueError, match="make one group for each"):
        optimizer.step()
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


def two_dimensions():
    model, optimizer = two_dimensional_run()
    twins = [Twin(group["params"], **OPTIONS) for group in optimizer.param_groups]
    for step in range(8):
        train(model, optimizer, step, step + 1, own_share(model))
        for twin in twins:
            twin.step()
    for twin in twins:
        twin.assert_same(optimizer)
    sizes = [[local(p).numel() for p in group["params"]] for group in optimizer.param_groups]
    replicated = [local(p) for p in (model[2].bias, model[3].weight, model[3].bias)]
    return sizes, model.share.start, replicated


def test_fsdp_with_tensor_parallelism_is_a_separate_optimizer_for_each_part():
    found = run(4, two_dimensions)
    assert [share for _, share, _ in found] == [0, 0, 1, 1]
    assert [sizes for sizes, _, _ in found] == [[[10, 2, 8], [2], [6, 2]]] * 2 + [[[10, 2, 4], [1], [3, 1]]] * 2
    for first, second in (found[:2], found[2:]):  # the ranks between which tensor parallelism replicates
        assert_same(first[2], second[2])


def uneven_in_two_dimensions():
    """7 rows over 2 ranks of tensor parallelism and then over 3 of FSDP2: 4 and 3, then 2, 2, 0 and 1, 1, 1."""
    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    optimizer = lodo.AutoLODO(model.parameters())
    for p in model.parameters():  # torch cannot run such a model forward
        p.grad = DTensor.from_local(
            local(p).cos(), p.device_mesh, p.placements, shape=p.shape, stride=p.stride(), run_check=False
        )
    optimizer.step()
    return [list(shape) for (shape,) in shapes_on_ranks([model[0].weight])], list(local(model[0].weight).shape)


def test_the_shapes_of_all_shards_are_known_on_each_rank():
    found = run(6, uneven_in_two_dimensions)
    everywhere = found[0][0]
    assert all(shapes == everywhere for shapes, _ in found)
    assert sorted(everywhere) == sorted(map(list, {tuple(own) for _, own in found}))


def fsdp1_and_twin(use_orig_params):
    """In the end a NaN in one rank's shard, next to a group that both ranks have."""
    model, replica = fsdp1(use_orig_params), nn.Parameter(torch.ones(3))
    params = list(model.parameters())
    optimizer = lodo.LODO([{"params": params}, {"params": [replica]}], **OPTIONS)
    twin = Twin(params, **OPTIONS)
    optimizer.register_step_pre_hook(lambda *_: setattr(replica, "grad", replica.detach().sin()))
    for step in range(8):
        train(model, optimizer, step, step + 1, own_share())
        twin.step()
    twin.assert_same(optimizer)
    with pytest.raises(ValueError, match=r"a plain tensor, a tensor of FullyShardedDataParallel"):
        lodo.LODO([*params, replica])
    if dist.get_rank() == 1:
        bad = torch.full_like(params[0], float("nan"))
        optimizer.register_step_pre_hook(lambda *_: setattr(params[0], "grad", bad))
    before = replica.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, optimizer, 8, 9, own_share())
    skipped = [int(optimizer.state[group["params"][0]]["skipped_steps"]) for group in optimizer.param_groups]
    return skipped, replica.detach(), not torch.equal(before, replica)


def fsdp1_in_both_ways():
    return [fsdp1_and_twin(use_orig_params) for use_orig_params in (True, False)]


def test_fsdp1_is_a_separate_optimizer_for_each_rank_and_moves_no_replicas_apart():
    for first, second in zip(*run(2, fsdp1_in_both_ways), strict=True):
        assert first[0] == [0, 0]
        assert second[0] == [1, 0]
        assert torch.equal(first[1], second[1])
        assert first[2]
        assert second[2]


def built_on_meta(comes_first):
    """A model whose parameters get their data after `fully_shard`, with an optimizer made before or after that."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    optimizer = lodo.LODO(model.parameters(), **OPTIONS) if comes_first else None
    if comes_first:
        with pytest.raises(RuntimeError, match="parameters without data"):
            optimizer.step()
    model.to_empty(device="cpu")
    expected = fsdp()
    with torch.no_grad():
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            local(p).copy_(local(q))
    optimizer = optimizer or lodo.LODO(model.parameters(), **OPTIONS)
    other = lodo.LODO(expected.parameters(), **OPTIONS)
    train(model, optimizer, 0, 5, own_share())
    train(expected, other, 0, 5, own_share())
    assert_same_shards(model, optimizer, expected, other)
    assert not torch.equal(local(model[0].weight), local(fsdp()[0].weight))


def built_on_meta_both_ways():
    for comes_first in (True, False):
        built_on_meta(comes_first)


def test_sharded_models_may_be_built_on_meta():
    run(2, built_on_meta_both_ways)


def test_an_optimizer_of_parameters_that_stay_on_meta_refuses_to_step():
    with torch.device("meta"):
        model = nn.Linear(5, 3)
    optimizer = lodo.LODO(model.parameters())
    model.to_empty(device="cpu")  # gives the module other parameters
    model(torch.ones(2, 5)).sum().backward()
    with pytest.raises(RuntimeError, match="make the optimizer after `to_empty`"):
        optimizer.step()
    assert not optimizer.state


def test_importing_lodo_does_not_load_dtensors():
    code = "import sys, lodo; assert 'torch.distributed.tensor' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(Path(lodo.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
