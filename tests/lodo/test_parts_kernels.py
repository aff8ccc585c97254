"""The compiled passes over a diagonal G with its parts (`lodo.update.Fused`) against the plain form (`Plain`) on the
same tensors: a step, of one cohort and of several, and trainings."""

import copy
import math
from itertools import product

import pytest
import torch

import lodo
from lodo.parts.mixture import COAST
from lodo.parts.tensor_scale import LARGEST_LOG
from lodo.scalars import is_tensor
from lodo.update import Fused, Plain
from tests.helpers.kernel_groups import (
    COHORTS,
    DECAYS,
    FIRST,
    LENGTHS,
    Group,
    agree,
    agree_in_tables,
    both,
    dtypes,
    each_partition,
    each_update,
    partitions,
    random,
    several,
    sizes,
    with_threads,
)
from tests.helpers.kernels import needs_compiler
from tests.helpers.parts import backward, built, flat, state_of

pytestmark = needs_compiler


# ---- one step ------------------------------------------------------------------------------------------------------

STILL = {"scale_lr": 1e-300}  # scales that learn, and stay: their sums in the two forms differ by more than roundings
CASES = {
    "all parts": {},
    "inner SGD": {"inner": "sgd", "meta_lr": 1e-9},
    "inner SGD over moments": {"meta_optimizer": "sgd", "meta_lr": 1e-9},
    "no network": {"network": "identity"},
    "no base": {"base": None},
    "no scale": {"scale": False, "scale_lr": 0.0},
    "no trace": {"trace_decay": 0.0},
    "one momentum": {"mixture": False},
    "one momentum, mostly forgotten": {"mixture": False, "beta": 0.2},
    "one momentum, no trace": {"mixture": False, "trace_decay": 0.0},
    "one momentum, no base": {"mixture": False, "base": None},
    "nothing that learns": {"network": "identity", "mixture": False},
    "frozen": {"meta_lr": 0.0},
    "bounded": {"max_condition": 4.0},
    "another unit": {"unit": 2.0**-7},
}
COUNTED = {
    "the first step": {"steps": 1, "age": 1, "inner_steps": 1},
    "the second step": {"steps": 2, "age": 2, "inner_steps": 2},
    "a late step": {"steps": 50_000, "age": 50_000, "inner_steps": 50_000},
    "soon after a reset": {"steps": 50_000, "age": 3, "inner_steps": 3},
    "a step of length zero before": {"last_lr": 0.0},
    "a step without learning": {"learning": False},
    "a step of a larger lr": {"lr": 3.0},
}


def check_a_step(found, expected, dtype, **changes):
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(found.gains(), expected.gains(), rtol=32 * rounding, atol=0)
    step, plain_step = found.step(**changes), expected.step(**changes)
    torch.testing.assert_close(found.gains(), expected.gains(), rtol=200 * rounding, atol=0)
    has_gain = expected.gains() > 0
    agree((step / found.gains())[has_gain], (plain_step / expected.gains())[has_gain], 100)
    assert not step[~has_gain].any()
    assert not plain_step[~has_gain].any()
    others = expected.kept()
    for name, tensor in found.kept().items():
        tolerance = 1e-3 if dtype == torch.float32 else 1e-9
        if name in ("mixture", "scale"):
            agree_in_tables(tensor, others[name], tolerance)
        elif name in ("progress", "recent_energy"):  # of sums too
            torch.testing.assert_close(tensor, others[name], rtol=1e-2 * tolerance, atol=1e-2 * tolerance)
        elif tensor.is_floating_point():
            agree(tensor, others[name], 100 if tensor.dtype == dtype else 2)
        else:
            assert torch.equal(tensor, others[name])


@partitions
@dtypes
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_is_that_of_the_plain_form(lengths, dtype, cohorts, case):
    found, expected = both(lengths, dtype, cohorts=cohorts, **{**STILL, **case})
    assert Fused.can_run(expected.update)
    check_a_step(found, expected, dtype)


@sizes
@dtypes
@pytest.mark.parametrize("case", COUNTED.values(), ids=COUNTED)
def test_a_step_of_any_count_is_that_of_the_plain_form(lengths, dtype, case):
    check_a_step(*both(lengths, dtype, **STILL), dtype, **case)


