"""Properties of drawn networks, options and parameters; `test_call_orders.py` has the drawn orders of calls."""

import copy
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import lodo
from lodo import inner_optimizer
from lodo.kernels import native, reference
from lodo.preconditioners import BY_NAME
from lodo.preconditioners.base import padded_size
from tests.helpers import strategies as draw
from tests.helpers.hypergradients import check_hypergradient
from tests.helpers.kernels import close, needs_compiler, neighbours, tensors
from tests.helpers.oracle import KINDS, learned, matvec
from tests.helpers.states import assert_same

LENGTHS = st.lists(draw.plans, min_size=1, max_size=3).filter(lambda plans: any(0 not in plan.shape for plan in plans))


def give(params, seed, scale=0.1):
    for i, p in enumerate(params):
        p.grad = draw.numbers(tuple(p.shape), 10 * seed + i, p.dtype, scale)


def trained(params, steps=3, **options):
    optimizer = lodo.LODO(params, **options)
    for step in range(steps):
        give(params, step)
        optimizer.step()
    return optimizer


def everything(params, optimizer):
    """All that a call could change, copied."""
    return copy.deepcopy([[p.detach() for p in params], optimizer.state_dict(), len(optimizer.param_groups)])


# ---- networks ------------------------------------------------------------------------------------------------------


@given(g=draw.networks(), kernel=draw.kernels, seed=draw.seeds)
def test_every_network_is_a_symmetric_matrix_and_the_promised_ones_are_positive(g, kernel, seed):
    with draw.running(kernel):
        dense, v = g.to_dense(), draw.numbers((g.size,), seed, g.theta.dtype)
        scale = max(1.0, float(torch.linalg.matrix_norm(dense)))
        tolerance = {"rtol": 0, "atol": scale * (1e-12 if dense.dtype == torch.float64 else 1e-4)}
        assert dense.shape == (g.size, g.size)
        torch.testing.assert_close(dense, dense.T, **tolerance)
        torch.testing.assert_close(g.matvec(v), dense @ v, rtol=0, atol=8 * tolerance["atol"])
        torch.testing.assert_close(g.matvec(v), matvec(g, learned(g), v), rtol=0, atol=8 * tolerance["atol"])
        if isinstance(g, lodo.Diagonal | lodo.Scalar):
            assert torch.equal(dense, torch.diag(g.weight.expand(g.size)))
            return
        if isinstance(g, lodo.LogDiagonal):
            assert torch.equal(dense, torch.diag(g.log_weight.exp()))
        if isinstance(g, lodo.Residual):
            with_positive = torch.cat((g.diagonals[:-1], g.diagonals[-1:].abs()))
            dense = lodo.Residual(with_positive, g.permutations, g.size).to_dense()
        assert torch.linalg.eigvalsh(dense).min() >= -tolerance["atol"]


@given(g=draw.networks(dtype=torch.float64), kernel=draw.kernels, lr=st.sampled_from((0.0, 0.7, 1e3)), seed=draw.seeds)
def test_the_hypergradient_of_every_network_is_that_of_autograd(g, kernel, lr, seed):
    torch.manual_seed(seed)
    with draw.running(kernel):
        check_hypergradient(g, lr)


@needs_compiler
@draw.many
@given(
    shape=st.tuples(draw.sizes, st.integers(0, 6), st.integers(1, 9) | st.just(64), st.floats(1, 3)),
    permutation=st.sampled_from(("random", "shuffle")),
    dtype=draw.wide_dtypes,
    inner=st.sampled_from(("adam", "adam in bfloat16", "sgd")),
    rates=st.tuples(st.sampled_from((1e-4, 1e-2)), st.integers(1, 3000)),
    seed=draw.seeds,
)
def test_the_compiled_kernels_agree_with_plain_torch(shape, permutation, dtype, inner, rates, seed):
    assume(shape[1] > 0 or permutation == "shuffle")  # there are no indices for no layers
    torch.manual_seed(seed)
    kept = torch.bfloat16 if inner == "adam in bfloat16" else dtype
    theta, moments, indices, g, m = tensors(*shape, permutation, dtype, kept)
    other, other_moments = theta.clone(), tuple(moment.clone() for moment in moments)
    rates = inner_optimizer.rates(inner.split()[0], *rates, 1, dtype)
    work = native.prepare(theta, indices, learning=True, kept=None).fill_(float("nan"))
    close(native.matvec(theta, indices, g, work), reference.matvec(theta, indices, g))
    reference.learn_(theta, None if inner == "sgd" else moments, indices, g, m, 0.3, rates)
    native.learn_(other, None if inner == "sgd" else other_moments, indices, g, m, 0.3, rates, work)
    close(other, theta)
    for found, expected in zip(other_moments, moments, strict=True):
        if kept == torch.bfloat16:  # few numbers, of which one may come down on the other side of a step of bfloat16
            roundings = 200 * torch.finfo(dtype).eps * (expected.float().abs().max() if len(expected) else 0)
            off = (found.float() - expected.float()).abs() > roundings
            assert ((neighbours(found) - neighbours(expected)).abs() * off <= 1).all()
        else:
            close(found, expected)


