"""What people do around an optimizer that wants no tuning, each by the value that must come of it: bounds, masks, first
steps, rates that jump, losses of any size, resets and saves at odd moments."""

import copy
import math
import warnings
from itertools import pairwise

import pytest
import torch
from test_auto_lodo import assert_same
from torch import nn
from torch.nn import functional as F

import lodo
from lodo import bases, meta

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def floating(value):
    """The floating tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict | list | tuple):
        return [each for item in (value.values() if isinstance(value, dict) else value) for each in floating(item)]
    return []


def assert_finite(optimizer):
    params = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    assert all(bool(tensor.isfinite().all()) for tensor in floating([params, optimizer.state_dict()["state"]]))


def entry_of(optimizer, group=0):
    """What is kept for a whole group."""
    return optimizer.state[optimizer.param_groups[group]["params"][0]]


def noisy(shape, step, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def follow(optimizer, w, target, begin, end, noise=0.3):
    """Steps along w - target, with noise; yields the number of the step after each."""
    for step in range(begin, end):
        w.grad = w.detach() - target + noise * noisy(w.shape, step, w.dtype)
        optimizer.step()
        yield step


# ---- bounds: moves that somebody takes back ------------------------------------------------------------------------


def clamp(w):
    w.clamp_(-1, 1)


def clamp_at_zero(w):
    w.clamp_(max=0)


def unit_rows(w):
    w.div_(w.norm(dim=1, keepdim=True))


def max_norm(w):
    w.copy_(torch.renorm(w, 2, 0, 1.0))


BOUNDS = {clamp: 1.0, clamp_at_zero: 0.0, unit_rows: 0.5, max_norm: 0.5}  # and where they leave all of 2, in rows of 4


def bounded_run(bound, dtype=torch.float32, **options):
    """1,500 steps to 2, each followed by the bound; the parameters, and the largest scale at steps 700 and 1,500."""
    w = nn.Parameter(torch.full((4, 4), 0.1, dtype=dtype))
    optimizer = lodo.AutoLODO([w], **options)
    scales = []
    for step in range(1, 1501):
        optimizer.zero_grad()
        (w - 2).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            bound(w)
        if step in (700, 1500):
            scales.append(optimizer.diagnostics()[0]["scale_max"])
    assert_finite(optimizer)
    return w.detach(), scales


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.__name__)
def test_at_a_bound_the_parameters_stay_and_the_scale_stops_growing(bound, kernel):
    w, (before, after) = bounded_run(bound)
    torch.testing.assert_close(w, torch.full_like(w, BOUNDS[bound]), rtol=0, atol=1e-5)
    assert after == pytest.approx(before, rel=0.01)


@pytest.mark.parametrize(
    ("base", "dtype"), [("soap", torch.bfloat16), ("soap", torch.float64), ("adam", torch.float32)]
)
def test_at_a_box_the_scale_stops_growing_in_every_precision(base, dtype):
    w, (before, after) = bounded_run(clamp, dtype, base=base)
    assert torch.equal(w, torch.ones_like(w))
    assert after == pytest.approx(before, rel=0.01)


@pytest.mark.parametrize("base", ["soap", "adam"])
def test_masked_weights_do_not_drive_the_scale(base, kernel):
    """It is what it is if they have no gradient at all."""
    mask = (torch.arange(64).view(8, 8) * 7 % 10 >= 5).float()
    scales = []
    for is_masked_before in (False, True):
        w = nn.Parameter(0.1 * noisy((8, 8), 0, torch.float32) * mask)
        optimizer = lodo.AutoLODO([w], base=base)
        peak = 0.0
        for step in range(600):
            w.grad = 2 * (w.detach() - 2) + noisy((8, 8), step, torch.float32)
            if is_masked_before:
                w.grad *= mask
            optimizer.step()
            with torch.no_grad():
                w.mul_(mask)
            peak = max(peak, entry_of(optimizer)["scale"][0].exp().item())
        assert_finite(optimizer)
        assert torch.equal(w == 0, mask == 0)
        assert (w[mask == 1] - 2).abs().max() < 0.5
        scales.append(peak)
    assert scales[0] < 2 * scales[1]


# ---- elements without a gradient -----------------------------------------------------------------------------------

WHERE = {
    "rows": torch.arange(32)[:, None].expand(32, 32) < 4,
    "columns": torch.arange(32)[None, :].expand(32, 32) % 5 == 0,
    "scattered": torch.arange(1024).view(32, 32) * 37 % 101 < 30,
    "a row and a column": (torch.arange(32)[:, None] == 3) | (torch.arange(32)[None, :] == 7),
}


def assert_that_they_stay(without, dtype, **options):
    w = nn.Parameter(noisy((32, 32), 1000, dtype))
    start, target = w.detach().clone(), noisy((32, 32), 1001, dtype)
    optimizer = lodo.LODO([w], **{**lodo.RECOMMENDED, **options})
    for step in range(150):
        w.grad = (w.detach() - target + 0.3 * noisy((32, 32), step, dtype)).masked_fill_(without, 0)
        optimizer.step()
        assert torch.equal(w.detach()[without], start[without]), step
    assert not torch.equal(w.detach(), start)
    assert_finite(optimizer)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("base", ["soap", "adam", None])
@pytest.mark.parametrize("places", WHERE)
def test_what_never_has_had_a_gradient_stays_exactly_where_it_is(places, base, dtype):
    assert_that_they_stay(WHERE[places], dtype, base=base)


@pytest.mark.parametrize("base", ["soap", "adam"])
def test_that_holds_for_kernels_and_plain_torch(base, where):
    assert_that_they_stay(WHERE["scattered"], torch.float32, base=base)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("places", ["rows", "scattered"])
def test_a_block_network_over_a_base_leaves_them_too(places, dtype, kernel):
    options = {"base": "adam", "preconditioner": "block_permutation", "meta_lr": 0.02, "depth": 4}
    assert_that_they_stay(WHERE[places], dtype, **options)


def test_a_row_that_gets_its_first_gradient_late_moves_then(kernel):
    w = nn.Parameter(torch.zeros(8, 8))
    optimizer = lodo.AutoLODO([w])
    for step in range(60):
        w.grad = noisy((8, 8), step, torch.float32)
        w.grad[:3] *= step >= 50
        optimizer.step()
        assert w.detach()[:3].any().item() == (step >= 50)
    assert w.detach()[:3].abs().max() < 0.05


# ---- first steps ---------------------------------------------------------------------------------------------------


def train(model, loss_of, steps, **options):
    optimizer = lodo.AutoLODO(model.parameters(), **options)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert_finite(optimizer)
    assert optimizer.skipped_steps == 0
    return losses


def assert_falls(losses):
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("seed", range(10))
def test_an_embedding_of_which_few_rows_are_used_trains(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(256, 256), nn.Linear(256, 256))
    tokens = torch.randperm(256)[:60]
    x, y = (tokens[torch.randint(60, (512,))] for _ in range(2))
    unused = torch.ones(256, dtype=torch.bool).index_fill_(0, x.unique(), False)
    before = model[0].weight.detach().clone()
    assert_falls(train(model, lambda model: F.cross_entropy(model(x), y), 6))
    assert torch.equal(model[0].weight.detach()[unused], before[unused])


def test_a_deep_network_of_relus_trains():
    layers = [layer for _ in range(16) for layer in (nn.Linear(256, 256), nn.ReLU())]
    model, x, y = nn.Sequential(*layers, nn.Linear(256, 10)), torch.randn(64, 256), torch.randint(10, (64,))
    assert_falls(train(model, lambda model: F.cross_entropy(model(x), y), 5))


def test_images_with_pixels_that_are_always_black_train_and_their_weights_stay():
    model, y = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10)), torch.randint(10, (64,))
    x, black = torch.rand(64, 784), torch.arange(784) % 28 < 8
    x[:, black] = 0
    before = model[0].weight.detach().clone()
    assert_falls(train(model, lambda model: F.cross_entropy(model(x), y), 4))
    assert torch.equal(model[0].weight.detach()[:, black], before[:, black])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_of_one_trains(dtype, kernel):
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3)).to(dtype)
    x, y = torch.randn(1, 20, dtype=dtype), torch.randn(1, 3, dtype=dtype)
    losses = train(model, lambda model: (model(x) - y).square().mean(), 200)
    assert losses[-1] < 0.01 * losses[0]


ONE = torch.outer(torch.linspace(-1, 2, 12), torch.linspace(-1, 2, 12))
SINGULAR = {
    "zeros": torch.zeros(12, 12),
    "rank one": ONE,
    "denormal": 1e-42 * ONE,
    "tiny": 1e-36 * ONE,
    "huge": 1e30 * ONE,
    "huge, with zeros": 1e30 * torch.diag((torch.arange(12) < 3).float()),
}


@pytest.mark.parametrize("average", SINGULAR)
def test_eigenbases_of_singular_averages_are_orthogonal(average):
    average, old = SINGULAR[average], torch.linalg.qr(noisy((12, 12), 3, torch.float32))[0]
    for new in (bases._eigenbasis(average, old), bases._improved(average, old)):
        assert new.dtype == torch.float32
        torch.testing.assert_close(new.T @ new, torch.eye(12), rtol=0, atol=1e-5)


def fails(*_, **__):
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


def nan_for_eigh(a, *_, **__):
    return torch.full_like(a[0], math.nan), torch.full_like(a, math.nan)


def nan_for_qr(a, *_, **__):
    return torch.full_like(a, math.nan), torch.full_like(a, math.nan)


@pytest.mark.parametrize(("name", "broken"), [("eigh", fails), ("eigh", nan_for_eigh), ("qr", nan_for_qr)])
def test_where_a_decomposition_fails_the_old_basis_is_kept_and_training_goes_on(name, broken, monkeypatch):
    old = torch.linalg.qr(noisy((12, 12), 3, torch.float32))[0]
    monkeypatch.setattr(torch.linalg, name, broken)
    found = {"eigh": bases._eigenbasis, "qr": bases._improved}[name](SINGULAR["rank one"], old)
    assert torch.equal(found, old)
    assert found is not old
    model, x = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), torch.randn(64, 6)
    losses = train(model, lambda model: (model(x) - x[:, :3].sin()).square().mean(), 100)
    assert losses[-1] < 0.7 * losses[0]


# ---- the first step over eigenbases --------------------------------------------------------------------------------


def first_step_of(g):
    """Over eigenbases, in the coordinates of the singular vectors of g; there the polar factor is the identity."""
    w = nn.Parameter(torch.zeros_like(g))
    optimizer = lodo.LODO([w], lr=1, base="soap", preconditioner="identity", beta=0.0, meta_lr=0)
    w.grad = g.clone()
    optimizer.step()
    left, _, right = torch.linalg.svd(g.double())
    return -left.T @ w.detach().double() @ right.T


@pytest.mark.parametrize("rank", [8, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_the_first_step_over_eigenbases_is_the_polar_factor_of_the_gradient(dtype, tolerance, rank, kernel):
    """Coordinates that hold nothing but rounding take no step."""
    left, right = (torch.linalg.qr(noisy((8, 8), seed))[0] for seed in (0, 1))
    values = torch.arange(8.0, 0.0, -1.0, dtype=torch.float64) * (torch.arange(8) < rank)
    step = first_step_of((left @ values.diag() @ right).to(dtype))
    torch.testing.assert_close(step[:rank, :rank], torch.eye(rank).double(), rtol=0, atol=tolerance)
    assert step.norm().item() == pytest.approx(rank**0.5, abs=tolerance)


@pytest.mark.parametrize("seed", range(4))
def test_that_holds_for_gradients_some_of_whose_singular_values_are_close(seed, kernel):
    """In float64: averages in float32 do not tell their singular vectors apart."""
    step = first_step_of(noisy((32, 32), seed))
    torch.testing.assert_close(step, torch.eye(32).double(), rtol=0, atol=1e-3)


# ---- lr ------------------------------------------------------------------------------------------------------------


def classified(factor_of, steps):
    """The worst batch loss from step 400 on, of a teacher's classification at lr 1e-3 times a factor."""
    torch.manual_seed(0)
    x = torch.randn(1024, 16)
    teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    y = (teacher(x) + 0.1 * torch.randn(1024, 4)).argmax(1)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer, g, worst = lodo.AutoLODO(model.parameters()), torch.Generator().manual_seed(0), 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * factor_of(step)
        i = torch.randint(0, 1024, (64,), generator=g)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[i]), y[i])
        loss.backward()
        optimizer.step()
        worst = max(worst, loss.item()) if step >= 20 else 0.0
    return worst


