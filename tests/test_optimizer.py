"""LODO as a torch optimizer: groups, dtypes, layouts, schedulers, wrappers, copies; and its equivalences."""

import copy
import pickle
from fractions import Fraction

import pytest
import torch
import torch._dynamo
from oracle import KINDS, learned, quadratic
from torch import nn

import lodo

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def mlp(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 6, generator=generator)
    return x.to(dtype), (x[:, :3] * x[:, 3:]).to(dtype)


def train(model, optimizer, steps=30, dtype=torch.float32):
    x, y = data(dtype)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def parameters_of(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def ema_sgd(model, lr, beta, steps, weight_decay=0.0):
    """SGD with an exponential moving average as momentum, by hand."""
    x, y = data(torch.float64)
    momenta = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(steps):
        model.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        with torch.no_grad():
            for p, m in zip(model.parameters(), momenta, strict=True):
                m.mul_(beta).add_(p.grad, alpha=1 - beta)
                p.mul_(1 - lr * weight_decay).sub_(lr * m)


# ---- what LODO reduces to ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"meta_lr": 0.0},
        {"meta_lr": 0.0, "permutation": "shuffle", "block_size": 3},
        {"depth": 0},
        {"depth": 0, "meta_lr": 0.0},
        {"preconditioner": "diagonal", "meta_lr": 0.0},
        {"preconditioner": "scalar", "meta_lr": 0.0},
        {"preconditioner": "residual", "depth": 0, "meta_lr": 0.0},
    ],
)
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_a_frozen_fresh_network_is_sgd_with_momentum(options, beta, kernel):
    model, other = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    optimizer = lodo.LODO(model.parameters(), lr=0.2, beta=beta, weight_decay=0.1, **options)
    train(model, optimizer, 40, torch.float64)
    ema_sgd(other, 0.2, beta, 40, weight_decay=0.1)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


def test_without_momentum_and_learning_it_is_torch_sgd():
    model, other = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    train(model, lodo.LODO(model.parameters(), lr=0.2, beta=0.0, meta_lr=0.0), 20, torch.float64)
    train(other, torch.optim.SGD(other.parameters(), lr=0.2), 20, torch.float64)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_beats_its_own_frozen_start(kind, kernel):
    h, c = quadratic(20)

    def final(meta_lr):
        x = nn.Parameter(torch.zeros(20, dtype=torch.float64))
        optimizer = lodo.LODO([x], lr=0.05, meta_lr=meta_lr, preconditioner=kind, depth=8)
        for _ in range(200):
            optimizer.zero_grad()
            (0.5 * (x - c) @ h @ (x - c)).backward()
            optimizer.step()
        return float((0.5 * (x - c) @ h @ (x - c)).detach())

    assert final(3e-3) < 0.7 * final(0.0)