@dtypes
@each_partition
def test_moments_in_bfloat16_are_those_of_the_plain_form(dtype, cohorts):
    options = {**STILL, "meta_state_dtype": "bfloat16", "cohorts": cohorts}
    found, expected = both(LENGTHS["several"], dtype, **options)
    before = found.kept()
    check_a_step(found, expected, dtype)
    assert not torch.equal(found.kept()["theta_exp_avg"], before["theta_exp_avg"])
    assert found.moments[0].dtype == torch.bfloat16


@partitions
@dtypes
@pytest.mark.parametrize("case", ["all parts", "no network", "no scale", "another unit"])
def test_a_mixture_learns_in_a_step_as_in_plain_float64(lengths, dtype, cohorts, case):
    """Sums over many float32 numbers too: the kernel adds up few of them in float32."""
    options = {**STILL, **CASES[case], "cohorts": cohorts}
    found, expected = Group(lengths, dtype, **options), Group(lengths, dtype, Plain, True, **options)
    before = found.kept()["mixture"]
    found.step(), expected.step()
    mixture = found.kept()["mixture"]
    for cohort in found.cohorts:
        for place in cohort.places:
            if lengths[place] > 0 and cohort.active and cohort.last_lr > 0:
                assert (mixture[place] != before[place]).all()
    agree_in_tables(mixture, expected.kept()["mixture"], 1e-4 if dtype == torch.float32 else 1e-9)


@dtypes
@each_update
@each_partition
def test_what_a_step_does_not_teach_it_leaves_alone(dtype, update, cohorts):
    lengths = LENGTHS["several"]
    for change in ({"steps": 1}, {"steps": 2}, {"last_lr": 0.0}):
        group = Group(lengths, dtype, update, cohorts=cohorts, largest_log=18.0)
        before = group.kept()
        group.step(**change)
        # After one step the corrected momenta are the same, and a step of length zero tells nothing of its direction.
        assert torch.equal(group.kept()["mixture"], before["mixture"])
        assert torch.equal(group.kept()["scale"], before["scale"]) == ("last_lr" in change)
    for options, change in (({"meta_lr": 0.0}, {}), ({}, {"learning": False})):
        group = Group(lengths, dtype, update, cohorts=cohorts, **options)
        before = group.kept()
        group.step(**change)
        for name in ("theta", "theta_exp_avg", "theta_exp_avg_sq"):
            assert torch.equal(group.kept()[name], before[name])
        assert not torch.equal(group.kept()["mixture"], before["mixture"])


def as_tensor(number):
    """On an accelerator nothing is read."""
    return torch.tensor(number) if isinstance(number, bool) else torch.tensor(float(number), dtype=torch.float64)


INACTIVE = ["all parts", "inner SGD", "one momentum, no trace", "no base", "no scale", "no network"]


@dtypes
@pytest.mark.parametrize(("update", "as_numbers"), [(Fused, None), (Plain, None), (Plain, as_tensor)])
@pytest.mark.parametrize("case", INACTIVE)
def test_an_inactive_step_leaves_every_bit(dtype, update, as_numbers, case):
    options = {"largest_log": 18.0, **CASES[case], **({} if as_numbers is None else {"as_numbers": as_numbers})}
    inactive = FIRST._replace(active=False, learning=False)
    group = Group(LENGTHS["several"], dtype, update, cohorts=(inactive,), **options)
    before, gains = group.kept(), group.gains()
    assert torch.equal(group.step(), torch.zeros_like(group.g))
    for name, tensor in group.kept().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(group.gains(), gains)


