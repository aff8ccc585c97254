"""The two bounds that are off by default: `max_step_norm` and `max_condition`."""

import math
import warnings

import pytest
import torch
from torch import nn

import lodo
from benchmarks.faults import divergence
from lodo import scalars
from lodo.preconditioners.singular_values import clamp_, extremes, squares_between
from tests.helpers import oracle


def steps_of(optimizer, x, count, seed=0):
    """Steps on random gradients; yields the parameters before and after each."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x.grad = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        before = x.detach().clone()
        optimizer.step()
        yield before, x.detach().clone()


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_no_step_is_longer_than_its_bound(kind, kernel):
    x = nn.Parameter(torch.linspace(-1, 1, 23, dtype=torch.float64))
    optimizer = lodo.LODO([x], lr=2.0, meta_lr=0.02, preconditioner=kind, max_step_norm=0.1)
    ratios = [((after - before).norm() / before.norm()).item() for before, after in steps_of(optimizer, x, 12)]
    assert max(ratios) == pytest.approx(0.1, rel=1e-12)
    x = nn.Parameter(torch.linspace(-1, 1, 23, dtype=torch.float64))
    free = lodo.LODO([x], lr=2.0, meta_lr=0.02, preconditioner=kind)
    assert max(((after - before).norm() / before.norm()).item() for before, after in steps_of(free, x, 12)) > 0.2


def test_a_shortened_step_is_the_step_of_a_smaller_lr(kernel):
    """To the hypergradient too: an optimizer whose lr is set to what was made of it goes the same way."""
    bounded = nn.Parameter(torch.ones(9, dtype=torch.float64))
    free = nn.Parameter(torch.ones(9, dtype=torch.float64))
    first = lodo.LODO([bounded], lr=1.0, meta_lr=0.05, max_step_norm=0.05)
    second = lodo.LODO([free], lr=1.0, meta_lr=0.05)
    made = []
    for seed in range(8):
        torch.manual_seed(seed)
        bounded.grad = torch.randn(9, dtype=torch.float64) * (0.01 if seed == 5 else 1)
        free.grad = bounded.grad.clone()
        first.step()
        made.append(first.state[bounded]["last_lr"].item())
        second.param_groups[0]["lr"] = made[-1]
        second.step()
        torch.testing.assert_close(bounded, free, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(first.preconditioners[0].theta, second.preconditioners[0].theta, rtol=0, atol=1e-12)
    assert min(made) < 0.5


def test_parameters_at_zero_can_leave_it_and_weight_decay_comes_on_top():
    x = nn.Parameter(torch.zeros(4))
    optimizer = lodo.LODO([x], max_step_norm=0.5, beta=0.0, weight_decay=0.1)
    x.grad = torch.ones(4)
    optimizer.step()
    torch.testing.assert_close(x.detach(), torch.full((4,), -0.5e-3))
    before = x.detach().clone()
    optimizer.step()
    step = 0.9 * before - x.detach()
    assert step.norm().item() == pytest.approx(0.5 * 1e-3 * 2, rel=1e-4)


@pytest.mark.parametrize("weight_decay", [0.0, 1e-31])
@pytest.mark.parametrize("readable", [True, False])
def test_a_step_that_overflows_moves_nothing_and_is_counted(readable, weight_decay, monkeypatch):
    if not readable:
        monkeypatch.setattr(scalars, "is_readable", lambda tensor: False)
    x = nn.Parameter(torch.ones(5))
    optimizer = lodo.LODO([x], lr=1e30, meta_lr=0.0, beta=0.0, max_step_norm=0.1, weight_decay=weight_decay)
    x.grad = torch.full((5,), 1e18)
    with pytest.warns(UserWarning, match="overflowed"):
        optimizer.step()
    assert torch.equal(x.detach(), torch.ones(5))
    assert optimizer.skipped_steps == 1
    x.grad = torch.full((5,), 1e-3)
    optimizer.step()
    assert (x.detach() < 1).all()
    assert optimizer.skipped_steps == 1


def test_what_does_not_move_does_not_count_for_the_bound():
    moved, still = nn.Parameter(torch.ones(3)), nn.Parameter(torch.full((3,), 100.0))
    optimizer = lodo.LODO([moved, still], lr=1.0, beta=0.0, max_step_norm=0.1)
    for _ in range(3):
        before = moved.detach().clone()
        moved.grad = torch.tensor([1.0, -2.0, 3.0])
        optimizer.step()
        assert ((moved.detach() - before).norm() / before.norm()).item() == pytest.approx(0.1, rel=1e-4)
    assert torch.equal(still.detach(), torch.full((3,), 100.0))


@pytest.mark.parametrize("options", [{}, {"depth": 3, "block_size": 3, "expansion": 1}, {"permutation": "shuffle"}])
def test_the_condition_of_g_is_bounded(options, kernel):
    x = nn.Parameter(torch.zeros(14, dtype=torch.float64))
    optimizer = lodo.LODO([x], lr=0.1, meta_lr=0.3, max_condition=9.0, **options)
    for _ in steps_of(optimizer, x, 10):
        g = optimizer.preconditioners[0]
        eigenvalues = torch.linalg.eigvalsh(g.to_dense())
        assert eigenvalues[0] >= 9**-0.5 * (1 - 1e-9)
        assert eigenvalues[-1] <= 9**0.5 * (1 + 1e-9)
        radius = 9 ** (1 / (4 * g.options["depth"]))
        smallest, largest = extremes(g.theta)
        assert smallest >= 1 / radius * (1 - 1e-5)
        assert largest <= radius * (1 + 1e-5)
    x = nn.Parameter(torch.zeros(14, dtype=torch.float64))
    free = lodo.LODO([x], lr=0.1, meta_lr=0.3, **options)
    for _ in steps_of(free, x, 10):
        pass
    assert torch.linalg.eigvalsh(free.preconditioners[0].to_dense())[-1] > 9**0.5


@pytest.mark.parametrize("bound", [{"max_step_norm": 0.02}, {"max_condition": 2.0}])
def test_bounded_steps_are_the_same_on_every_device(bound, device):
    ends = []
    for place in (torch.device("cpu"), device):
        x = nn.Parameter(torch.linspace(-1, 1, 30, dtype=torch.float64, device=place))
        optimizer = lodo.LODO([x], lr=0.5, meta_lr=0.1, **bound)
        for step in range(6):
            x.grad = (x.detach() * (step + 1)).cos()
            optimizer.step()
        ends.append((x.detach().cpu(), optimizer.preconditioners[0].blocks.cpu()))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["diagonal", "scalar"])
def test_a_bounded_diagonal_stays_positive(kind):
    x = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = lodo.LODO([x], lr=0.1, meta_lr=0.9, beta=0.0, preconditioner=kind, max_condition=16.0)
    reached = set()
    for step in range(40):
        x.grad = torch.full_like(x, 1.0 if step < 8 else (-1.0) ** step)  # longer steps, then shorter ones are better
        optimizer.step()
        weight = optimizer.preconditioners[0].weight
        assert 0.25 <= weight.min() <= weight.max() <= 4
        reached |= {weight.min().item(), weight.max().item()}
    assert {0.25, 4.0} <= reached


@pytest.mark.parametrize("kind", ["block_permutation", "diagonal", "scalar"])
def test_bounds_that_nothing_reaches_leave_every_bit(kind, kernel):
    ends = []
    for options in ({}, {"max_condition": 1e12, "max_step_norm": 1e9}):
        x = nn.Parameter(torch.ones(21))
        optimizer = lodo.LODO([x], lr=0.1, meta_lr=0.01, weight_decay=0.1, preconditioner=kind, **options)
        for _ in steps_of(optimizer, x, 6):
            pass
        ends.append((x.detach(), optimizer.preconditioners[0].theta))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("block", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("spread", [0.01, 0.3, 2.0])
def test_blocks_are_clamped_to_the_nearest_inside(block, spread):
    generator = torch.Generator().manual_seed(block)
    noise = torch.randn(2, block, block, 50, generator=generator, dtype=torch.float64)
    theta = torch.eye(block, dtype=torch.float64)[None, :, :, None] + spread * noise
    low, high = 0.8, 1.3
    before = theta.clone()
    left, values, right = torch.linalg.svd(theta.permute(0, 3, 1, 2))
    clamp_(theta, low, high)
    is_inside = ((values >= low) & (values <= high)).all(-1)[:, None, None].expand_as(theta)
    assert torch.equal(theta[is_inside], before[is_inside])
    slack = (high / low) ** 0.05
    nearest = (left * values.clamp(low * slack, high / slack).unsqueeze(-2) @ right).permute(0, 2, 3, 1)
    torch.testing.assert_close(theta[~is_inside], nearest[~is_inside], rtol=0, atol=1e-12)


def test_blocks_that_are_not_finite_are_left_alone_and_have_no_extremes():
    theta = torch.ones(1, 2, 2, 3)
    theta[0, 0, 0, 1] = math.inf
    clamp_(theta, 0.5, 2.0)
    assert math.isinf(theta[0, 0, 0, 1])
    assert torch.equal(theta[0, :, :, 1], torch.tensor([[math.inf, 1], [1, 1]]))
    assert all(map(math.isnan, extremes(theta)))
    assert all(map(math.isnan, extremes(torch.empty(0, 2, 2, 3))))


@pytest.mark.parametrize("block", [1, 2, 4, 7])
def test_singular_values_lie_between_their_bounds_and_extremes_are_found(block):
    theta = torch.randn(3, block, block, 400, generator=torch.Generator().manual_seed(block), dtype=torch.float64)
    values = torch.linalg.svdvals(theta.permute(0, 3, 1, 2))
    for blocks, own in zip(theta, values, strict=True):
        low, high = squares_between(blocks)
        assert (own[:, -1] ** 2 >= low - 1e-9).all()
        assert (own[:, 0] ** 2 <= high + 1e-9).all()
    assert extremes(theta) == pytest.approx((values.min().item(), values.max().item()), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"max_step_norm": -0.1}, ">= 0"),
        ({"max_step_norm": "small"}, "or None"),
        ({"max_condition": 0.9}, ">= 1"),
        ({"max_condition": math.inf}, "finite"),
        ({"max_condition": 10.0, "preconditioner": "residual"}, "must be None with preconditioner='residual'"),
        ({"max_condition": 10.0, "preconditioner": oracle.fresh("residual", 2)}, "must be None with"),
        ({"max_condition": 10.0, "capturable": True}, "capturable=True"),
    ],
)
def test_bounds_out_of_range_are_refused_by_name(options, allowed):
    with pytest.raises(ValueError, match=next(iter(options))) as error:
        lodo.LODO([nn.Parameter(torch.zeros(2))], **options)
    assert allowed in str(error.value)


@pytest.fixture
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("bound", ["max_step_norm=0.01", "max_condition=100"])
@pytest.mark.parametrize("seed", [0, 2])
def test_each_bound_rescues_a_run_that_diverges_without_it(bound, seed):
    pytest.importorskip("sklearn")
    rates = divergence.RATES["meta_lr ten times too large"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LODO skipped a step")
        assert not divergence.final_loss(seed, 200, **rates) < 10
    assert divergence.final_loss(seed, 200, **rates, **divergence.BOUNDS[bound]) < 1