@given(g=draw.networks(), seed=draw.seeds)
def test_the_options_of_a_network_describe_it(g, seed):
    """An optimizer that is given only them can go on from a state with this network in it."""
    kind = BY_NAME[g.kind]
    options = {**lodo.LODO([torch.zeros(1)]).defaults, **g.options}
    assert kind.theta_shape(g.size, options) == g.theta.shape
    indices = g.permutations_stored
    assert kind.permutations_shape(g.size, options) == (None if indices is None else indices.shape)
    x, y = (nn.Parameter(draw.numbers((g.size,), seed, g.theta.dtype)) for _ in range(2))
    other = lodo.LODO([y], **g.options)
    other.load_state_dict(trained([x], steps=0, preconditioner=g).state_dict())
    assert torch.equal(other.preconditioners[0].theta, g.theta)


@given(size=st.integers(1, 2**31), block=st.integers(1, 100), more=st.integers(0, 10**6))
def test_an_expansion_read_off_a_network_gives_its_size_back(size, block, more):
    padded = (-(-size // block) + more) * block
    assert padded_size(size, padded / size, block) == padded


@given(
    g=draw.networks(),
    is_numpy=st.booleans(),
    layout=draw.layouts,
    index=st.sampled_from((torch.uint8, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64)),
)
def test_what_a_network_is_made_of_is_copied(g, is_numpy, layout, index):
    """Of every integer dtype, from torch or NumPy, contiguous or not."""
    given = [draw.laid_out(learned(g), layout)]
    if g.permutations_stored is not None or isinstance(g, lodo.BlockPermutation):
        assume(index != torch.uint8 or g.permutations.shape[1] <= 256)
        given.append(draw.laid_out(g.permutations.to(index), layout))
    before = copy.deepcopy(given)
    sizes = () if isinstance(g, lodo.Diagonal | lodo.LogDiagonal) else (g.size,)
    other = type(g)(*(tensor.numpy() if is_numpy else tensor for tensor in given), *sizes)
    assert torch.equal(
        other.to_dense(), type(g)(learned(g), *(tensor.long() for tensor in given[1:]), *sizes).to_dense()
    )
    for tensor in (other.theta, other.permutations_stored):
        if tensor is not None:
            tensor.zero_()
    assert_same(given, before)


@given(
    g=draw.networks(),
    kernel=draw.kernels,
    dtype=st.sampled_from((*draw.DTYPES, torch.int64)),
    layout=st.sampled_from((*draw.LAYOUTS, "negative", "requires grad")),
    seed=draw.seeds,
)
def test_a_vector_may_be_of_any_dtype_and_layout_and_is_not_written(g, kernel, dtype, layout, seed):
    v = (10 * draw.numbers((g.size,), seed)).to(dtype)
    given = draw.laid_out(v, layout if layout in draw.LAYOUTS else "plain")
    if layout == "negative":
        given = torch._neg_view(-v)
    elif layout == "requires grad" and dtype.is_floating_point:
        given.requires_grad_()
    with draw.running(kernel):
        found = g.matvec(given)
        assert torch.equal(found, g.matvec(v.to(g.theta)))
    assert not found.requires_grad
    found.zero_()
    assert torch.equal(given, v)


# ---- parameters ----------------------------------------------------------------------------------------------------


@given(
    plans=LENGTHS,
    options=draw.options(bases=(None, "adam")),
    dtype=draw.wide_dtypes,
    kernel=draw.kernels,
)
def test_parameters_of_a_group_are_one_vector(plans, options, dtype, kernel):
    """However it is cut into tensors and whatever their layouts: the same steps, bit for bit. But for what there is
    for each tensor by itself: scales, weights of momenta, and eigenbases."""
    options = {name: value for name, value in options.items() if name not in ("scale_lr", "momentum_decays")}
    params = [nn.Parameter(draw.laid_out(plan.make().detach().to(dtype), plan.layout)) for plan in plans]
    whole = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in params]))
    with draw.running(kernel):
        optimizers = [lodo.LODO(own, lr=0.5, **options) for own in (params, [whole])]
        for step in range(4):
            give(params, step)
            whole.grad = torch.cat([p.grad.reshape(-1) for p in params])
            for p, plan in zip(params, plans, strict=True):
                p.grad = draw.laid_out(p.grad, plan.layout)
            for optimizer in optimizers:
                optimizer.step()
    torch.testing.assert_close(torch.cat([p.detach().reshape(-1) for p in params]), whole.detach(), rtol=0, atol=0)
    found, expected = (optimizer.preconditioners[0].theta for optimizer in optimizers)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@given(
    plans=st.tuples(draw.plans, draw.plans, draw.plans),
    options=st.lists(draw.options(), min_size=3, max_size=3),
    order=st.permutations(range(3)),
    bad=st.none() | st.integers(0, 2),
)
@pytest.mark.filterwarnings("ignore:LODO skipped a step")
def test_the_order_of_groups_does_not_matter(plans, options, order, bad):
    """Neither for what is done to them nor for which gradients hold back which groups."""
    results = []
    for indices in (range(3), order):
        params = [plan.make() for plan in plans]
        optimizer = lodo.LODO([{"params": [params[i]], "lr": 0.5, **options[i]} for i in indices])
        for step in range(4):
            give(params, step)
            if step == 2 and bad is not None:
                params[bad].grad.fill_(float("nan"))
            optimizer.step()
        results.append([{"parameter": p.detach(), **optimizer.state[p]} for p in params])
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@given(
    plans=LENGTHS,
    options=draw.options(),
    bad=st.sampled_from((float("nan"), float("inf"), -float("inf"), 3e38, 1e300)),
    at=st.integers(0, 99),
    steps=st.integers(0, 2),
)
@pytest.mark.filterwarnings("ignore:LODO skipped a step")
def test_a_bad_number_anywhere_changes_nothing(plans, options, bad, at, steps):
    """Infinite, none, or so large that its square is infinite in the dtype of the network: in the unit that gradients
    call for where there is a base, and there an inner SGD takes more."""
    params = [plan.make() for plan in plans]
    optimizer = trained(params, steps, **options)
    give(params, 9)
    p = [p for p in params if p.numel()][at % sum(p.numel() > 0 for p in params)]
    p.grad.view(-1)[at % p.numel()] = torch.tensor(bad, dtype=torch.float64)
    is_float64 = any(p.dtype == torch.float64 for p in params)
    takes_more = optimizer.defaults["base"] is not None and optimizer.defaults["meta_optimizer"] == "sgd"
    takes_more |= optimizer.defaults["base"] is not None and optimizer.defaults["meta_lr"] == 0
    largest = 1e160 if is_float64 else math.inf if takes_more else 0.0
    assume(not p.grad.isfinite().all() or float(p.grad.abs().max()) > largest)
    before = everything(params, optimizer)
    optimizer.step()
    skipped = optimizer.skipped_steps
    assert skipped == 1
    after = everything(params, optimizer)
    assert_same(after[0], before[0])
    for index, entry in before[1]["state"].items():  # none where this was the first step
        assert_same(
            {**after[1]["state"][index], "skipped_steps": None}, {**entry, "skipped_steps": None} if entry else {}
        )