@several
@dtypes
@pytest.mark.parametrize(("update", "as_numbers"), [(Fused, None), (Plain, None), (Plain, as_tensor)])
@pytest.mark.parametrize("case", INACTIVE)
def test_a_cohort_that_is_not_active_keeps_every_bit_and_has_no_step(lengths, dtype, update, as_numbers, case):
    """While the others take theirs."""
    options = {"largest_log": 18.0, **CASES[case], **({} if as_numbers is None else {"as_numbers": as_numbers})}
    group = Group(lengths, dtype, update, cohorts=COHORTS["several cohorts"], **options)
    before = group.kept()
    step, is_active, after = group.step(lr=3.0), group.is_active(), group.kept()
    assert not step[~is_active].any()
    assert step[is_active].all()
    for cohort in group.cohorts:
        for place in cohort.places:
            for name, tensor in after.items():
                own, former = group.own(name, tensor, place), group.own(name, before[name], place)
                if not cohort.active:
                    assert torch.equal(own, former), (name, place)
                elif name == "momentum" and lengths[place] > 0:
                    assert not torch.equal(own, former), place


@partitions
@dtypes
@pytest.mark.parametrize("mixture", [False, True])
def test_momenta_of_idle_parameters_decay_at_least_as_fast_as_coasting(lengths, dtype, cohorts, mixture):
    groups = both(lengths, dtype, cohorts=cohorts, mixture=mixture, **STILL)
    active = [place for cohort in groups[0].cohorts if cohort.active for place in cohort.places]
    idle = [place in active and place % 2 == 0 for place in range(len(lengths))]
    for group in groups:
        for part, is_idle in zip(group.g.split(lengths), idle, strict=True):
            part.mul_(not is_idle)
    before = groups[0].kept()["momenta"].split(lengths, dim=1)
    check_a_step(*groups, dtype, idle=idle)
    after = groups[0].kept()["momenta"].split(lengths, dim=1)
    for momenta, former, is_idle in zip(after, before, idle, strict=True):
        for decay, momentum, last in zip(DECAYS, momenta, former, strict=True):
            if mixture and is_idle:
                agree(momentum, last * min(decay, COAST))


@dtypes
@each_partition
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_threads_do_not_change_a_bit(dtype, cohorts, case):
    """Of what is large enough to wake four, tensors that end within a chunk of it included."""
    lengths = LENGTHS["several threads"]

    def work():
        group = Group(lengths, dtype, cohorts=cohorts, **case)
        energies = torch.tensor(group.update.energies(group.g))
        return [energies, group.gains(), group.step(), group.gains(), *group.kept().values()]

    for one, four in zip(with_threads(1, work), with_threads(4, work), strict=True):
        assert torch.equal(one, four)