@pytest.fixture(scope="module")
def worst_at_a_constant_rate():
    return classified(lambda step: 1, 700)


@pytest.mark.parametrize("small", [1e-2, 1e-3])
def test_a_rate_that_rises_at_once_does_no_harm(small, worst_at_a_constant_rate):
    worst = classified(lambda step: small if step < 400 else 1, 700)
    assert worst < 2 * worst_at_a_constant_rate


@pytest.mark.parametrize("lr", [1e-3, 1e-1])
def test_after_a_warm_restart_steps_are_no_larger_than_before(lr, where):
    """By lr * S, up to what is learned in the one step itself."""
    w, target, cycle = nn.Parameter(torch.zeros(6, 6)), noisy((6, 6), 5, torch.float32), 40
    optimizer = lodo.AutoLODO([w], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, cycle)
    largest = 0.0
    for step in follow(optimizer, w, target, 0, 5 * cycle):
        entry = entry_of(optimizer)
        size = optimizer.param_groups[0]["lr"] * entry["scale"][0].exp().item()
        if step > 0 and step % cycle == 0:
            assert size <= max(largest, lr) * math.exp(2 * lodo.RECOMMENDED["scale_lr"])
        largest = max(largest, size)
        assert entry["scale_levels"][0].item() == pytest.approx(optimizer.param_groups[0]["lr"])
        schedule.step()
    assert_finite(optimizer)