# ---- parameters that come late, are absent or are exchanged ----------------------------------------------------------

EVENTS = ("gradient", "gradient", "gradient", "none", "zero", "forgotten", "exchanged")
calls = st.lists(st.lists(st.sampled_from(EVENTS), min_size=3, max_size=3), min_size=2, max_size=8)
OF_ALL = {"max_step_norm", "meta_every", "meta_state_dtype", "momentum_dtype"}  # what hangs on the whole group
elementwise = st.builds(
    lambda kind, options: {"preconditioner": kind, **{k: v for k, v in options.items() if k not in OF_ALL}},
    st.sampled_from(("log_diagonal", "log_diagonal", "identity")),
    st.builds(lambda parts, rates: {**parts, **rates}, draw.parts(), draw.rates()),
)


@given(
    shapes=st.lists(draw.shapes, min_size=3, max_size=3),
    options=elementwise,
    dtype=draw.wide_dtypes,
    kernel=draw.kernels,
    calls=calls,
)
def test_each_parameter_of_an_elementwise_network_is_as_in_an_optimizer_of_its_own(
    shapes, options, dtype, kernel, calls
):
    """Whichever steps it has a gradient at, and whatever becomes of the others: each has its own history. Bit for bit,
    but for products of matrices, and for plain torch, where numbers of each parameter are rounded otherwise."""
    has_kernel = options["base"] == "adam" or (options["base"] is None and options.get("scale_lr", 0.0) > 0)
    if options["base"] == "soap":
        assume(len({len(shape) > 1 for shape in shapes}) == 1)  # only groups without matrices have bases of vectors
    params = [nn.Parameter(draw.numbers(shape, i, dtype)) for i, shape in enumerate(shapes)]
    alone = [nn.Parameter(p.detach().clone()) for p in params]
    with draw.running(kernel):
        optimizer = lodo.LODO(params, lr=0.125, **options)
        others = [lodo.LODO([p], lr=0.125, **options) for p in alone]
        for number, events in enumerate(calls):
            for i, event in enumerate(events):
                if event in ("forgotten", "exchanged"):
                    optimizer.state.pop(params[i], None)
                    if event == "exchanged":
                        params[i] = nn.Parameter(draw.numbers(shapes[i], 100 * number + i, dtype))
                        optimizer.param_groups[0]["params"][i] = params[i]
                    alone[i] = nn.Parameter(params[i].detach().clone())
                    others[i] = lodo.LODO([alone[i]], lr=0.125, **options)
                gradient = draw.numbers(shapes[i], 10 * number + i, dtype)
                gradient = 0.1 * (gradient + gradient.sign()) * (event != "zero")  # of ordinary size: no unit but 1
                params[i].grad, alone[i].grad = (None if event == "none" else gradient.clone() for _ in range(2))
            optimizer.step()
            for p, q, other in zip(params, alone, others, strict=True):
                other.step()
                if kernel == "native" and has_kernel:
                    assert torch.equal(p, q)
                    for name, value in other.state.get(q, {}).items():
                        if name not in ("shards", "unit"):  # the unit is that of the first that has one
                            torch.testing.assert_close(optimizer.state[p][name], value, rtol=0, atol=0, msg=name)
                else:
                    slack = 1e-4 if dtype == torch.float32 else 1e-9
                    torch.testing.assert_close(p, q, rtol=slack, atol=slack)
                    assert p.numel() == 0 or optimizer.state[p].get("step", 0) == other.state[q].get("step", 0)