# ---- groups --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [("block_permutation", "block_permutation"), ("residual", "diagonal")])
def test_two_groups_are_two_optimizers(kinds):
    settings = [
        {"lr": 0.1, "meta_lr": 1e-3, "beta": 0.9, "preconditioner": kinds[0], "depth": 3},
        {"lr": 0.3, "meta_lr": 1e-2, "beta": 0.5, "preconditioner": kinds[1], "depth": 2, "weight_decay": 0.1},
    ]
    settings[1].update(meta_optimizer="sgd", seed=7, maximize=False, block_size=3, expansion=1)
    model, other = mlp(), mlp()
    together = lodo.LODO(
        [{"params": layer.parameters(), **setting} for layer, setting in zip(model[::2], settings, strict=True)]
    )
    apart = [lodo.LODO(layer.parameters(), **setting) for layer, setting in zip(other[::2], settings, strict=True)]
    x, y = data()
    for _ in range(20):
        for m, optimizers in ((model, [together]), (other, apart)):
            m.zero_grad()
            nn.functional.mse_loss(m(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert_equal(parameters_of(model), parameters_of(other))
    for found, expected in zip(together.preconditioners, [o.preconditioners[0] for o in apart], strict=True):
        assert torch.equal(learned(found), learned(expected))


def test_one_group_is_one_vector_in_order():
    """The same numbers cut into other parameters give the same trajectory."""
    h, c = quadratic(12)
    whole = nn.Parameter(torch.zeros(12, dtype=torch.float64))
    parts = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((2, 3), (), (0,), (5,))]
    trajectories = []
    for params in ([whole], parts):
        optimizer = lodo.LODO(params, lr=0.5)
        for _ in range(30):
            optimizer.zero_grad()
            x = torch.cat([p.reshape(-1) for p in params])
            (0.5 * (x - c) @ h @ (x - c)).backward()
            optimizer.step()
        trajectories.append(torch.cat([p.detach().reshape(-1) for p in params]))
    assert torch.equal(*trajectories)


def test_a_group_can_join_during_training():
    model, other = mlp(), mlp()
    optimizer = lodo.LODO(model[0].parameters(), lr=0.1)
    assert optimizer.preconditioners == [None]
    train(model, optimizer, 5)
    before = learned(optimizer.preconditioners[0])
    optimizer.add_param_group({"params": model[2].parameters(), "preconditioner": "diagonal", "lr": 0.2})
    assert optimizer.preconditioners[1] is None
    assert torch.equal(learned(optimizer.preconditioners[0]), before)
    losses = train(model, optimizer, 30)
    assert losses[-1] < losses[0]
    assert isinstance(optimizer.preconditioners[1], lodo.Diagonal)
    assert not torch.equal(model[2].weight, other[2].weight)


@pytest.mark.parametrize(
    "bad",
    [
        {"params": [nn.Parameter(torch.zeros(3))], "lr": -1.0},
        {"params": [nn.Parameter(torch.zeros(3))], "preconditioner": lodo.Diagonal(torch.ones(4))},
        {"params": [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, dtype=torch.complex64))]},
        {"params": [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, device="meta"))]},
        {"params": [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1).expand(3))]},
    ],
)
def test_a_refused_group_leaves_the_optimizer_as_it_was(bad):
    model = mlp()
    optimizer = lodo.LODO(model.parameters())
    with pytest.raises(ValueError, match=r"lr|preconditioner|dtype|device|share memory"):
        optimizer.add_param_group(bad)
    assert len(optimizer.param_groups) == 1
    assert not optimizer.state
    optimizer.add_param_group({"params": [bad["params"][0]]})


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("lr", -0.1, ">= 0"),
        ("lr", float("nan"), ">= 0"),
        ("lr", float("inf"), "finite"),
        ("lr", "fast", "number"),
        ("lr", torch.tensor([1.0, 2.0]), "1-element"),
        ("lr", torch.tensor(-1.0), ">= 0"),
        ("lr", torch.tensor(True), "dense and of real numbers"),
        ("lr", torch.tensor(0.5j), "dense and of real numbers"),
        ("lr", Fraction(10**400), "finite"),
        ("meta_lr", -1e-3, ">= 0"),
        ("meta_lr", None, "number"),
        ("beta", 1.0, "< 1"),
        ("beta", -0.1, ">= 0"),
        ("weight_decay", -1, ">= 0"),
        ("preconditioner", "newton", "'block_permutation', 'residual', 'diagonal', 'scalar'"),
        ("depth", -1, ">= 0"),
        ("depth", 2.5, "int"),
        ("block_size", 0, ">= 1"),
        ("expansion", 0.5, ">= 1"),
        ("permutation", "sorted", "'random', 'shuffle'"),
        ("meta_optimizer", "lion", "'adam', 'sgd'"),
        ("maximize", 1, "bool"),
        ("seed", -1, ">= 0"),
        ("seed", True, "int"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(argument, value, allowed):
    shown = "shape" if getattr(value, "ndim", 0) else str(value).removeprefix("tensor(").rstrip(".)")
    for make in (
        lambda: lodo.LODO([nn.Parameter(torch.zeros(2))], **{argument: value}),
        lambda: lodo.LODO([{"params": [nn.Parameter(torch.zeros(2))], argument: value}]),
    ):
        with pytest.raises(ValueError, match=argument) as error:
            make()
        assert allowed in str(error.value)
        assert shown in str(error.value)


def test_sparse_and_complex_are_refused_and_nothing_has_changed():
    with pytest.raises(ValueError, match="complex64"):
        lodo.LODO([torch.zeros(3, dtype=torch.complex64, requires_grad=True)])
    with pytest.raises(ValueError, match="sparse"):
        lodo.LODO([torch.eye(3).to_sparse().requires_grad_()])
    embedding = nn.Embedding(5, 2, sparse=True)
    other = nn.Parameter(torch.ones(3))
    optimizer = lodo.LODO([other, *embedding.parameters()])
    embedding(torch.tensor([1, 2])).sum().backward()
    other.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert torch.equal(other, torch.ones(3))
    assert not optimizer.state


# ---- parameters of every kind --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_trains_and_keeps_its_network_precise(dtype):
    model = mlp(dtype=dtype)
    optimizer = lodo.LODO(model.parameters(), lr=0.3, weight_decay=1e-3)
    losses = train(model, optimizer, 60, dtype)
    assert losses[-1] < 0.8 * losses[0]
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert optimizer.preconditioners[0].theta.dtype == wanted
    for p in model.parameters():
        assert p.dtype == dtype
        assert optimizer.state[p]["momentum"].dtype == wanted
        assert optimizer.state[p]["momentum"].shape == p.shape


def test_low_precision_parameters_round_once_per_step():
    """weight_decay * lr is below bfloat16's resolution of 1, but not below that of the small step it is added to."""
    x = nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
    wide = nn.Parameter(torch.full((4,), 1.0))
    for p in (x, wide):
        optimizer = lodo.LODO([p], lr=0.01, weight_decay=0.2, beta=0.0, meta_lr=0.0)
        p.grad = torch.full_like(p, 0.25)
        optimizer.step()
    assert torch.equal(x, wide.to(torch.bfloat16))
    assert not torch.equal(x, torch.ones_like(x))


def test_mixed_dtypes_in_one_group():
    params = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in DTYPES]
    optimizer = lodo.LODO(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.preconditioners[0].theta.dtype == torch.float64
    for p in params:
        torch.testing.assert_close(p, torch.full_like(p, 0.99))


def test_non_contiguous_parameters_and_gradients():
    base = torch.randn(6, 4, dtype=torch.float64)
    plain = nn.Parameter(base.clone())
    turned = nn.Parameter(base.T.contiguous().T)
    assert not turned.is_contiguous()
    for p in (plain, turned):
        optimizer = lodo.LODO([p], lr=0.1)
        for _ in range(5):
            gradient = p.detach().sin()
            p.grad = gradient if p is plain else gradient.T.contiguous().T
            optimizer.step()
    assert torch.equal(plain, turned)


def test_parameters_without_gradients_are_not_written_and_count_as_zero():
    still, moving = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = lodo.LODO([still, moving], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert not optimizer.state
    for _ in range(5):
        moving.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(still, torch.ones(3))
    twin, twin_moving = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    other = lodo.LODO([twin, twin_moving], lr=0.1, weight_decay=0.5)
    for _ in range(5):
        twin.grad, twin_moving.grad = torch.zeros(3), torch.ones(3)
        other.step()
    assert torch.equal(moving, twin_moving)
    assert not torch.equal(twin, still)


def test_empty_parameters_and_groups():
    empty = nn.Parameter(torch.zeros(0, 3))
    optimizer = lodo.LODO([{"params": [empty]}, {"params": []}, {"params": [nn.Parameter(torch.tensor(1.0))]}])
    empty.grad = torch.zeros(0, 3)
    optimizer.step()
    scalar = optimizer.param_groups[2]["params"][0]
    scalar.grad = torch.tensor(0.5)
    optimizer.step()
    assert scalar < 1
    assert [g is None for g in optimizer.preconditioners] == [True, True, False]
    other = lodo.LODO([{"params": [empty]}, {"params": []}, {"params": [scalar]}])
    other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("params", [[], [nn.Parameter(torch.zeros(0, 3))]], ids=["no parameters", "an empty one"])
def test_a_learned_preconditioner_is_refused_for_nothing(params):
    optimizer = lodo.LODO(mlp().parameters())
    with pytest.raises(ValueError, match="learned for 3 parameters, but its param group holds 0"):
        optimizer.add_param_group({"params": params, "preconditioner": lodo.Diagonal(torch.ones(3))})
    assert len(optimizer.param_groups) == 1


# ---- lr, schedulers, maximize --------------------------------------------------------------------------------------


def test_the_hypergradient_uses_the_lr_of_the_step_it_judges():
    """With lr changing each step, theta must move as one hand-written step says."""
    x = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = lodo.LODO([x], lr=0.5, meta_lr=0.1, beta=0.0, preconditioner="diagonal", meta_optimizer="sgd")
    weight, momentum, last = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 0.0
    expected = x.detach().clone()
    for lr in (0.5, 0.1, 0.0, 0.3):
        optimizer.param_groups[0]["lr"] = lr
        gradient = expected.cos()
        weight = weight + 0.1 * last * gradient * momentum
        momentum, last = gradient, lr
        expected = expected - lr * weight * momentum
        x.grad = gradient
        optimizer.step()
        torch.testing.assert_close(x.detach(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(optimizer.preconditioners[0].weight, weight, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "lr", [*(torch.tensor([0.5], dtype=dtype) for dtype in DTYPES), torch.tensor(0.5, requires_grad=True)], ids=str
)
def test_a_tensor_lr_may_be_of_any_floating_dtype(lr):
    """With torch.set_default_dtype(torch.bfloat16) it is of that."""
    x, y = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    for p, rate in ((x, lr), (y, 0.5)):
        optimizer = lodo.LODO([p], lr=rate)
        p.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(x, y)


def test_maximize_climbs():
    up, down = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    for p, maximize in ((up, True), (down, False)):
        optimizer = lodo.LODO([p], lr=0.1, maximize=maximize)
        for _ in range(10):
            optimizer.zero_grad()
            ((p - 1) ** 2).sum().mul(-1 if maximize else 1).backward()
            optimizer.step()
    torch.testing.assert_close(up, down)
    assert up[0] > 0.1


def test_clipping_and_accumulation():
    model, other = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    x, y = data(torch.float64)
    optimizers = [lodo.LODO(m.parameters(), lr=0.2) for m in (model, other)]
    for _ in range(10):
        optimizers[0].zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizers[1].zero_grad(set_to_none=False)
        for part_x, part_y in zip(x.chunk(4), y.chunk(4), strict=True):
            (nn.functional.mse_loss(other(part_x), part_y) / 4).backward()
        for m, optimizer in zip((model, other), optimizers, strict=True):
            nn.utils.clip_grad_norm_(m.parameters(), 0.1)
            optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


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