@pytest.mark.parametrize("base", ["soap", "adam"])
def test_steps_at_lr_0_change_no_parameter_and_training_goes_on(base, where):
    w, target = nn.Parameter(torch.ones(4, 4)), torch.full((4, 4), 1.3)
    optimizer = lodo.AutoLODO([w], lr=0.0, base=base, weight_decay=0.1)
    for _ in follow(optimizer, w, target, 0, 20, noise=0.0):
        assert torch.equal(w.detach(), torch.ones(4, 4))
    optimizer.param_groups[0].update(lr=1e-2, weight_decay=0.0)
    for _ in follow(optimizer, w, target, 20, 220, noise=0.0):
        pass
    assert (w.detach() - target).abs().max() < 0.05
    assert_finite(optimizer)


# ---- the size of the loss ------------------------------------------------------------------------------------------


def test_the_unit_of_gradients_is_1_or_a_power_of_two_below_their_norm():
    for size in (2.0**-8, 0.3, 1.0, 5.0, 2.0**8):
        assert bases.next_unit(0.0, size) == 1
    assert bases.next_unit(0.0, 2.0**8 + 1) == 2.0**8
    assert bases.next_unit(0.0, 1.99 * 2.0**-9) == 2.0**-9
    assert bases.next_unit(0.0, 1e-300) == 2.0**-96
    assert bases.next_unit(0.0, 1e300) == 2.0**96
    for unit in (0.0, 2.0**-30, 1.0, 2.0**30):
        for size in (0.0, math.inf, math.nan):
            assert bases.next_unit(unit, size) == unit
    for unit in (2.0**-30, 1.0, 2.0**30):
        assert bases.next_unit(unit, 1e-12 * unit) == unit
        assert bases.next_unit(unit, 2.0**20 * unit) == unit
        assert bases.next_unit(unit, 3 * 2.0**20 * unit) == 2.0**21 * unit


