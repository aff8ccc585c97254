"""The options that save time or memory, alone, together and saved: meta_every, meta_state_dtype, momentum_dtype."""

import copy

import pytest
import torch
from torch import nn

import lodo
from lodo.kernels import reference
from tests.helpers import resume
from tests.helpers.oracle import KINDS, learned, matvec, quadratic
from tests.helpers.states import assert_same, fresh_pair, through_file
from tests.helpers.training import assert_equal, mlp, parameters_of, train

BOTH = {"meta_state_dtype": "bfloat16", "momentum_dtype": "bfloat16"}
WIDE = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}


def moments_of(optimizer):
    entry = optimizer.state[optimizer.param_groups[0]["params"][0]]
    return [entry["theta_exp_avg"], entry["theta_exp_avg_sq"]]


def momenta_of(optimizer):
    return [optimizer.state[p]["momentum"] for group in optimizer.param_groups for p in group["params"]]


# ---- learning at every K-th step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_third_step_learns_by_the_gradient_of_autograd(kind, where):
    """theta moves at steps 3, 6 and 9 only, by the gradient of the loss after the step before; each step uses it."""
    h, c = quadratic(7)
    x = nn.Parameter(torch.randn(7, dtype=torch.float64))
    options = {"preconditioner": kind, "depth": 3, "meta_optimizer": "sgd", "meta_every": 3}
    optimizer = lodo.LODO([x], lr=0.3, meta_lr=0.05, beta=0.4, **options)
    momentum = torch.zeros_like(x)
    theta, gradient, moved = None, None, []
    for call in range(1, 10):
        before = x.detach().clone()
        x.grad = h @ (before - c)
        momentum = 0.4 * momentum + 0.6 * x.grad
        optimizer.step()
        g = optimizer.preconditioners[0]
        now = learned(g)
        if theta is not None and not torch.equal(now, theta):
            moved.append(call)
            torch.testing.assert_close(now, theta - 0.05 * gradient, rtol=1e-12, atol=1e-13)
        theta = now.clone().requires_grad_()
        landed = before - 0.3 * matvec(g, theta, momentum)
        torch.testing.assert_close(x.detach(), landed.detach(), rtol=1e-12, atol=1e-12)
        (gradient,) = torch.autograd.grad(0.5 * (landed - c) @ h @ (landed - c), theta)
        theta = theta.detach()
    assert moved == [3, 6, 9]
    assert int(optimizer.state[x]["step"]) == 9
    assert int(optimizer.state[x]["meta_step"]) == 3


def test_learning_at_every_step_is_the_default():
    models, optimizers = [], []
    for options in ({}, {"meta_every": 1}, {"meta_every": 2}):
        models.append(mlp())
        optimizers.append(lodo.LODO(models[-1].parameters(), lr=0.1, **options))
        train(models[-1], optimizers[-1], 10)
    assert_equal(parameters_of(models[0]), parameters_of(models[1]))
    assert torch.equal(optimizers[0].preconditioners[0].theta, optimizers[1].preconditioners[0].theta)
    assert not torch.equal(models[0][0].weight, models[2][0].weight)


@pytest.mark.parametrize("options", [{"meta_every": 3}, {"meta_every": 3, **BOTH}], ids=str)
@pytest.mark.filterwarnings("ignore:LODO skipped a step")
def test_skipped_steps_do_not_advance_the_schedule(options, where):
    """With bad gradients in between, the others lead to the same bits."""
    results = []
    for bad in ((), (0, 2, 3, 9)):
        x = nn.Parameter(torch.linspace(-1, 1, 33))
        optimizer = lodo.LODO([x], lr=0.1, depth=3, **options)
        taken, call = 0, 0
        while taken < 11:
            x.grad = torch.full_like(x, float("nan")) if call in bad else x.detach().sin()
            optimizer.step()
            taken += call not in bad
            call += 1
        assert optimizer.skipped_steps == len(bad)
        results.append({name: value for name, value in optimizer.state[x].items() if name != "skipped_steps"})
        results[-1]["x"] = x.detach()
    assert int(results[0]["meta_step"]) == 3
    assert_same(results[1], results[0])


