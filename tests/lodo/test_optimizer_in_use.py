"""LODO in use: carried over, copied, with closures, averaged and compiled models, on several devices."""

import copy
import gc
import json
import math
import pickle
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch._dynamo
from torch import nn

import lodo
from tests.helpers.oracle import KINDS, learned
from tests.helpers.training import assert_equal, data, mlp, parameters_of, train

# ---- carried over, frozen, copied ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_learned_preconditioner_is_carried_over_and_frozen(kind):
    model = mlp()
    source = lodo.LODO(model.parameters(), lr=0.2, preconditioner=kind, depth=3, permutation="shuffle")
    train(model, source, 20)
    g = source.preconditioners[0]
    snapshot = learned(g)
    fresh = mlp(seed=1)
    optimizer = lodo.LODO(fresh.parameters(), lr=0.2, meta_lr=0.0, preconditioner=g)
    assert torch.equal(learned(optimizer.preconditioners[0]), snapshot)
    assert all(isinstance(v, int | float | str | bool | None) for v in optimizer.defaults.values())
    losses = train(fresh, optimizer, 20)
    assert losses[-1] < losses[0]
    assert torch.equal(learned(optimizer.preconditioners[0]), snapshot)
    assert torch.equal(learned(g), snapshot)
    assert "theta_exp_avg" not in optimizer.state[next(fresh.parameters())]
    restored = lodo.LODO(fresh.parameters(), preconditioner=g)
    restored.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="learned for 83 parameters, but its param group holds 3"):
        lodo.LODO([nn.Parameter(torch.zeros(3))], preconditioner=g)


