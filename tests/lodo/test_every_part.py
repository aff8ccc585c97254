"""What every part must pass, whatever it does: a new one is a row of ROWS."""

import copy
import inspect
import math

import pytest
import torch
from torch import nn

import lodo
from lodo.options import OPTIONS
from lodo.parts import PARTS, parts_of
from tests.helpers.distributed_runs import fsdp, own_share, train
from tests.helpers.ranks import run
from tests.helpers.states import assert_same, through_file

ROWS = {
    "SecondMoment": {"base": "adam"},
    "Eigenbasis": {"base": "soap"},
    "TensorScale": {"scale_lr": 0.03},
    "Momentum": {"trace_decay": 0.9},
    "Mixture": {"momentum_decays": (0.0, 0.9, 0.99)},
    "Average": {"average_share": 0.3},
}
TOGETHER = {name: value for name, value in lodo.RECOMMENDED.items() if name not in ("lr", "preconditioner")}
ALONE = [(name, kind, options) for name, options in ROWS.items() for kind in ("log_diagonal", "block_permutation")]
CASES = [*ALONE, *((f"all and {name}", "log_diagonal", {**TOGETHER, **options}) for name, options in ROWS.items())]
every_part = pytest.mark.parametrize(("kind", "options"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
every_kernel = pytest.mark.parametrize("native", ["1", "0"])
SHAPES = ((5, 3), (4,), (), (2, 3, 2))


@pytest.fixture(autouse=True)
def _kernels(request, monkeypatch):
    if "native" in request.fixturenames:
        monkeypatch.setenv("LODO_NATIVE", request.getfixturevalue("native"))


def made(kind, options, dtype=torch.float64):
    """Parameters and an optimizer of them."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]
    network = {"depth": 3} if kind == "block_permutation" else {}
    return params, lodo.LODO(params, **{"lr": 0.02, "meta_lr": 1e-2, "preconditioner": kind, **network, **options})


def go_on(params, optimizer, begin, end, has_gradient=lambda step, place: True):
    """Steps on a noisy loss that couples all elements."""
    for step in range(begin, end):
        generator = torch.Generator().manual_seed(step)
        x = torch.cat([p.detach().reshape(-1) for p in params]).requires_grad_()
        noise = 0.3 * torch.randn(len(x), generator=generator, dtype=torch.float64).to(x.dtype)
        ((x.sin() + noise * x).sum() + 0.1 * (x + x.mean()).pow(4).mean()).backward()
        for place, (p, g) in enumerate(zip(params, x.grad.split([p.numel() for p in params]), strict=True)):
            p.grad = g.view(p.shape).clone() if has_gradient(step, place) else None
        optimizer.step()


def sometimes(step, place):
    """The last parameter has a gradient from step 4 on, the second one at every third step."""
    return step >= 4 if place == 3 else place != 1 or step % 3 == 0


def test_every_part_has_a_row():
    used = {part.__name__ for name, kind, options in CASES for part in parts_of(made(kind, options)[1].param_groups[0])}
    assert {part.__name__ for part in PARTS} <= used


def test_signature_and_table_agree():
    """Every option is an argument, with the default of the table; parts that are no part of lodo have theirs in it."""
    own = inspect.signature(lodo.LODO).parameters
    given = {name: argument.default for name, argument in own.items() if name not in ("params", "others")}
    elsewhere = {name for part in PARTS if part.__name__ not in BUILT_IN for name in part.options}
    assert given == {name: option.default for name, option in OPTIONS.items() if name not in elsewhere}
    auto = inspect.signature(lodo.AutoLODO).parameters
    given = {name: argument.default for name, argument in auto.items() if name not in ("params", "others")}
    wanted = {name: option.default for name, option in OPTIONS.items()} | dict(lodo.RECOMMENDED)
    assert given == {name: wanted[name] for name in given}
    assert given.keys() >= {name for part in PARTS if part.__name__ in BUILT_IN for name in part.options}


BUILT_IN = ("SecondMoment", "Eigenbasis", "TensorScale", "Momentum", "Mixture", "Average")


@every_part
@every_kernel
def test_resume_goes_on_in_every_bit(kind, options, native):
    """In the middle, with parameters that have taken different numbers of steps."""
    params, optimizer = made(kind, options)
    go_on(params, optimizer, 0, 9, sometimes)
    twins, other = made(kind, options)
    for twin, p in zip(twins, params, strict=True):
        twin.data.copy_(p.data)
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert_same(other.state_dict(), optimizer.state_dict())
    go_on(params, optimizer, 9, 25, sometimes)
    go_on(twins, other, 9, 25, sometimes)
    assert_same(twins, params)
    assert_same(other.state_dict(), optimizer.state_dict())
    assert len({int(optimizer.state[p]["step"]) for p in params}) > 1


@every_part
@every_kernel
def test_the_operator_is_its_dense_form(kind, options, native):
    """Symmetric, positive semi-definite, and what the next step is made with."""
    params, optimizer = made(kind, options)
    go_on(params, optimizer, 0, 12)
    g = optimizer.preconditioners[0]
    dense = g.to_dense()
    torch.testing.assert_close(dense, dense.T, rtol=1e-10, atol=1e-12)
    assert float(torch.linalg.eigvalsh(dense).min()) > -1e-10 * float(dense.abs().max())
    v = torch.randn(g.size, dtype=torch.float64)
    torch.testing.assert_close(g.matvec(v), dense @ v, rtol=1e-10, atol=1e-12)
    rotated = g.rotate(v)
    torch.testing.assert_close(torch.dot(rotated, rotated), torch.dot(v, v), rtol=1e-10, atol=0)
    torch.testing.assert_close(g.rotate_back_(rotated.clone()), v, rtol=1e-10, atol=1e-12)


@every_part
@every_kernel
def test_what_a_step_leaves_out_keeps_its_bits(kind, options, native):
    """A step with a bad gradient changes nothing, and one without a gradient nothing of that parameter."""
    params, optimizer = made(kind, options)
    go_on(params, optimizer, 0, 6)
    before = copy.deepcopy([dict(optimizer.state[p]) for p in params])
    params[0].grad.view(-1)[0] = math.nan
    with pytest.warns(UserWarning, match="skipped a step"):
        optimizer.step()
    for p, entry in zip(params, before, strict=True):
        assert_same({**optimizer.state[p], "skipped_steps": entry["skipped_steps"]}, entry)
    if kind == "log_diagonal":
        before = copy.deepcopy(dict(optimizer.state[params[1]]))
        go_on(params, optimizer, 6, 9, lambda step, place: place != 1)
        assert_same(dict(optimizer.state[params[1]]), before)


@every_part
@every_kernel
def test_a_late_parameter_begins_at_its_own_first_step(kind, options, native):
    """Its first steps are as long as they would have been at the start of the training, but for what a network of the
    whole group has learned meanwhile."""
    lengths = []
    for late in (0, 100):
        params, optimizer = made(kind, options)
        go_on(params, optimizer, 0, late, lambda step, place: place != 3)
        start = params[3].detach().clone()
        params[3].data.copy_(start)
        for step in range(10):
            for p in params:
                p.grad = torch.full_like(p, 0.3 + 0.1 * (step % 2))
            optimizer.step()
        assert int(optimizer.state[params[3]]["step"]) == 10
        assert int(optimizer.state[params[0]]["step"]) == late + 10
        lengths.append(float((params[3].detach() - start).norm()))
    assert kind == "block_permutation" or 0.3 * lengths[0] < lengths[1] < 3 * lengths[0]


@every_part
@every_kernel
def test_state_that_is_taken_away_starts_anew_and_alone(kind, options, native):
    params, optimizer = made(kind, options)
    go_on(params, optimizer, 0, 6)
    before = copy.deepcopy(dict(optimizer.state[params[0]]))
    optimizer.state.pop(params[3])
    optimizer.state.pop(params[1])  # as with all of torch's optimizers, for it is exchanged
    new = nn.Parameter(torch.randn(4, dtype=torch.float64))
    optimizer.param_groups[0]["params"][1] = new
    optimizer.state_dict()  # starts what is missing
    assert_same(dict(optimizer.state[params[0]]), before)
    go_on([params[0], new, *params[2:]], optimizer, 6, 9)
    steps = [int(optimizer.state[p]["step"]) for p in optimizer.param_groups[0]["params"]]
    assert steps == [9, 3, 9, 3]


@every_part
@every_kernel
def test_it_learns_on_and_resets(kind, options, native):
    params, optimizer = made(kind, options)
    start = sum(float(p.detach().sin().sum()) for p in params)
    go_on(params, optimizer, 0, 60)
    optimizer.reset()
    go_on(params, optimizer, 60, 150)
    assert all(p.isfinite().all() for p in params)
    assert sum(float(p.detach().sin().sum()) for p in params) < start
    assert all(math.isfinite(value) for value in optimizer.diagnostics()[0].values())


@every_part
def test_kernels_do_what_plain_torch_does(kind, options, monkeypatch):
    found = []
    for native in ("1", "0"):
        monkeypatch.setenv("LODO_NATIVE", native)
        params, optimizer = made(kind, options)
        go_on(params, optimizer, 0, 30, sometimes)
        found.append((params, optimizer.state_dict()["state"]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)


def trained_in_shards(options):
    """The parameters of a run, and of one that was saved and resumed in the middle."""
    ends = []
    for resumes in (False, True):
        model = fsdp(torch.float64)
        optimizer = lodo.LODO(model.parameters(), lr=0.02, preconditioner="log_diagonal", **options)
        train(model, optimizer, 0, 8, own_share(model))
        if resumes:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = lodo.LODO(model.parameters(), lr=0.02, preconditioner="log_diagonal", **options)
            optimizer.load_state_dict(saved)
        train(model, optimizer, 8, 16, own_share(model))
        ends.append([p.full_tensor().detach().clone() for p in model.parameters()])
    return ends


@pytest.mark.parametrize("options", [row for name, row in ROWS.items() if name != "Eigenbasis"], ids=str)
def test_shards_resume_in_every_bit(options):
    """Eigenbases are refused on shards."""
    for straight, resumed in run(2, trained_in_shards, options):
        assert_same(resumed, straight)
        assert all(p.isfinite().all() for p in straight)