# ---- moments in bfloat16 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", ["bfloat16", torch.bfloat16])
@pytest.mark.parametrize("dtype", WIDE)
def test_moments_in_bfloat16_train(dtype, value, kind, kernel):
    model, other = mlp(dtype=dtype), mlp(dtype=dtype)
    optimizer = lodo.LODO(model.parameters(), lr=0.2, preconditioner=kind, depth=4, meta_state_dtype=value)
    losses = train(model, optimizer, 60, dtype)
    assert optimizer.param_groups[0]["meta_state_dtype"] == "bfloat16"
    assert {moment.dtype for moment in moments_of(optimizer)} == {torch.bfloat16}
    assert all(moment.any() for moment in moments_of(optimizer))
    assert {momentum.dtype for momentum in momenta_of(optimizer)} == {WIDE[dtype]}
    assert optimizer.preconditioners[0].theta.dtype == WIDE[dtype]
    plain = train(other, lodo.LODO(other.parameters(), lr=0.2, preconditioner=kind, depth=4), 60, dtype)
    assert losses[-1] < 0.8 * losses[0]
    assert losses[-1] == pytest.approx(plain[-1], rel=0.05)


def test_changing_the_dtype_of_the_moments_loses_nothing(kernel):
    model = mlp()
    optimizer = lodo.LODO(model.parameters(), lr=0.1)
    group = optimizer.param_groups[0]
    entry = optimizer.state[group["params"][0]]
    train(model, optimizer, 10)
    for value, dtype in (("bfloat16", torch.bfloat16), (None, torch.float32)):
        others = {name: tensor for name, tensor in entry.items() if not name.startswith("theta_exp_avg")}
        before = [moment.to(dtype, copy=True) for moment in moments_of(optimizer)]
        group["meta_state_dtype"] = value
        assert optimizer.preconditioners[0] is not None  # reading it brings the state into the new form
        assert_equal(moments_of(optimizer), before)
        assert {moment.dtype for moment in moments_of(optimizer)} == {dtype}
        assert all(torch.equal(entry[name], tensor) for name, tensor in others.items())
        theta = optimizer.preconditioners[0].theta.clone()
        losses = train(model, optimizer, 10)
        assert losses[-1] < losses[0]
        assert not any(torch.equal(a, b) for a, b in zip(moments_of(optimizer), before, strict=True))
        assert not torch.equal(optimizer.preconditioners[0].theta, theta)
    assert int(entry["meta_step"]) == 30


def test_moments_that_are_not_used_keep_their_bits_when_loaded():
    """Whoever switches to SGD and asks for other moments, resumes, and takes both back, loses nothing."""
    results = []
    for is_resumed in (False, True):
        model, optimizer = fresh_pair(resume.build("default")[0])
        resume.run(model, optimizer, None, begin=0, steps=4)
        optimizer.param_groups[0].update(meta_optimizer="sgd", meta_state_dtype="bfloat16", meta_lr=1e-4)
        if is_resumed:
            saved = through_file(optimizer.state_dict())
            model, optimizer = fresh_pair(model)
            optimizer.load_state_dict(saved)
        resume.run(model, optimizer, None, begin=4, steps=1)
        optimizer.param_groups[0].update(meta_optimizer="adam", meta_state_dtype=None, meta_lr=1e-2)
        resume.run(model, optimizer, None, begin=5, steps=2)
        results.append([model.state_dict(), optimizer.state_dict()])
    assert_same(*results)


# ---- momentum in bfloat16 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"meta_every": 2, "meta_state_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", WIDE)
def test_momentum_in_bfloat16_trains(dtype, kind, more):
    model, other = mlp(dtype=dtype), mlp(dtype=dtype)
    options = {"lr": 0.2, "preconditioner": kind, "depth": 4, **more}
    optimizer = lodo.LODO(model.parameters(), momentum_dtype="bfloat16", **options)
    losses = train(model, optimizer, 60, dtype)
    assert {momentum.dtype for momentum in momenta_of(optimizer)} == {torch.bfloat16}
    assert optimizer.preconditioners[0].theta.dtype == WIDE[dtype]
    assert moments_of(optimizer)[0].dtype == (torch.bfloat16 if more else WIDE[dtype])
    plain = train(other, lodo.LODO(other.parameters(), **options), 60, dtype)
    assert losses[-1] < 0.8 * losses[0]
    assert losses == pytest.approx(plain, rel=0.02)
    assert losses != plain