# ---- what is refused -----------------------------------------------------------------------------------------------

words = st.text(max_size=8)
no_numbers = (
    st.sampled_from((None, True, False, [], [0.5], {}, 0.5j, Decimal("0.5"), np.bool_(True), np.array([0.5]), object))
    | words
)
not_finite = st.sampled_from((float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), Fraction(10**400)))
below_zero = st.floats(max_value=-1e-300, allow_infinity=False) | st.integers(max_value=-1) | st.just(Fraction(-1, 3))
no_integers = st.sampled_from((True, 0.0, 1.0, 2.5, float("nan"), [], 1j, 2**63, np.int64(2), torch.tensor(2))) | words
no_tensors_for_lr = st.sampled_from(
    (
        torch.tensor(-0.5),
        torch.tensor(float("nan")),
        torch.ones(2),
        torch.ones(0),
        torch.tensor(True),
        torch.tensor(0.5j),
        torch.ones(1).to_sparse(),
    )
)
wrong_numbers = no_numbers | not_finite | below_zero
wrong_dtypes = st.sampled_from((torch.float16, torch.float32, torch.int64, 16, True, [], lodo.LODO)) | words
WRONG: dict[str, st.SearchStrategy[Any]] = {
    "lr": wrong_numbers | no_tensors_for_lr,
    "meta_lr": wrong_numbers | st.just(torch.tensor(0.5)),
    "beta": wrong_numbers | st.floats(min_value=1) | st.just(1) | st.just(1 - Fraction(1, 10**30)),
    "weight_decay": wrong_numbers | st.just(torch.tensor(0.5)),
    "expansion": wrong_numbers | st.floats(0, 1, exclude_max=True) | st.just(0),
    "preconditioner": st.sampled_from((None, 1, True, [], lodo.Diagonal, torch.ones(3), torch.bfloat16)) | words,
    "depth": no_integers | st.integers(max_value=-1),
    "block_size": no_integers | st.integers(max_value=0) | st.none(),
    "permutation": st.sampled_from((None, 1, True, ["random"], torch.arange(4))) | words,
    "meta_optimizer": st.sampled_from((None, 1, torch.optim.Adam, ["adam"])) | words,
    "trace_decay": wrong_numbers | st.floats(min_value=1) | st.just(1) | st.just(torch.tensor(0.5)),
    "base": st.sampled_from((1, True, [], torch.optim.Adam)) | words,
    "scale_lr": wrong_numbers | st.just(torch.tensor(0.5)),
    "momentum_decays": st.sampled_from(
        ((), [], 0.9, "0.9", (1.0,), (0.5, -0.1), (None,), (True,), [0.9, "a"], np.array([0.9]))
    )
    | wrong_numbers.map(lambda value: (0.9, value)),
    "mix_lr": wrong_numbers | st.just(torch.tensor(0.5)),
    "average_share": (wrong_numbers | st.just(0.0) | st.floats(1, exclude_min=True)).filter(
        lambda value: value is not None
    ),
    "scale_trace_decay": wrong_numbers | st.floats(min_value=1) | st.just(1) | st.just(torch.tensor(0.5)),
    "meta_every": no_integers | st.integers(max_value=0) | st.none(),
    "meta_state_dtype": wrong_dtypes,
    "momentum_dtype": wrong_dtypes,
    "max_step_norm": (wrong_numbers | st.just(torch.tensor(0.5))).filter(lambda value: value is not None),
    "max_condition": (wrong_numbers | st.floats(0, 1, exclude_max=True)).filter(lambda value: value is not None),
    "maximize": st.sampled_from((None, 0, 1, "yes", np.bool_(True), torch.tensor(True))),
    "capturable": st.sampled_from((None, 0, 1, "yes", np.bool_(True), torch.tensor(True))),
    "sharding": st.sampled_from((None, "", "Local", "owners", 1, True)),
    "seed": no_integers | st.integers(max_value=-1) | st.none(),
}
wrong_options = st.sampled_from(sorted(WRONG)).flatmap(lambda name: st.tuples(st.just(name), WRONG[name]))


