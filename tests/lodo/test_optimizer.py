"""LODO as a torch optimizer: its equivalences, groups, arguments, dtypes, layouts, schedulers."""

import copy
from fractions import Fraction

import pytest
import torch
from torch import nn

import lodo
from tests.helpers.oracle import KINDS, learned, quadratic
from tests.helpers.training import assert_equal, data, mlp, parameters_of, train

ELEMENTWISE = {
    "recommended": lodo.RECOMMENDED,
    "recommended with adam": {**lodo.RECOMMENDED, "base": "adam", "weight_decay": 0.1},
    "gains alone": {"preconditioner": "log_diagonal", "lr": 0.1},
    "scales alone": {"preconditioner": "identity", "scale_lr": 0.03, "lr": 0.1},
}
elementwise = pytest.mark.parametrize("options", ELEMENTWISE.values(), ids=ELEMENTWISE)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
        {"params": [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(8).as_strided((3, 4), (2, 1)))]},
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


@pytest.mark.parametrize(
    "view",
    [
        torch.randn(6, 4).T,
        torch.randn(6, 8)[:, ::2],
        torch.randn(2, 3, 4).permute(1, 2, 0)[:, 1:],
        torch.randn(1, 5).expand(1, 5),
        torch.zeros(3, 1).expand(3, 0),
        torch.tensor(1.0),
    ],
)
def test_views_whose_elements_have_memory_of_their_own_are_taken(view):
    param = nn.Parameter(view)
    before = param.detach().clone()
    optimizer = lodo.LODO([param], lr=0.1, beta=0.0)
    param.grad = torch.ones_like(param)
    optimizer.step()
    torch.testing.assert_close(param.detach(), before - 0.1)


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
        ("trace_decay", 1.0, "< 1"),
        ("base", "newton", "None, 'adam', 'soap'"),
        ("scale_lr", -0.1, ">= 0"),
        ("scale_trace_decay", 1.0, "< 1"),
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


def step_with(params, optimizer, gradients):
    """A step on gradients, some of them None; returns copies of the state of each parameter."""
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = None if gradient is None else gradient.clone()
    optimizer.step()
    return [copy.deepcopy(dict(optimizer.state.get(p, {}))) for p in params]


def assert_same_entries(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@elementwise
def test_a_parameter_without_a_gradient_is_left_alone_as_adam_does(options, kernel):
    params = [nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    optimizer = lodo.LODO(params, **options)
    gradients = [torch.randn(4, 3) for _ in range(2)]
    for _ in range(3):
        before = step_with(params, optimizer, gradients)
    still = params[1].detach().clone()
    for _ in range(4):
        after = step_with(params, optimizer, [gradients[0], None])
    assert torch.equal(params[1], still)
    assert_same_entries(after[1], before[1])
    assert [int(entry["step"]) for entry in after] == [7, 3]
    after = step_with(params, optimizer, gradients)
    assert [int(entry["step"]) for entry in after] == [8, 4]
    assert not torch.equal(params[1], still)


@elementwise
def test_a_parameter_that_has_its_first_gradient_late_is_as_one_in_an_optimizer_of_its_own(options, kernel):
    params = [nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    alone = nn.Parameter(params[1].detach().clone())
    optimizer, other = lodo.LODO(params, **options), lodo.LODO([alone], **options)
    for step in range(25):
        gradients = [torch.randn(4, 3) for _ in range(2)]
        if step < 5:
            (_, entry) = step_with(params, optimizer, [gradients[0], None])
            assert int(entry["step"]) == 0
            continue
        (_, entry), (expected,) = step_with(params, optimizer, gradients), step_with([alone], other, gradients[1:])
        torch.testing.assert_close(params[1], alone, rtol=1e-5, atol=1e-6)
        assert int(entry["step"]) == int(expected["step"]) == step - 4


@elementwise
@pytest.mark.parametrize("how", ["popped", "exchanged", "joins"])
def test_a_new_parameter_starts_anew_and_the_others_go_on(options, how, kernel):
    params = [nn.Parameter(torch.randn(4, 3)) for _ in range(3)]
    if how == "joins":
        params.pop()
    optimizer = lodo.LODO(params, **options)
    for _ in range(12):
        step_with(params, optimizer, [torch.randn(4, 3) for _ in params])
    twins, twin = copy.deepcopy((params, optimizer))
    if how == "popped":
        optimizer.state.pop(params[1])
    elif how == "exchanged":
        optimizer.state.pop(params[1])
        params[1] = optimizer.param_groups[0]["params"][1] = nn.Parameter(torch.randn(4, 3))
    else:
        params.insert(1, nn.Parameter(torch.randn(4, 3)))
        optimizer.param_groups[0]["params"].append(params[1])
    alone = nn.Parameter(params[1].detach().clone())
    other = lodo.LODO([alone], **options)
    for step in range(12):
        gradients = [torch.randn(4, 3) for _ in range(3)]
        entries = step_with(params, optimizer, gradients)
        expected = step_with(twins, twin, gradients if len(twins) == 3 else gradients[::2])
        step_with([alone], other, gradients[1:2])
        for found, wanted in ((0, 0), (2, -1)):
            torch.testing.assert_close(params[found], twins[wanted], rtol=1e-5, atol=1e-6)
            assert int(entries[found]["step"]) == int(expected[wanted]["step"]) == 13 + step
        torch.testing.assert_close(params[1], alone, rtol=1e-5, atol=1e-6)
        assert int(entries[1]["step"]) == 1 + step


@pytest.mark.parametrize("kind", ["block_permutation", "residual", "diagonal", "scalar"])
@pytest.mark.parametrize("options", [{}, {"base": "adam", "trace_decay": 0.9}, {"base": "soap"}], ids=str)
def test_to_a_network_of_the_whole_group_a_missing_gradient_is_zero_once_there_was_one(kind, options, kernel):
    options = {"lr": 0.05, "depth": 3, "preconditioner": kind, **options}
    params = [nn.Parameter(torch.randn(4, 3, dtype=torch.float64)) for _ in range(2)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer, twin = lodo.LODO(params, **options), lodo.LODO(twins, **options)
    for step in range(8):
        gradients = [torch.randn(4, 3, dtype=torch.float64) for _ in range(2)]
        still = params[1].detach().clone()
        if step < 2:
            first, entry = step_with(params, optimizer, [gradients[0], None])
            assert (int(entry["step"]), entry["momentum"].any()) == (0, False)
            assert int(first["step"]) == step + 1
            step_with(twins, twin, [gradients[0], None])
        elif step < 4:
            step_with(params, optimizer, gradients), step_with(twins, twin, gradients)
            assert not torch.equal(params[1], still)
        else:
            _, entry = step_with(params, optimizer, [gradients[0], None])
            _, expected = step_with(twins, twin, [gradients[0], torch.zeros(4, 3, dtype=torch.float64)])
            assert torch.equal(params[1], still)
            assert torch.equal(entry["momentum"], expected["momentum"])
            assert int(entry["step"]) == int(expected["step"]) == step - 1
        assert torch.equal(params[0], twins[0])
        assert torch.equal(optimizer.preconditioners[0].theta, twin.preconditioners[0].theta)


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
