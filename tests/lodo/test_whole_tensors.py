"""Whole tensors on several ranks (`sharding="whole"`): what one process does, whatever the number of ranks."""

import copy
import math
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lodo
from lodo import scalars
from lodo.state.owners import owners_of
from lodo.state.sharding import slices_on
from tests.helpers.distributed_runs import assert_same, whole
from tests.helpers.ranks import run


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        q, k, v = self.mix(self.norm1(x)).unsqueeze(1).chunk(3, dim=-1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Sides of 10, 7, 14, 21: most shards are uneven, some are empty."""

    def __init__(self, width=7):
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(1))
        self.head = nn.Linear(width, 10)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.gain


def transformer(dtype=torch.float64, kind=None):
    """On one process, or sharded: "fsdp", "hsdp" or "tp", the last with tensor parallelism of the linear layers."""
    torch.manual_seed(0)
    model = Transformer().to(dtype)
    model.share = slice(None)
    if kind is None:
        return model
    ranks = dist.get_world_size()
    if kind == "fsdp":
        mesh, model.share = init_device_mesh("cpu", (ranks,)), slice(dist.get_rank(), None, ranks)
    else:
        whole_mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("first", "second"))
        mesh = whole_mesh if kind == "hsdp" else whole_mesh["first"]
        model.share = slice(dist.get_rank(), None, ranks)
        if kind == "tp":
            model.share = slice(whole_mesh.get_local_rank("first"), None, 2)
            for block in model.blocks:
                parallelize_module(block, whole_mesh["second"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model, optimizer, begin, end):
    """Steps on a batch of 32 sequences, of which this rank sees its share. One parameter has no gradient in every
    third step."""
    losses = []
    for step in range(begin, end):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(10, (32, 6), generator=generator)[model.share]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        if step % 3 == 1:
            model.get_parameter("head.bias").grad = None
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def everything(model, optimizer):
    """Parameters and all state, whole, by name."""
    names = [name for name, _ in model.named_parameters()]
    order = {id(p): name for name, p in model.named_parameters()}
    params = [order[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(params) == sorted(names)
    saved = optimizer.state_dict()["state"]
    state = {name: {key: whole(value) for key, value in saved[i].items()} for i, name in enumerate(params)}
    return {"model": {name: whole(p) for name, p in model.named_parameters()}, "state": state}


OPTIONS = {
    "plain": {},
    "decay": {"weight_decay": 0.1, "max_step_norm": 0.02, "average_share": 0.2},
    "adam": {"base": "adam"},
}


def trained(kind, name, steps, dtype=torch.float64, step=None):
    """A model and its optimizer after some steps, by `step` if that is given."""
    model = transformer(dtype, kind)
    optimizer = lodo.AutoLODO(model.parameters(), sharding="whole", **OPTIONS[name])
    if step is None:
        train(model, optimizer, 0, steps)
    for count in range(0 if step is None else steps):
        step(model, optimizer, count)
    return model, optimizer


def results(kind, names, steps):
    return [everything(*trained(kind, name, steps)) for name in names]


KINDS = [(2, "fsdp"), (4, "fsdp"), (4, "hsdp"), (4, "tp")]


@pytest.mark.parametrize(
    ("world", "kind", "name"), [(2, "fsdp", "plain"), (4, "hsdp", "decay"), (4, "tp", "plain")], ids=str
)
def test_a_training_is_that_of_one_process(world, kind, name):
    """But for the rounding of the gradients, which ranks sum."""
    expected = results(None, [name], 100)
    for found in run(world, results, kind, [name], 100):
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(own["model"], other["model"], rtol=0, atol=1e-9)
            torch.testing.assert_close(own["state"], other["state"], rtol=0, atol=1e-6)


def sharded_like(p, g):
    """Not by `distribute_tensor`, which wants even shards under tensor parallelism."""
    part = g[slices_on(p.shape, p.placements, p.device_mesh, p.device_mesh.get_coordinate())]
    return DTensor.from_local(part.contiguous(), p.device_mesh, p.placements, shape=p.shape, stride=p.stride())


def step_on_given_gradients(model, optimizer, count):
    """Gradients that do not come from the model: alike on one process and on any number of ranks, to the last bit."""
    generator = torch.Generator().manual_seed(count)
    for index, p in enumerate(model.parameters()):
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        p.grad = None
        if (count + index) % 5:
            p.grad = sharded_like(p, g) if isinstance(p, DTensor) else g
    optimizer.step()


def results_on_given_gradients(kind, names):
    return [everything(*trained(kind, *case, step_on_given_gradients)) for case in cases_of(names)]


def cases_of(names):
    return [(name, 15, dtype) for name in names for dtype in (torch.float64, torch.bfloat16)]


@pytest.mark.parametrize(("world", "kind"), KINDS)
def test_the_same_gradients_make_the_same_steps(world, kind):
    """To the last bit where nothing is multiplied by matrices, in batches of as many as the owner has."""
    names = ["plain", "adam"]
    expected = results_on_given_gradients(None, names)
    for found in run(world, results_on_given_gradients, kind, names):
        assert_same(found[2:], expected[2:])
        torch.testing.assert_close(found[0]["model"], expected[0]["model"], rtol=0, atol=1e-7)
        torch.testing.assert_close(found[1]["model"], expected[1]["model"], rtol=1e-2, atol=1e-6)


# ---- who owns what, and what is exchanged ----------------------------------------------------------------------------


def test_owners_have_about_as_much_to_do_and_keep_what_they_have():
    shapes = [torch.Size(shape) for shape in [(512, 512)] * 6 + [(2048, 512), (512, 2048)] + [(512,)] * 9]
    owners = owners_of(shapes, 4)
    elements = [sum(shape.numel() for shape, owner in zip(shapes, owners, strict=True) if owner == i) for i in range(4)]
    assert max(elements) <= 1.6 * min(elements)
    assert owners_of([torch.Size((20,)), torch.Size((30,))], 2, {0: 1}) == [1, 0]
    assert sorted(owners_of([torch.Size((600,)), torch.Size((600,))], 2)) == [0, 1]


def sent_in_a_step():
    """Bytes that this rank sends to others in a step, and elements that it has of the parameters."""
    model, optimizer = trained("fsdp", "plain", 1, torch.float32)
    sent = []
    original = dist.all_to_all_single

    def counting(received, packed, received_sizes, sent_sizes, **options):
        sent.append(sum(size for rank, size in enumerate(sent_sizes) if rank != dist.get_rank()))
        return original(received, packed, received_sizes, sent_sizes, **options)

    dist.all_to_all_single = counting
    try:
        train(model, optimizer, 1, 3)
    finally:
        dist.all_to_all_single = original
    assert len(sent) == 4  # there and back, twice
    return sum(sent[2:]), sum(p.to_local().numel() for p in model.parameters())


def test_all_ranks_together_send_parameters_and_gradients_there_and_parameters_back():
    found = run(4, sent_in_a_step)
    elements = sum(p.numel() for p in transformer(torch.float32).parameters())
    assert sum(own for _, own in found) == elements
    assert sum(sent for sent, _ in found) == pytest.approx(0.75 * 3 * 4 * elements, rel=0.1)


def few_parameters():
    """Ranks that own nothing, parameters with nothing on some ranks, and vectors that share a basis."""
    found = []
    for shapes in ([(3, 2)], [(2,)], [(5,), (1,), ()], [(2, 3, 2), (0, 4)]):
        plain = [torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).reshape(shape) for shape in shapes]
        runs = []
        for mesh in (None, init_device_mesh("cpu", (4,))):
            params = [nn.Parameter(x.clone() if mesh is None else distributed(x, mesh)) for x in plain]
            optimizer = lodo.AutoLODO(params, sharding="whole", average_share=0.5)
            for step in range(20):
                for p, x in zip(params, plain, strict=True):
                    g = (x * step).cos()
                    p.grad = g if mesh is None else distributed(g, mesh)
                optimizer.step()
            optimizer.eval()
            shown = [whole(p) for p in params]
            params, optimizer = loaded_and_copied(params, optimizer)
            optimizer.train()
            optimizer.param_groups[0].update(average_share=None, trace_decay=0.0)  # what there is of them stays
            for _ in range(2):
                for p, x in zip(params, plain, strict=True):
                    p.grad = x.sin() if mesh is None else distributed(x.sin(), mesh)
                optimizer.step()
            params, optimizer = loaded_and_copied(params, optimizer)
            saved = optimizer.state_dict()["state"]
            state = [{key: whole(value) for key, value in saved[i].items()} for i in range(len(params))]
            runs.append([shown, [whole(p) for p in params], state])
        found.append(runs)
    return found


def loaded_and_copied(params, optimizer):
    """A copy of parameters and optimizer, which has loaded the state of that."""
    for p in params:
        p.grad = None
    saved = optimizer.state_dict()
    found, other = copy.deepcopy((params, optimizer))
    other.load_state_dict(saved)
    return copy.deepcopy((found, other))


def distributed(x, mesh):
    return distribute_tensor(x.clone(), mesh, [Shard(0) if x.dim() > 0 else Replicate()])


def test_a_rank_may_own_nothing():
    for found in run(4, few_parameters):
        for own, expected in found:
            assert_same(expected, own)


# ---- what goes on between steps --------------------------------------------------------------------------------------


def habits():
    """What people do to parameters and gradients between steps; each with what one process makes of it."""
    found = {}
    for kind in ("fsdp", None):
        if kind is None and dist.get_rank() > 0:
            continue
        model, optimizer = trained(kind, "decay", 5, step=step_on_given_gradients)
        with torch.no_grad():
            model.head.weight.clamp_(-0.01, 0.01)
            model.blocks[0].up.weight.data.mul_(0.5)
        step_on_given_gradients(model, optimizer, 5)
        optimizer.param_groups[0]["lr"] = 3e-4
        step_on_given_gradients(model, optimizer, 6)
        with optimizer.averaged(model):
            found["averages", kind] = {name: whole(p) for name, p in model.named_parameters()}
            assert optimizer.is_at_averages
            with pytest.raises(RuntimeError, match="averages"):
                optimizer.step()
        assert not optimizer.is_at_averages
        optimizer.reset()
        figures = optimizer.diagnostics()[0]
        assert min(figures[name] for name in ("step_norm", "gradient_norm", "scale_max")) > 0
        for count in range(7, 12):
            step_on_given_gradients(model, optimizer, count)
        found["end", kind] = everything(model, optimizer)["model"]
    return found


def test_what_people_do_between_steps_is_seen():
    found = run(2, habits)
    for name in ("averages", "end"):
        for each in found:
            torch.testing.assert_close(each[name, "fsdp"], found[0][name, None], rtol=0, atol=1e-8)


def bad_gradients():
    model, optimizer = trained("fsdp", "plain", 3)
    before = everything(model, optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    if dist.get_rank() == 1:
        model.blocks[0].up.weight.grad.to_local().fill_(math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the skipped step
        optimizer.step()
    after = everything(model, optimizer)
    assert all(int(entry.pop("skipped_steps")) == 1 for entry in after["state"].values())
    assert all(int(entry.pop("skipped_steps")) == 0 for entry in before["state"].values())
    assert_same(after, before)
    for p in model.parameters():  # one rank alone has gradients, of a part of the parameters
        p.grad = None
    if dist.get_rank() == 0:
        model.head.weight.grad = torch.ones_like(model.head.weight)
    optimizer.step()
    moved = whole(model.head.weight) - before["model"]["head.weight"]
    alone, other = trained(None, "plain", 3)
    for p in alone.parameters():
        p.grad = None
    start = whole(alone.head.weight)
    alone.head.weight.grad = torch.zeros_like(start)
    alone.head.weight.grad[:5] = 1  # the rows of that rank
    other.step()
    torch.testing.assert_close(moved, whole(alone.head.weight) - start, rtol=0, atol=1e-9)
    assert not torch.equal(whole(model.head.weight), before["model"]["head.weight"])
    assert torch.equal(whole(model.gain), before["model"]["gain"])
    return int(after["state"]["gain"]["step"])


def test_a_nan_on_one_rank_is_skipped_by_all_and_a_gradient_that_one_lacks_is_zero_there():
    assert run(2, bad_gradients) == [3, 3]


def refusals():
    params = [nn.Parameter(distributed(torch.ones(4, 2), init_device_mesh("cpu", (2,))))]
    for options in ({"preconditioner": "block_permutation"}, {"preconditioner": "diagonal"}, {"capturable": True}):
        with pytest.raises(ValueError, match="sharding must be 'local'"):
            lodo.LODO(params, sharding="whole", **{**lodo.RECOMMENDED, "base": "adam", **options})
    with pytest.raises(ValueError, match="sharding must be one of 'local', 'whole', got 'all'"):
        lodo.AutoLODO(params, sharding="all")
    optimizer = lodo.AutoLODO(params, sharding="whole")
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    optimizer.param_groups[0]["sharding"] = "local"
    with pytest.raises(ValueError, match="sharding must stay 'whole'"):
        optimizer.step()
    return True


def test_what_it_cannot_do_is_refused():
    assert run(2, refusals) == [True, True]


# ---- each kind of use, beside one process with the same gradients ----------------------------------------------------


def mixed(kind):
    """Two dtypes in one group, a frozen parameter, a group of its own with another lr, an lr that is a tensor."""
    shapes = [((6, 4), torch.float32), ((4, 6), torch.float64), ((5, 3), torch.bfloat16), ((7,), torch.float32)]
    mesh = None if kind is None else init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    for index, (shape, dtype) in enumerate(shapes * 2):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(index)).to(dtype)
        found.append(nn.Parameter(x if mesh is None else distributed(x, mesh), requires_grad=index != 3))
    return found, mesh


def step_mixed(params, optimizer, count, keys=None, closure=None):
    for key, p in zip(keys or range(len(params)), params, strict=True):
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * count + key)).to(p.dtype)
        g = sharded_like(p, g) if isinstance(p, DTensor) else g
        p.grad = g if p.requires_grad and (key + count) % 4 else None
    return optimizer.step(closure)


def uses(kind):
    """Parameters after all that people do with optimizers, and how many groups there are."""
    params, mesh = mixed(kind)
    lr = torch.tensor(2e-3)
    groups = [{"params": params[:5], "maximize": True}, {"params": params[5:], "lr": lr}]
    optimizer = lodo.AutoLODO(groups, base="adam", sharding="whole")
    for count in range(6):
        assert step_mixed(params, optimizer, count, closure=lambda: 3.0) == 3.0
    lr.fill_(1e-3)
    optimizer.param_groups[0]["average_share"] = 0.5
    for count in range(6, 9):
        step_mixed(params, optimizer, count)
    keys = list(range(len(params)))
    x = torch.ones(3, 4)
    params.append(nn.Parameter(x if mesh is None else distributed(x, mesh)))
    keys.append(20)
    optimizer.add_param_group({"params": params[-1:]})
    for place in (1, 2, 5):  # exchanged: these start anew, and the others go on
        group = next(group for group in optimizer.param_groups if any(p is params[place] for p in group["params"]))
        new = nn.Parameter(params[place].detach().clone())
        group["params"] = [new if p is params[place] else p for p in group["params"]]
        optimizer.state.pop(params[place], None)
        params[place] = new
    for count in range(9, 12):
        step_mixed(params, optimizer, count, keys)
    optimizer.eval()
    for p in params:
        p.grad = None
    params, optimizer = copy.deepcopy((params, optimizer))
    averages = [whole(p) for p in params]
    assert optimizer.is_at_averages
    optimizer.train()
    for count in range(12, 16):
        step_mixed(params, optimizer, count, keys)
    optimizer.param_groups[0]["average_share"] = None
    saved = optimizer.state_dict()
    for p in params:  # torch cannot copy gradients that are DTensors
        p.grad = None
    again, other = copy.deepcopy((params, optimizer))
    other.load_state_dict(saved)
    step_mixed(again, other, 16, keys)
    step_mixed(params, optimizer, 16, keys)
    for p, q in zip(params, again, strict=True):
        assert torch.equal(whole(p), whole(q))
    return averages, [whole(p) for p in params]


def uses_on_ranks():
    return uses("fsdp")


@pytest.mark.parametrize("world", [2, 4])
def test_all_kinds_of_use_are_as_on_one_process(world):
    expected = uses(None)
    for found in run(world, uses_on_ranks):
        for own, other in zip(found, expected, strict=True):
            assert_same(list(own), list(other))


def with_scalars_on_the_device(kind, names):
    """As on an accelerator."""
    os.environ["LODO_NATIVE"] = "0"
    readable = scalars.is_readable
    scalars.is_readable = lambda tensor: False
    try:
        return results_on_given_gradients(kind, names)
    finally:
        scalars.is_readable = readable
        del os.environ["LODO_NATIVE"]


def test_scalars_may_be_on_the_device():
    expected = with_scalars_on_the_device(None, ["plain", "adam"])
    for found in run(2, with_scalars_on_the_device, "fsdp", ["plain", "adam"]):
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(own["model"], other["model"], rtol=1e-2, atol=1e-6)
        torch.testing.assert_close(found[2]["model"], expected[2]["model"], rtol=0, atol=1e-12)