def test_a_transplanted_network_goes_on_learning():
    model = mlp()
    source = lodo.LODO(model.parameters(), lr=0.2, expansion=1.7)
    train(model, source, 5)
    g = source.preconditioners[0]
    model = mlp()
    optimizer = lodo.LODO(model.parameters(), lr=0.2, preconditioner=g)
    before = learned(g)
    train(model, optimizer, 5)
    assert not torch.equal(learned(optimizer.preconditioners[0]), before)
    assert torch.equal(learned(g), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_bit_for_bit_and_apart(kind, how):
    model = mlp()
    optimizer = lodo.LODO(model.parameters(), lr=0.1, preconditioner=kind, depth=3)
    train(model, optimizer, 7)
    pair = (model, optimizer)
    other_model, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert train(model, optimizer, 7) == train(other_model, other, 7)
    assert_equal(parameters_of(model), parameters_of(other_model))
    train(other_model, other, 3)
    assert not torch.equal(next(model.parameters()), next(other_model.parameters()))


def test_seeds():
    def start(seed):
        x = nn.Parameter(torch.zeros(10))
        x.grad = torch.ones(10)
        optimizer = lodo.LODO([x], seed=seed)
        torch.rand(1)
        optimizer.step()
        return optimizer.preconditioners[0]

    assert torch.equal(start(3).blocks, start(3).blocks)
    assert torch.equal(start(3).permutations, start(3).permutations)
    assert not torch.equal(start(3).blocks, start(4).blocks)
    assert not torch.equal(start(3).permutations, start(4).permutations)
    state = torch.get_rng_state()
    start(3)
    torch.rand(1)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.rand(2)
    assert torch.equal(torch.get_rng_state(), after)  # the user's random numbers are not touched


# ---- in company ----------------------------------------------------------------------------------------------------


def test_closure_sees_gradients_enabled_and_its_loss_is_returned():
    x = nn.Parameter(torch.ones(3))
    optimizer = lodo.LODO([x], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (x**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure).detach()) == 3.0
    assert x[0] < 1
    assert optimizer.step() is None


def test_averaged_models_follow():
    model = mlp()
    optimizer = lodo.LODO(model.parameters(), lr=0.1)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    for _ in range(5):
        train(model, optimizer, 1)
        averaged.update_parameters(model)
    difference = averaged.module[0].weight - model[0].weight
    assert 0 < difference.abs().max() < 0.5


def test_grad_scaler_and_autocast():
    model = mlp()
    optimizer = lodo.LODO(model.parameters(), lr=0.2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, y = data()
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.mse_loss(model(x).float(), y)
        scaler.scale(loss).backward()
        if step == 10:
            model[0].weight.grad[0, 0] = float("inf")
            before = parameters_of(model)
        scaler.step(optimizer)
        if step == 10:
            assert_equal(parameters_of(model), before)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert optimizer.skipped_steps == 0  # the scaler saw to it


@pytest.mark.parametrize("options", [lodo.RECOMMENDED, {"lr": 0.2}], ids=["recommended", "paper's"])
def test_a_step_within_autocast_is_one_without(options, kernel):
    """Some wrap it all, and with other optimizers nothing comes of it."""
    models = mlp(), mlp()
    optimizers = [lodo.LODO(model.parameters(), **options) for model in models]
    for _ in range(12):
        for model, optimizer, is_on in zip(models, optimizers, (False, True), strict=True):
            optimizer.zero_grad()
            x, y = data()
            nn.functional.mse_loss(model(x), y).backward()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on):
                optimizer.step()
    assert_equal(*map(parameters_of, models))
    v = torch.randn(optimizers[0].preconditioners[0].size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = optimizers[1].preconditioners[0].matvec(v)
    assert torch.equal(found, optimizers[0].preconditioners[0].matvec(v))


def test_groups_may_live_on_different_devices_and_dtypes(device):
    first, second = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(7, device=device))
    optimizer = lodo.LODO([{"params": [first]}, {"params": [second]}], lr=0.1)
    for p in (first, second):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert float(first.detach()[0]) == pytest.approx(0.99)
    assert float(second.detach()[0]) == pytest.approx(0.99)


def test_every_device_takes_the_same_steps(device):
    results = []
    for place in ("cpu", device):
        x = nn.Parameter(torch.linspace(-1, 1, 300, dtype=torch.float64, device=place))
        optimizer = lodo.LODO([x], lr=0.1)
        for _ in range(20):
            x.grad = x.detach().sin()
            optimizer.step()
        results.append(x.detach().cpu())
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_may_be_cast_between_steps(dtype):
    model = mlp()
    optimizer = lodo.LODO(model.parameters(), lr=0.1)
    train(model, optimizer, 5)
    theta = optimizer.preconditioners[0].theta.clone()
    model.to(dtype)
    found = optimizer.preconditioners[0].theta
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(found.float(), theta)
    losses = train(model, optimizer, 20, dtype)
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
@pytest.mark.parametrize("compiled", ["model", "train_step"])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_models_and_training_steps(compiled):
    """The optimizer runs eagerly inside a compiled training step, once per step and without recompilation."""
    torch.compiler.reset()
    model, other = mlp(), mlp()
    x, y = data()

    def train_step(model, optimizer):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    fast = torch.compile(model, backend="eager") if compiled == "model" else model
    fast_step = torch.compile(train_step, backend="eager") if compiled == "train_step" else train_step
    optimizer, plain = lodo.LODO(fast.parameters(), lr=0.1), lodo.LODO(other.parameters(), lr=0.1)
    for _ in range(12):
        torch.testing.assert_close(fast_step(fast, optimizer), train_step(other, plain), rtol=1e-5, atol=1e-6)
    assert int(optimizer.state[next(iter(model.parameters()))]["meta_step"]) == 12


def test_lazy_parameters_get_their_shape_before_the_first_step():
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(3))
    optimizer = lodo.LODO(model.parameters(), lr=0.1, depth=2)
    losses = train(model, optimizer)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("change", [{"max_condition": 9.0}, {"weight_decay": "x"}, {"momentum_dtype": "float16"}])
def test_wrong_options_that_are_written_into_a_group_are_refused_before_anything_has_changed(change):
    model = mlp()
    optimizer = lodo.LODO(model.parameters(), lr=0.1, preconditioner="residual", depth=3)
    train(model, optimizer, steps=2)

    def everything():
        kept = [torch.as_tensor(value) for entry in optimizer.state.values() for value in entry.values()]
        return [value.clone() for value in (*model.parameters(), *kept)]

    before = everything()
    old = {name: optimizer.param_groups[0][name] for name in change}
    optimizer.param_groups[0].update(change)
    with pytest.raises(ValueError, match=next(iter(change))):
        optimizer.step()
    assert_equal(before, everything())
    optimizer.param_groups[0].update(old)
    optimizer.step()