@sizes
@dtypes
@pytest.mark.parametrize("size", [1.0, "huge", "tiny"])
def test_sums_of_squares_are_those_of_the_plain_form(lengths, dtype, size):
    """Also where those of the gradients' own dtype overflow or vanish."""
    found, expected = both(lengths, dtype)
    largest = torch.finfo(dtype).max ** (0.49 if dtype == torch.float64 else 0.9)
    g = found.g * {"huge": largest, "tiny": 1 / largest}.get(size, size)
    sums = torch.tensor(found.update.energies(g), dtype=torch.float64)
    exact = torch.stack([part.double().square().sum() for part in g.split(lengths)])
    torch.testing.assert_close(sums, torch.tensor(expected.update.energies(g), dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(sums, exact, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)
    for bad in BAD:
        g[0] = bad
        for update in (found.update, expected.update):
            assert [math.isfinite(total) for total in update.energies(g)] == [
                length == 0 or place > next(i for i, own in enumerate(lengths) if own > 0)
                for place, length in enumerate(lengths)
            ]


def test_over_eigenbases_what_is_rounding_has_no_gain(kernel):
    """Of coordinates that rotations make of others; of a vector's own none is."""
    params = [torch.nn.Parameter(random(*shape, seed=7)) for shape in ((30, 40), (50,), (9, 8))]
    optimizer = lodo.LODO(params, lr=0.01, base="soap", preconditioner="log_diagonal", meta_lr=0.01)
    for step in range(4):
        for p in params:
            p.grad = random(*p.shape, seed=step)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["exp_avg_sq"].view(-1)[::7] = 1e-33 * entry["exp_avg_sq"].sum()
        entry["exp_avg_sq"].view(-1)[1::7] = 1e-25 * entry["exp_avg_sq"].sum()
    optimizer.load_state_dict(saved)
    gains = optimizer.preconditioners[0].apply(torch.ones(1200 + 50 + 72, dtype=torch.float64))
    for gain, is_rotated in zip(gains.split([1200, 50, 72]), (True, False, True), strict=True):
        assert gain[::7].eq(0).all() == is_rotated
        assert gain[1::7].all()


# ---- what tables learn from ----------------------------------------------------------------------------------------


@partitions
@dtypes
def test_scales_learn_as_their_plain_form_does_in_float64(lengths, dtype, cohorts):
    options = {"cohorts": cohorts, "largest_log": 3.0}
    found, expected = Group(lengths, dtype, **options), Group(lengths, dtype, Plain, True, **options)
    before = found.kept()
    for group in (found, expected):
        group.step()
    for name in ("scale", "scale_peak"):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-9
        torch.testing.assert_close(found.tensors[name], expected.tensors[name], rtol=tolerance, atol=tolerance)
    for cohort in found.cohorts:
        has_moved = bool(cohort.active) and cohort.last_lr > 0
        for place in cohort.places:
            assert torch.equal(found.tensors["scale"][place], before["scale"][place]) != has_moved


@partitions
@dtypes
def test_a_step_that_is_given_judges_scales_as_in_plain_float64(lengths, dtype, cohorts):
    """As with weight decay, where it is more than the momentum makes of it."""
    options = {"cohorts": cohorts, "largest_log": 3.0, "weight_decay": 0.1}
    found, expected = Group(lengths, dtype, **options), Group(lengths, dtype, Plain, True, **options)
    before, step = found.kept(), random(sum(lengths), dtype=dtype, seed=20) - found.g
    for group in (found, expected):
        group.update.begin_(group.context())
        group.update.learn_from_step_(group.g, step.to(group.g.dtype), group.context())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    for name in ("scale", "scale_peak", "progress"):
        torch.testing.assert_close(found.tensors[name], expected.tensors[name], rtol=tolerance, atol=tolerance)
    for cohort in found.cohorts:
        for place in cohort.places:
            has_moved = bool(cohort.active) and cohort.last_lr > 0 and lengths[place] > 0
            assert (found.tensors["progress"][place] != before["progress"][place]) == has_moved


@dtypes
@each_update
def test_the_peak_of_a_scale_is_of_the_largest_step(dtype, update):
    """lr * S, of parameters that take one."""
    group = Group(LENGTHS["several"], dtype, update, cohorts=COHORTS["several cohorts"], largest_log=3.0)
    group.tensors["scale_peak"].fill_(1e-3)
    group.step(lr=0.15)
    s = group.tensors["scale"][:, 0].exp()
    for cohort in group.cohorts:
        for place in cohort.places:
            expected = max(1e-3, 0.15 * float(s[place]) if cohort.active else 0.0)
            assert float(group.tensors["scale_peak"][place]) == pytest.approx(expected)


@sizes
@dtypes
@pytest.mark.parametrize("power", [-1.0, 1.0, 100.0])
def test_scales_multiply_within_their_bound(lengths, dtype, power):
    scale, vector = Group(lengths, dtype).scale, random(sum(lengths), dtype=dtype, seed=5)
    before = vector.clone()
    found = scale.times(vector, power)
    assert torch.equal(vector, before)
    factors = (power * scale.tensors["scale"][:, 0]).clamp(-LARGEST_LOG, LARGEST_LOG).exp()
    expected = factors.repeat_interleave(torch.tensor(lengths)) * vector
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=0)


BAD = (float("nan"), float("inf"), -float("inf"))


@dtypes
@pytest.mark.parametrize("bad", BAD)
def test_products_that_are_not_finite_count_as_zero(dtype, bad):
    lengths = [3, 5000, 4]

    def learned(group, momentum, gradient):
        momenta = group.tensors["momenta"]
        momenta[1, 4000] = momentum  # of one decay on the second tensor
        momenta[1, 3:4000], momenta[1, 4001:5003] = 0, 0
        group.g[-1] = gradient  # for all decays of the third, and its scale
        group.g[-4:-1] = 0
        group.step()
        return group.tensors["mixture"], group.tensors["scale"]

    options = {"largest_log": 3.0}
    found, expected = (
        learned(Group(lengths, dtype, **options), bad, bad),
        learned(Group(lengths, dtype, **options), 0, 0),
    )
    wide = learned(Group(lengths, dtype, Plain, True, **options), bad, bad)
    for own, zeroed, plain in zip(found, expected, wide, strict=True):
        assert torch.equal(own, zeroed)
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-4)