def test_every_option_is_drawn():
    assert WRONG.keys() == lodo.LODO([torch.zeros(1)]).defaults.keys() - {"params"}


@draw.many
@given(wrong=wrong_options, where=st.sampled_from(("constructor", "group", "new group", "load")))
def test_options_out_of_range_are_refused_by_name_and_nothing_changes(wrong, where):
    name, value = wrong
    params = [nn.Parameter(torch.ones(3))]
    if where in ("constructor", "group"):
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            lodo.LODO(params, **{name: value}) if where == "constructor" else lodo.LODO(
                [{"params": params, name: value}]
            )
        assert torch.equal(params[0], torch.ones(3))
        return
    optimizer = trained(params, depth=1)
    before, saved = everything(params, optimizer), copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][name] = value
    group = {"params": [nn.Parameter(torch.ones(2))], name: value}
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        optimizer.load_state_dict(saved) if where == "load" else optimizer.add_param_group(group)
    assert_same(everything(params, optimizer), before)


damages = st.sampled_from(
    (None, "removed", "all removed", "text", 0, 1, 2, 3, -1, 1.5, True, [], {}, object())
) | st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    st.sampled_from(((), (1,), (3,), (0,), (2, 2))),
    st.sampled_from((torch.float32, torch.float16, torch.int64, torch.int32, torch.bool, torch.complex64)),
)


@draw.many
@given(
    kind=st.sampled_from((*KINDS, "identity")),
    permutation=st.sampled_from(("random", "shuffle")),
    parts=st.sampled_from(
        ({}, {"base": "adam", "trace_decay": 0.5}, {"base": "soap", "scale_lr": 0.1, "trace_decay": 0.5})
    ),
    number=st.integers(0, 1),
    key=st.integers(0, 20),
    damage=damages,
)
@pytest.mark.filterwarnings("ignore:LODO loaded a state that was saved with another number of shards")
@pytest.mark.filterwarnings("ignore:LODO loaded momentum without the network")
def test_a_damaged_state_is_refused_and_nothing_changes_or_it_can_be_gone_on_with(
    kind, permutation, parts, number, key, damage
):
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    options = {"preconditioner": kind, "depth": 2, "permutation": permutation, **parts}
    optimizer = trained(params, **options)
    saved = copy.deepcopy(optimizer.state_dict())
    entry = saved["state"][number]
    name = sorted(entry)[key % len(entry)]
    entry[name] = damage
    if isinstance(damage, str) and damage == "removed":
        del entry[name]
    elif isinstance(damage, str) and damage == "all removed":
        del saved["state"][number]
    before = everything(params, optimizer)
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        refused = str(error)
    else:
        refused = None
    if refused is None:
        if isinstance(damage, str) and damage == "all removed":
            assert params[number] not in optimizer.state or optimizer.state[params[number]]["step"] == 0
        give(params, 5)
        optimizer.step()
        assert not torch.equal(params[0], before[0][0])
    else:
        if isinstance(damage, str) and damage == "all removed":  # else that parameter starts anew
            assert number == 0
            assert not BY_NAME[kind].is_elementwise
            assert "theta missing" in refused
        else:
            assert name.removesuffix("s") in refused  # permutations may be missed under their option's name
        assert_same(everything(params, optimizer), before)