@pytest.mark.parametrize(
    "change", [("adam", "soap"), ("soap", "adam"), ("soap", None), (None, "soap"), (None, "adam")], ids=str
)
@pytest.mark.parametrize("is_copied", [False, True])
def test_another_base_that_is_written_into_a_group_is_refused(change, is_copied):
    """What is kept would be in other coordinates and units."""
    model, (old, new) = mlp(), change
    optimizer = lodo.LODO(model.parameters(), **{**lodo.RECOMMENDED, "base": old})
    train(model, optimizer, steps=2)
    optimizer.param_groups[0]["base"] = new
    if is_copied:
        model, optimizer = copy.deepcopy((model, optimizer))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.clone() for p in model.parameters()]
    was = "what it was" if is_copied else repr(old)
    message = f"base must stay {was} for a param group that has state with it, got {new!r}"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_equal(before, list(model.parameters()))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("log_diagonal", "preconditioner", "diagonal"),
        ("block_permutation", "depth", 8),
        ("block_permutation", "block_size", 2),
        ("block_permutation", "expansion", 1.0),
        ("block_permutation", "permutation", "shuffle"),
    ],
)
def test_another_network_that_is_written_into_a_group_is_refused(kind, name, value):
    """The numbers of one kind may be of the shape of another's and mean something else."""
    model = mlp()
    optimizer = lodo.LODO(model.parameters(), lr=0.1, preconditioner=kind)
    train(model, optimizer, steps=2)
    before, old = [p.clone() for p in model.parameters()], optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name} must stay {old!r} for a param group that has state with it"):
        optimizer.step()
    assert_equal(before, list(model.parameters()))
    optimizer.param_groups[0][name] = old
    optimizer.step()


@pytest.mark.parametrize(
    "lr", [math.nan, math.inf, -1.0, None, True, "0.1", torch.tensor([0.1, 0.1]), torch.tensor(-0.1)], ids=str
)
@pytest.mark.parametrize("options", [{"meta_lr": 0.0}, lodo.RECOMMENDED], ids=["paper", "recommended"])
def test_a_learning_rate_that_is_written_into_a_group_is_checked_at_each_step(lr, options):
    model = mlp()
    optimizer = lodo.LODO(model.parameters(), **options)
    train(model, optimizer, steps=2)
    before = [p.clone() for p in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match=r"lr must be (a number >= 0|1-element)"):
        optimizer.step()
    assert_equal(before, list(model.parameters()))
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)


def test_the_same_parameter_twice_in_a_group_counts_once():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate"):
        twice = lodo.LODO([p, p])
    once = lodo.LODO([q])
    for _ in range(3):
        p.grad, q.grad = 2 * p.detach(), 2 * q.detach()
        twice.step(), once.step()
    assert torch.equal(p, q)
    twice.load_state_dict(copy.deepcopy(twice.state_dict()))


def test_the_recommended_options_can_be_kept_in_configurations():
    assert copy.deepcopy(lodo.RECOMMENDED) == pickle.loads(pickle.dumps(lodo.RECOMMENDED)) == lodo.RECOMMENDED
    lodo.LODO(mlp().parameters(), **json.loads(json.dumps(lodo.RECOMMENDED)))


@pytest.mark.parametrize(("count", "is_full"), [(2, True), (20, False)])
def test_only_small_groups_of_vectors_have_full_eigenbases(count, is_full):
    """All biases and norms of a model are a group of their own in many trainings."""
    params = [nn.Parameter(torch.ones(200)) for _ in range(count)]
    optimizer = lodo.LODO(params, **lodo.RECOMMENDED)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p in params:
        for name in ("factors", "eigenbasis"):
            assert optimizer.state[p][name].numel() == (200**2 if is_full else 0)