@each_update
def test_products_whose_squares_would_overflow_are_bounded_alike(update):
    """So that a second moment stays finite, and comes down again."""

    def learned(update):
        group = Group([5, 7], torch.float64, update, largest_log=0.0)
        group.g[2] = 1e160
        group.step()
        return group.tensors["mixture"], group.tensors["scale"]

    for found, expected in zip(learned(update), learned(Plain), strict=True):
        assert found.isfinite().all()
        assert found[:, 2].max() > 1e300
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# ---- training ------------------------------------------------------------------------------------------------------

SHAPES = ((3, 4), (5,), (), (2, 3, 2), (0, 3), (1,))
PARTS = {
    "momentum_decays": (0.0, 0.9, 0.99),
    "mix_lr": 0.02,
    "trace_decay": 0.7,
    "scale_lr": 0.02,
    "scale_trace_decay": 0.9,
    "meta_lr": 0.01,
}
INNER = ({}, {"meta_optimizer": "sgd"}, {"meta_state_dtype": "bfloat16"})


def trained(kind, absent=False, **options):
    """Without a gradient of some parameters at some steps, if they are to be absent: then there are several cohorts."""
    params, optimizer = built(kind, SHAPES, **options)
    for step in range(40):
        backward(params)
        for place in (1, 3) if absent else ():
            if step % (place + 2) == 0:
                params[place].grad = None
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize(
    ("kind", "inner"),
    [("identity", {}), *product(("log_diagonal", "block_permutation"), INNER)],  # the first has no inner optimizer
    ids=str,
)
@pytest.mark.parametrize("base", [None, "adam", "soap"])
@pytest.mark.parametrize("absent", [False, True])
def test_a_training_is_the_same_without_the_kernels(absent, base, kind, inner, monkeypatch):
    params, optimizer = trained(kind, absent, base=base, **PARTS, **inner)
    monkeypatch.setenv("LODO_NATIVE", "0")
    others, other = trained(kind, absent, base=base, **PARTS, **inner)
    torch.testing.assert_close(flat(params), flat(others), rtol=0, atol=1e-9)
    assert (flat(params) - flat(built(kind, SHAPES)[0])).abs().max() > 0.1
    found, expected = state_of(optimizer), state_of(other)
    assert found.keys() == expected.keys() >= {"momenta", "mixture", "momentum_trace", "scale", "step_trace"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: name + text)
    assert (found["mixture"][0] - found["mixture"][0, :, :1]).abs().max() > 1e-3  # weights that differ by tensor


@pytest.mark.parametrize("kind", ["log_diagonal", "block_permutation"])
def test_a_scale_that_has_fallen_below_all_numbers_ruins_nothing(kind, kernel):
    """float32 has no exp(100): its tensor stands still, and neither the network nor the others hear of an infinity."""
    params = [torch.nn.Parameter(random(*shape, dtype=torch.float32)) for shape in ((3, 4), (5,))]
    optimizer = lodo.LODO(params, lr=0.01, preconditioner=kind, depth=3, base="adam", **{**PARTS, "trace_decay": 0.0})
    for step in range(8):
        if step == 3:
            saved = copy.deepcopy(optimizer.state_dict())
            saved["state"][0]["scale"][0] = -100
            optimizer.load_state_dict(saved)
            before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = p.detach().sin()
        optimizer.step()
    assert all(
        value.isfinite().all() for entry in optimizer.state.values() for value in entry.values() if is_tensor(value)
    )
    assert all(p.isfinite().all() for p in params)
    assert (params[0] - before[0]).abs().max() < 1e-3 < (params[1] - before[1]).abs().min()