@pytest.mark.parametrize("value", ["bfloat16", torch.bfloat16])
def test_a_momentum_in_bfloat16_is_one_vector_of_which_the_state_has_views(value):
    params = [nn.Parameter(torch.ones(shape)) for shape in ((3, 5), (), (0,), (7,))]
    optimizer = lodo.LODO(params, momentum_dtype=value)
    assert optimizer.param_groups[0]["momentum_dtype"] == "bfloat16"
    for steps in range(3):
        for p in params:
            p.grad = torch.full_like(p, 0.5 + steps)
        optimizer.step()
        momenta = momenta_of(optimizer)
        assert [momentum.shape for momentum in momenta] == [p.shape for p in params]
        assert {momentum.dtype for momentum in momenta} == {torch.bfloat16}
        assert {momentum.untyped_storage().data_ptr() for momentum in momenta} == {momenta[0].data_ptr()}
        assert momenta[0].untyped_storage().nbytes() == 2 * (15 + 1 + 7)
        assert [momentum.storage_offset() for momentum in momenta if momentum.numel()] == [0, 15, 16]
        assert all((momentum != 0).all() for momentum in momenta)


def test_changing_the_dtype_of_the_momentum_loses_nothing(kernel):
    model = mlp()
    optimizer = lodo.LODO(model.parameters(), lr=0.1)
    group = optimizer.param_groups[0]
    entry = optimizer.state[group["params"][0]]
    train(model, optimizer, 10)
    for value, dtype in (("bfloat16", torch.bfloat16), (None, torch.float32)):
        others = {name: tensor for name, tensor in entry.items() if name != "momentum"}
        before = [momentum.to(dtype, copy=True) for momentum in momenta_of(optimizer)]
        group["momentum_dtype"] = value
        assert optimizer.preconditioners[0] is not None  # reading it brings the state into the new form
        assert_equal(momenta_of(optimizer), before)
        assert {momentum.dtype for momentum in momenta_of(optimizer)} == {dtype}
        assert all(torch.equal(entry[name], tensor) for name, tensor in others.items())
        losses = train(model, optimizer, 10)
        assert losses[-1] < losses[0]
        assert not any(torch.equal(a, b) for a, b in zip(momenta_of(optimizer), before, strict=True))
    assert int(entry["step"]) == int(entry["meta_step"]) == 30


@pytest.mark.filterwarnings("ignore:LODO skipped a step")
def test_a_skipped_step_leaves_the_momentum_bit_for_bit(where):
    x = nn.Parameter(torch.linspace(-1, 1, 1000))
    optimizer = lodo.LODO([x], lr=0.1, depth=3, **BOTH)
    for step in range(6):
        bad = step in (2, 5)
        before = copy.deepcopy(dict(optimizer.state[x]))
        x.grad = torch.full_like(x, float("nan")) if bad else x.detach().sin()
        optimizer.step()
        if bad:
            assert_same({**optimizer.state[x], "skipped_steps": before["skipped_steps"]}, before)
            assert torch.equal(*(entry["momentum"].view(torch.int16) for entry in (optimizer.state[x], before)))
        elif before:
            assert not torch.equal(optimizer.state[x]["momentum"], before["momentum"])
    assert optimizer.skipped_steps == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_a_slow_momentum_follows_the_exact_recursion_unless_rounded_to_nearest(rounding, dtype, monkeypatch):
    """With beta = 0.999 and a constant gradient g it is (1 - beta^t) g; near g it hardly moves."""
    if rounding == "nearest":
        monkeypatch.setenv("LODO_NATIVE", "0")
        monkeypatch.setattr(reference, "to_bfloat16", lambda values, bits: values.bfloat16())
    x = nn.Parameter(torch.zeros(4096, dtype=dtype))
    x.grad = torch.linspace(0.5, 4, 4096, dtype=dtype)
    optimizer = lodo.LODO([x], lr=1e-3, meta_lr=0.0, beta=0.999, depth=0, momentum_dtype="bfloat16")
    reached = []
    for _ in range(2):
        for _ in range(500):
            optimizer.step()
        reached.append(optimizer.state[x]["momentum"].to(dtype, copy=True) / x.grad)
    expected = [1 - 0.999**500, 1 - 0.999**1000]
    if rounding == "stochastic":
        assert [float(ratio.mean()) for ratio in reached] == pytest.approx(expected, rel=5e-3)
        assert (reached[1] / expected[1] - 1).abs().max() < 0.5
    else:
        assert torch.equal(*reached)
        assert float(reached[1].mean()) < 0.7 * expected[1]