def scaled_run(scale, dtype=torch.float32, steps=150, norm=None, **options):
    """Parameters, and loss over `scale`, of a regression whose first gradient has norm `norm`, if that is given."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
    x = torch.randn(128, 6, dtype=dtype)
    optimizer = lodo.AutoLODO(model.parameters(), **options)

    def loss_of():
        return (model(x) - x[:, :3].sin() * x[:, 3:]).square().mean()

    if norm is not None:
        found = torch.autograd.grad(loss_of(), list(model.parameters()))
        scale = scale * 2.0 ** round(math.log2(norm / torch.cat([g.flatten() for g in found]).norm().item()))
    for _ in range(steps):
        optimizer.zero_grad()
        (loss_of() * scale).backward()
        optimizer.step()
    assert optimizer.skipped_steps == 0
    assert_finite(optimizer)
    return [p.detach() for p in model.parameters()], loss_of().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [-66, -20, 20, 66])
def test_powers_of_two_on_the_loss_change_no_bit_if_gradients_start_between_1_and_2(k, dtype, kernel):
    expected = scaled_run(1.0, dtype, 40, norm=2**0.5)
    assert_same(scaled_run(2.0**k, dtype, 40, norm=2**0.5), expected)


@pytest.mark.parametrize("k", [-66, -20, 20, 66])
@pytest.mark.parametrize("norm", [90.0, 1 / 90.0])
def test_powers_of_two_on_the_loss_change_no_bit_but_for_what_is_added_to_roots(norm, k, monkeypatch):
    """Lest they be zero. Here the unit is 1 without the power, and not the power with it."""
    monkeypatch.setenv("LODO_NATIVE", "0")
    close = scaled_run(2.0**k, torch.float64, 40, norm=norm)[0], scaled_run(1.0, torch.float64, 40, norm=norm)[0]
    for found, expected in zip(*close, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.25 * 40 * 1e-3)
    monkeypatch.setattr(bases, "EPS", 1e-300)
    monkeypatch.setattr(meta, "EPS", 1e-300)
    assert_same(scaled_run(2.0**k, torch.float64, 40, norm=norm), scaled_run(1.0, torch.float64, 40, norm=norm))


@pytest.fixture(scope="module")
def unscaled_loss():
    return scaled_run(1.0)[1]


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
def test_the_loss_may_be_of_any_size(scale, unscaled_loss, where):
    assert scaled_run(scale)[1] == pytest.approx(unscaled_loss, rel=0.25)


@pytest.mark.parametrize("base", ["soap", "adam"])
@pytest.mark.parametrize("growth", [1e12, 1e25])
def test_gradients_that_grow_out_of_all_proportion_are_taken(growth, base, kernel):
    w = nn.Parameter(torch.zeros(6, 6))
    optimizer = lodo.AutoLODO([w], base=base)
    for step in range(80):
        w.grad = noisy((6, 6), step, torch.float32) * (growth if step >= 40 else 1)
        before = w.detach().clone()
        optimizer.step()
        assert not torch.equal(w.detach(), before)
        assert (w.detach() - before).norm() < 0.1
        assert_finite(optimizer)
    assert optimizer.skipped_steps == 0
    assert entry_of(optimizer)["steps"].item() == 80
    assert entry_of(optimizer)["unit"].item() >= growth / 2**10


@pytest.mark.parametrize("base", ["soap", "adam"])
@pytest.mark.parametrize("unit", [2.0**5, 2.0**-5])
def test_another_unit_of_gradients_changes_no_bit(unit, base, monkeypatch):
    """But for what is added to roots lest they be zero, which is left out here."""
    monkeypatch.setenv("LODO_NATIVE", "0")
    monkeypatch.setattr(bases, "EPS", 1e-300)
    monkeypatch.setattr(meta, "EPS", 1e-300)
    w, target = nn.Parameter(torch.zeros(6, 6, dtype=torch.float64)), noisy((6, 6), 1000)
    optimizer = lodo.AutoLODO([w], base=base)
    for _ in follow(optimizer, w, target, 0, 25):
        pass
    x, other = copy.deepcopy((w, optimizer))
    other._group_state(other.param_groups[0]).rescale_(unit)
    assert entry_of(other)["unit"].item() == unit
    for _ in zip(follow(optimizer, w, target, 25, 60), follow(other, x, target, 25, 60), strict=True):
        assert torch.equal(w.detach(), x.detach())


def test_another_unit_of_gradients_changes_little_with_compiled_kernels(kernel):
    w, target = nn.Parameter(torch.zeros(6, 6, dtype=torch.float64)), noisy((6, 6), 1000)
    optimizer = lodo.AutoLODO([w])
    for _ in follow(optimizer, w, target, 0, 25):
        pass
    x, other = copy.deepcopy((w, optimizer))
    other._group_state(other.param_groups[0]).rescale_(2.0**5)
    for _ in zip(follow(optimizer, w, target, 25, 60), follow(other, x, target, 25, 60), strict=True):
        torch.testing.assert_close(x.detach(), w.detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("base", ["soap", "adam"])
@pytest.mark.parametrize(("jump", "beta"), [(1e3, 0.9), (1e6, 0.9), (1e3, 0.0)])
def test_a_jump_of_the_loss_makes_no_long_steps(jump, beta, base, kernel):
    w, target = nn.Parameter(torch.zeros(8, 8)), noisy((8, 8), 1000, torch.float32)
    optimizer, norms = lodo.AutoLODO([w], base=base, beta=beta), []
    for step in range(240):
        scale = jump if step >= 200 else 1.0
        w.grad = scale * (w.detach() - target + 0.3 * noisy((8, 8), step, torch.float32))
        before = w.detach().clone()
        optimizer.step()
        norms.append((w.detach() - before).norm().item())
    assert max(norms[200:]) <= 6 * max(norms[150:200])


@pytest.mark.parametrize("base", ["soap", "adam"])
@pytest.mark.parametrize("trained", [60])
def test_parameters_coast_no_farther_than_a_dozen_steps(trained, base, where):
    w, target = nn.Parameter(torch.zeros(8, 8)), noisy((8, 8), 1000, torch.float32)
    optimizer, before = lodo.AutoLODO([w], base=base), w.detach().clone()
    for _ in follow(optimizer, w, 10 * target, 0, trained):
        last, before = (w.detach() - before).norm().item(), w.detach().clone()
    for _ in range(500):
        w.grad = torch.zeros(8, 8)
        optimizer.step()
    assert (w.detach() - before).norm().item() <= 15 * last
    assert_finite(optimizer)


# ---- weight decay --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["soap", "adam"])
@pytest.mark.parametrize("steps", [0, 100])
def test_weight_decay_is_in_proportion_to_the_scaled_rate(steps, base, where):
    lr, decay = 0.01, 0.3
    params = [nn.Parameter(noisy(shape, 7)) for shape in ((4, 5), (6,))]
    optimizer = lodo.AutoLODO(params, lr=lr, base=base)
    for step in range(steps):
        for p in params:
            p.grad = p.detach() - 1 + 0.3 * noisy(p.shape, step)
        optimizer.step()
    before = [p.detach().clone() for p in params]
    others, other = copy.deepcopy((params, optimizer))
    other.param_groups[0]["weight_decay"] = decay
    for own, each in ((params, optimizer), (others, other)):
        each.param_groups[0]["scale_lr"] = 1e-30  # the decay judges scales too
        for p in own:
            p.grad = noisy(p.shape, 9)
        each.step()
    scales = entry_of(other)["scale"][0].exp()
    assert bool((scales != 1).all()) == (steps > 0)
    for p, decayed, x, scale in zip(params, others, before, scales, strict=True):
        torch.testing.assert_close(p.detach() - decayed.detach(), lr * scale * decay * x, rtol=1e-9, atol=1e-14)


# ---- reset ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_trained():
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(8, 8))
    optimizer = lodo.AutoLODO([w])
    for _ in follow(optimizer, w, noisy((8, 8), 10**6, torch.float32), 0, 3000):
        pass
    return w, optimizer


def steps_to_follow(w, optimizer):
    """Until a new target is half reached."""
    target = w.detach() + 2 * noisy((8, 8), 10**6 + 1, torch.float32)
    half = (w.detach() - target).norm() / 2
    for step in follow(optimizer, w, target, 3000, 6000):
        if (w.detach() - target).norm() < half:
            return step - 2999
    return 3000


def test_reset_takes_back_what_is_learned_and_keeps_what_is_known(long_trained):
    _, optimizer = copy.deepcopy(long_trained)
    before = copy.deepcopy(entry_of(optimizer))
    assert before["scale"].any()
    assert before["theta"].any()
    optimizer.reset()
    after = entry_of(optimizer)
    assert after["reset_at"].item() == after["steps"].item() == 3000
    for name in ("scale", "moves", "scale_levels", "theta", "theta_exp_avg", "theta_exp_avg_sq", "meta_step"):
        assert not after[name].any(), name
    for name in ("base_exp_avg_sq", "base_factors", "base_seen", "momenta", "momentum", "unit", "steps", "skipped"):
        assert torch.equal(after[name], before[name]), name
    torch.testing.assert_close(after["mixture"][0].softmax(0)[1].item(), 0.9)


def test_after_a_reset_a_new_target_is_followed_at_least_twice_as_fast(long_trained):
    w, optimizer = copy.deepcopy(long_trained)
    without = steps_to_follow(w, optimizer)
    w, optimizer = copy.deepcopy(long_trained)
    optimizer.reset()
    assert steps_to_follow(w, optimizer) <= without / 2


def test_after_a_reset_the_rates_are_as_at_the_start(long_trained):
    """Scales move by their whole rate again, which 5 / t had bounded."""
    moved = []
    for is_reset in (False, True):
        w, optimizer = copy.deepcopy(long_trained)
        if is_reset:
            optimizer.reset(0)
        target = w.detach() + 10
        scales = [entry_of(optimizer)["scale"][0].item() for _ in follow(optimizer, w, target, 3000, 3040, noise=0.0)]
        moved.append(max(abs(b - a) for a, b in pairwise(scales[20:])))
    assert moved[0] < 5 * 5 / 3000
    assert moved[1] > 0.01


@pytest.mark.parametrize("group", [1, -1, True, False, "0", 0.0])
def test_reset_refuses_groups_that_there_are_not(group, long_trained):
    _, optimizer = copy.deepcopy(long_trained)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"^group must be None or 0 to 0, got "):
        optimizer.reset(group)
    assert_same(optimizer.state_dict(), before)


def test_reset_of_one_group_leaves_the_others():
    params = [nn.Parameter(torch.zeros(4, 4)) for _ in range(2)]
    optimizer = lodo.AutoLODO([{"params": [p]} for p in params])
    optimizer.reset()  # before there is anything
    for step in range(30):
        for p in params:
            p.grad = noisy((4, 4), step, torch.float32)
        optimizer.step()
    before = copy.deepcopy(optimizer.state[params[0]])
    optimizer.reset(1)
    assert_same(dict(optimizer.state[params[0]]), before)
    assert entry_of(optimizer, 1)["reset_at"].item() == 30
    assert not entry_of(optimizer, 1)["scale"].any()


@pytest.mark.parametrize("base", ["soap", "adam"])
def test_a_run_that_was_reset_is_resumed_bit_for_bit(base, where):
    w, target = nn.Parameter(torch.zeros(5, 6)), noisy((5, 6), 1000, torch.float32)
    optimizer = lodo.AutoLODO([w], base=base)
    for _ in follow(optimizer, w, target, 0, 40):
        pass
    optimizer.reset()
    for after in (0, 7):
        for _ in follow(optimizer, w, target, 40, 40 + after):
            pass
        x = nn.Parameter(w.detach().clone())
        other = lodo.AutoLODO([x], base=base)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        y, kept = copy.deepcopy((w, optimizer))
        for _ in zip(follow(kept, y, target, 50, 80), follow(other, x, target, 50, 80), strict=True):
            assert torch.equal(x.detach(), y.detach())
        assert_same(other.state_dict(), kept.state_dict())


# ---- saves at odd moments, and steps that are skipped --------------------------------------------------------------


@pytest.mark.parametrize("base", ["soap", "adam"])
@pytest.mark.parametrize("moment", ["before the clamp", "after the clamp"])
def test_a_clamped_run_is_resumed_bit_for_bit(moment, base, where):
    target, saved = 3 * noisy((5, 6), 1000, torch.float32), None
    w = nn.Parameter(torch.zeros(5, 6))
    optimizer = lodo.AutoLODO([w], lr=0.02, base=base)

    def save(now, step):
        return (step, w.detach().clone(), copy.deepcopy(optimizer.state_dict())) if now == moment else None

    for step in follow(optimizer, w, target, 0, 120):
        saved = save("before the clamp", step) if step == 77 else saved
        w.data.clamp_(-1, 1)
        saved = saved or (save("after the clamp", step) if step == 77 else None)
    assert (w.detach().abs() == 1).any()
    x = nn.Parameter(saved[1])
    other = lodo.AutoLODO([x], base=base)
    other.load_state_dict(saved[2])
    x.data.clamp_(-1, 1)  # which changes nothing where it was saved after
    for _ in follow(other, x, target, 78, 120):
        x.data.clamp_(-1, 1)
    assert torch.equal(x.detach(), w.detach())
    assert_same(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_skipped_steps_are_told_of_at_the_1st_the_10th_and_the_100th(bad, where):
    w = nn.Parameter(torch.ones(3, 3))
    optimizer = lodo.AutoLODO([w])
    w.grad = torch.ones(3, 3)
    optimizer.step()
    before, told = w.detach().clone(), []
    for count in range(1, 106):
        w.grad = torch.ones(3, 3)
        w.grad[0, 0] = bad
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            optimizer.step()
        told += [count] * len(found)
        assert all(f"{count} since the optimizer" in str(each.message) for each in found)
        assert all(each.filename == __file__ for each in found)
    assert told == [1, 10, 100]
    assert optimizer.skipped_steps == 105
    assert torch.equal(w.detach(), before)
    w.grad = torch.ones(3, 3)
    optimizer.step()
    assert (w.detach() < before).all()
