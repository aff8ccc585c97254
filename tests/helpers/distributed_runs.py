"""What the tests on several ranks train: models made distributed in every way, their optimizers, and comparisons."""

import copy
import re
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

import lodo

LEAN = {"depth": 4, "expansion": 1}
PARTS = {
    "preconditioner": "log_diagonal",
    "base": "adam",
    "scale_lr": 0.05,
    "trace_decay": 0.9,
    "momentum_decays": (0.0, 0.9, 0.99),
}
OPTIONS = {"lr": 0.1, "meta_lr": 1e-2, "weight_decay": 0.01}


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def deeper_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3), nn.Linear(3, 3))


def train(model, optimizer, begin, end, share=slice(None)):
    """Steps `begin` to `end` on a batch of 16, of which this rank sees its share. A model may tell in `late` of
    parameters that have no gradient before some step."""
    for step in range(begin, end):
        x = torch.randn(16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))[share]
        x = x.to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        (model(x) - x[:, :3].sin()).square().mean().backward()
        for name, first in getattr(model, "late", {}).items():
            if step < first:
                model.get_parameter(name).grad = None
        optimizer.step()


def own_share(model=None):
    """The part of the batch that this rank sees, for a model that does not tell."""
    if not dist.is_initialized():
        return slice(None)
    return getattr(model, "share", slice(dist.get_rank(), None, dist.get_world_size()))


def everything(model, optimizer):
    """Parameters and all of the optimizer's state, by name, as copies."""
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]})


def assert_same(found, expected):
    """In every bit, whatever the order of the keys."""
    found, expected = (dict(pytree.tree_leaves_with_path(value)) for value in (found, expected))
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        same = torch.equal(found[path], value) if isinstance(value, torch.Tensor) else found[path] == value
        assert same, pytree.keystr(path)


def local(tensor):
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def local_or_same(value):
    return local(value) if isinstance(value, torch.Tensor) else value


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def assert_same_shards(model, optimizer, expected_model, expected):
    found, wanted = everything(model, optimizer), everything(expected_model, expected)
    assert_same(pytree.tree_map(type, found), pytree.tree_map(type, wanted))
    assert_same(pytree.tree_map(local_or_same, found), pytree.tree_map(local_or_same, wanted))


def fsdp(dtype=torch.float32, mesh=None):
    model = network(dtype)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def from_docs(name):
    """A function that docs/distributed.md shows."""
    text = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if f"def {name}(" in block)
    found = {}
    exec(code, found)
    return found[name]


def ddp_run():
    model = DistributedDataParallel(network(torch.float32))
    return model, lodo.LODO(model.parameters(), **OPTIONS)


def fsdp_run(**options):
    """Two groups, one of them of another kind, with counts and rounding that must go on where they were."""
    model = fsdp()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "preconditioner": "diagonal"}]
    settings = {"meta_every": 3, "meta_state_dtype": "bfloat16", "momentum_dtype": "bfloat16", **options}
    return model, lodo.LODO(groups, **OPTIONS, **settings)


def parts_run():
    model = fsdp()
    return model, lodo.LODO(model.parameters(), **OPTIONS, **PARTS)


def late_run():
    """The call that wants no tuning, where two parameters join late, one of them after the first 8 steps."""
    model = fsdp()
    model.late = {"0.bias": 3, "2.weight": 11}
    return model, lodo.AutoLODO(model.parameters(), weight_decay=0.01)


def auto_run():
    model = fsdp()
    return model, lodo.AutoLODO(model.parameters(), average_share=0.5)


def ddp_auto_run():
    model = DistributedDataParallel(network(torch.float32))
    return model, lodo.AutoLODO(model.parameters(), average_share=0.5)


def whole_run(**options):
    """Whole tensors with one owner each, averages, a parameter without a gradient before step 3."""
    model = fsdp()
    model.late = {"2.bias": 3}
    return model, lodo.AutoLODO(model.parameters(), sharding="whole", average_share=0.5, **options)


def whole_hsdp_run():
    model, _ = hsdp_run()
    return model, lodo.AutoLODO(model.parameters(), sharding="whole", average_share=0.5)


def whole_two_dimensional_run():
    model, _ = two_dimensional_run()
    return model, lodo.AutoLODO(model.parameters(), sharding="whole", average_share=0.5)


def late_adam_run():
    """The same without eigenbases."""
    model, _ = late_run()
    return model, lodo.AutoLODO(model.parameters(), base="adam", weight_decay=0.01)


def hsdp_run():
    model = fsdp(mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return model, lodo.LODO(model.parameters(), **OPTIONS, **LEAN)


def hsdp_auto_run():
    model, _ = hsdp_run()
    return model, lodo.AutoLODO(model.parameters())


def two_dimensional_run():
    """Tensor parallelism within pairs of ranks, FSDP2 across: four kinds of sharding, which make three groups."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = deeper_network()
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    model.share = slice(mesh.get_local_rank("dp"), None, 2)
    return model, lodo.LODO(model.parameters(), **OPTIONS)


def two_dimensional_auto_run():
    """The same with the call that wants no tuning, and averages."""
    model, _ = two_dimensional_run()
    return model, lodo.AutoLODO(model.parameters(), average_share=0.5)


def frozen_run():
    """The first layer is frozen, and the optimizer has it."""
    model = network(torch.float32)
    model[0].requires_grad_(False)
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    return model, lodo.LODO(model.parameters(), **OPTIONS)


def zero_run():
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns, which the tests' own process forbids

    model = DistributedDataParallel(network(torch.float32))
    settings = {"meta_every": 3, "meta_state_dtype": "bfloat16", "momentum_dtype": "bfloat16"}
    return model, ZeroRedundancyOptimizer(model.parameters(), optimizer_class=lodo.LODO, **OPTIONS, **settings)


def fsdp1(use_orig_params):
    layers = [fsdp1_of(layer, use_orig_params) if len(list(layer.parameters())) else layer for layer in network()]
    return fsdp1_of(nn.Sequential(*layers), use_orig_params)


def fsdp1_of(module, use_orig_params):
    return FullyShardedDataParallel(module, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


def bfloat16_run():
    model = fsdp(torch.bfloat16)
    return model, lodo.LODO(model.parameters(), permutation="shuffle", **OPTIONS)


def one_group_run():
    model = fsdp()
    return model, lodo.LODO(model.parameters(), **OPTIONS)


def plain_run():
    model = network(torch.float32)
    return model, lodo.LODO(model.parameters(), **OPTIONS)
