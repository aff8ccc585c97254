"""What holds parameters in place: bounds that are set after each step, masks, and elements without a gradient."""

import copy

import pytest
import torch
from torch import nn

import lodo
from tests.helpers.habits import assert_finite, follow, noisy
from tests.helpers.parts import state_of
from tests.helpers.states import assert_same

# ---- bounds: moves that somebody takes back --------------------------------------------------------------------------


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
            peak = max(peak, state_of(optimizer)["scale"][0].exp().item())
        assert_finite(optimizer)
        assert torch.equal(w == 0, mask == 0)
        assert (w[mask == 1] - 2).abs().max() < 0.5
        scales.append(peak)
    assert scales[0] < 2 * scales[1]


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


# ---- elements without a gradient -------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["soap", "adam", None])
@pytest.mark.parametrize("places", WHERE)
def test_what_never_has_had_a_gradient_stays_exactly_where_it_is(places, base, dtype):
    assert_that_they_stay(WHERE[places], dtype, base=base)


@pytest.mark.parametrize("base", ["soap", "adam"])
def test_that_holds_for_kernels_and_plain_torch(base, where):
    assert_that_they_stay(WHERE["scattered"], torch.float32, base=base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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