def test_exchanged_parameters_are_not_kept_alive():
    optimizer = lodo.LODO([nn.Parameter(torch.ones(3))], lr=0.1)
    gone = []
    for _ in range(3):
        p = nn.Parameter(torch.ones(3))
        optimizer.param_groups[0]["params"] = [p]
        p.grad = torch.ones(3)
        optimizer.step()
        optimizer.state.pop(p)
        gone.append(weakref.ref(p))
        del p
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(3))]
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


def tensors_of(optimizer):
    """The tensors in the state, and where they are."""
    entries = optimizer.state.values()
    return [(name, id(value), value.data_ptr()) for entry in entries for name, value in entry.items()]


@pytest.mark.parametrize("kind", [*KINDS, "identity"])
@pytest.mark.parametrize("parts", [{}, {**lodo.RECOMMENDED, "base": "adam"}, lodo.RECOMMENDED], ids=len)
def test_the_state_stays_where_it_is_from_step_to_step(kind, parts, where):
    """So that steps have nothing to prepare."""
    model = mlp()
    optimizer = lodo.LODO(model.parameters(), **{**parts, "preconditioner": kind, "depth": 2, "lr": 0.01})
    train(model, optimizer, 2)
    before = tensors_of(optimizer)
    train(model, optimizer, 3)
    for p in [*model.parameters()][1:3]:
        p.grad = None
    optimizer.step()
    train(model, optimizer, 2)
    assert tensors_of(optimizer) == before


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "log_diagonal"])
@pytest.mark.parametrize("base", [None, "adam", "soap"])
@pytest.mark.parametrize("place", [0, 2])
def test_a_network_of_the_group_is_lost_with_the_state_of_its_first_parameter_only(kind, base, place):
    model = mlp()
    optimizer = lodo.LODO(model.parameters(), preconditioner=kind, depth=2, lr=0.01, meta_lr=0.1, base=base)
    train(model, optimizer, 5)
    params, theta = [*model.parameters()], optimizer.preconditioners[0].theta.clone()
    before = [copy.deepcopy(optimizer.state[p]) for p in params]
    optimizer.state.pop(params[place])
    with pytest.warns(UserWarning, match="without the network") if place == 0 else nullcontext():
        found = optimizer.preconditioners[0].theta
    fresh = mlp()
    start = lodo.LODO(fresh.parameters(), preconditioner=kind, depth=2, base=base, meta_lr=0.0)
    train(fresh, start, 1)
    assert torch.equal(found, start.preconditioners[0].theta if place == 0 else theta)
    for other_place, p in enumerate(params):
        entry, former = optimizer.state[p], before[other_place]
        if other_place == place:
            assert entry["step"] == 0
            assert not entry["momentum"].any()
        else:
            assert all(torch.equal(entry[name], former[name]) for name in former)
    if place == 0:  # and what is loaded is as what goes on
        twin_model = copy.deepcopy(model)
        twin = lodo.LODO(twin_model.parameters(), preconditioner=kind, depth=2, base=base)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LODO loaded momentum without the network")
            twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            assert train(model, optimizer, 5) == train(twin_model, twin, 5)


@pytest.mark.parametrize("name", ["theta", "exp_avg_sq", "scale", "mixture", "factors", "eigenbasis", "momenta"])
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("is_loaded", [False, True])
def test_what_somebody_writes_into_the_state_counts_from_the_next_step_on(name, place, is_loaded):
    """A broadcast that makes replicas alike, say: a gradient is judged by the G that the state tells of."""
    model = mlp()
    optimizer = lodo.LODO(model.parameters(), **lodo.RECOMMENDED)
    train(model, optimizer, steps=12)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if is_loaded:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.diagnostics()  # which binds the state before a step does
    changed = [*model.parameters()][place]
    before = copy.deepcopy(optimizer.state[changed][name])
    optimizer.state[changed][name].mul_(1.5)
    twin, other = copy.deepcopy((model, optimizer))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()
    optimizer.step(), other.step()
    assert not torch.equal(optimizer.state[changed][name], before)
    assert_equal(list(model.parameters()), list(twin.parameters()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[q][key])), key