# ---- the options in groups and in memory ---------------------------------------------------------------------------


def test_a_group_may_choose_its_dtypes():
    model = mlp()
    groups = [
        {"params": model[0].parameters(), "meta_state_dtype": torch.bfloat16},
        {"params": model[2].parameters(), "momentum_dtype": torch.bfloat16},
    ]
    optimizer = lodo.LODO(groups, lr=0.1)
    assert [group["meta_state_dtype"] for group in optimizer.param_groups] == ["bfloat16", None]
    assert [group["momentum_dtype"] for group in optimizer.param_groups] == [None, "bfloat16"]
    train(model, optimizer, 3)
    entries = [optimizer.state[layer.weight] for layer in (model[0], model[2])]
    assert [entry["theta_exp_avg"].dtype for entry in entries] == [torch.bfloat16, torch.float32]
    assert [entry["momentum"].dtype for entry in entries] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 196.0), ({"momentum_dtype": "bfloat16"}, 194.0), ({"meta_state_dtype": "bfloat16"}, 132.0), (BOTH, 130.0)],
    ids=str,
)
def test_bytes_per_parameter_of_the_lean_network(options, expected):
    x = nn.Parameter(torch.zeros(10_000))
    x.grad = torch.ones_like(x)
    optimizer = lodo.LODO([x], depth=4, expansion=1, permutation="shuffle", **options)
    for _ in range(2):
        optimizer.step()
    tensors = [value for value in optimizer.state[x].values() if isinstance(value, torch.Tensor)]
    assert expected <= sum(tensor.untyped_storage().nbytes() for tensor in tensors) / x.numel() <= expected + 0.01


def test_a_live_group_takes_a_dtype_as_it_takes_a_string(kernel):
    states = []
    for value in ("bfloat16", torch.bfloat16):
        model, optimizer = fresh_pair(resume.build("default")[0])
        resume.run(model, optimizer, None, begin=0, steps=4)
        optimizer.param_groups[0].update(meta_state_dtype=value, momentum_dtype=value)
        resume.run(model, optimizer, None, begin=4, steps=4)
        assert {tensor.dtype for tensor in moments_of(optimizer) + momenta_of(optimizer)} == {torch.bfloat16}
        saved = through_file(optimizer.state_dict())
        other_model, other = fresh_pair(model)
        other.load_state_dict(saved)
        for pair in ((model, optimizer), (other_model, other)):
            resume.run(*pair, None, begin=8, steps=4)
        assert_same(other_model.state_dict(), model.state_dict())
        assert_same(other.state_dict(), optimizer.state_dict())
        states.append({**model.state_dict(), **optimizer.state_dict()["state"]})
    assert_same(*states)


# ---- the options in saved states -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"meta_state_dtype": "bfloat16"},
        {"meta_state_dtype": torch.bfloat16},
        {"momentum_dtype": "bfloat16"},
        {"momentum_dtype": torch.bfloat16},
        {"meta_every": 3},
        BOTH,
        {"meta_every": 3, **BOTH, "permutation": "shuffle"},
        {"meta_every": 3, **BOTH, "preconditioner": "residual", "depth": 5},
    ],
    ids=str,
)
def test_resume_in_bfloat16_and_in_the_middle_of_a_period(options, kernel):
    model, optimizer = fresh_pair(resume.build("default")[0], **options)
    resume.run(model, optimizer, None, begin=0, steps=8)
    saved = through_file(optimizer.state_dict())
    first = saved["state"][0]
    assert first["theta"].dtype == torch.float32
    wanted = torch.bfloat16 if "meta_state_dtype" in options else torch.float32
    assert first["theta_exp_avg"].dtype == first["theta_exp_avg_sq"].dtype == wanted
    wanted = torch.bfloat16 if "momentum_dtype" in options else torch.float32
    assert {entry["momentum"].dtype for entry in saved["state"].values()} == {wanted}
    assert int(first["step"]) == 8
    assert int(first["meta_step"]) == 8 // options.get("meta_every", 1)
    other_model, other = fresh_pair(model, **options)
    other.load_state_dict(saved)
    assert_same(other.state_dict(), saved)
    for step in range(8, 13):
        resume.run(model, optimizer, None, begin=step, steps=1)
        resume.run(other_model, other, None, begin=step, steps=1)
        assert_same(other_model.state_dict(), model.state_dict())
        assert_same(other.state_dict(), optimizer.state_dict())
