"""Trace, base and scale as state: bad gradients, scalars on a device, groups, dtypes, saved states, copies."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lodo
from lodo import scalars
from tests.helpers.oracle import KINDS, fresh
from tests.helpers.parts import ELEMENTS, PACKED, SHAPES, backward, built, flat, loss_of, made, state_of, trained
from tests.helpers.states import assert_same, assert_same_snapshot, snapshot, through_file

PARTS = {
    "trace": {"trace_decay": 0.9},
    "adam": {"base": "adam"},
    "soap": {"base": "soap"},
    "scale": {"scale_lr": 0.05},
    "mixture": {"momentum_decays": (0.0, 0.9)},
    "all with adam": {"base": "adam", "scale_lr": 0.05, "trace_decay": 0.9, "momentum_decays": (0.0, 0.9)},
    "all with soap": {
        "base": "soap",
        "scale_lr": 0.05,
        "trace_decay": 0.9,
        "max_step_norm": 0.1,
        "weight_decay": 0.1,
        "momentum_decays": [0.9, 0.0],
    },
}
ALL = {"base": "soap", "scale_lr": 0.05, "trace_decay": 0.9, "momentum_decays": (0.0, 0.9)}
ALL |= {"average_share": 0.3}
each_part = pytest.mark.parametrize("options", PARTS.values(), ids=PARTS)


@pytest.fixture
def on_a_device(monkeypatch):
    """Scalars as on an accelerator, where nothing is read."""
    monkeypatch.setenv("LODO_NATIVE", "0")
    monkeypatch.setattr(scalars, "is_readable", lambda tensor: False)


# ---- bad gradients and scalars on a device -------------------------------------------------------------------------


def trained_with_bad_gradients(bad, kind, options, shapes=SHAPES):
    params, optimizer = built(kind, shapes, **options)
    taken = call = 0
    while taken < 12:
        before = snapshot(optimizer)
        backward(params)
        if call in bad:
            params[call % 2].grad.view(-1)[call % 5] = (float("nan"), float("inf"))[call % 2]
        optimizer.step()
        if call in bad and optimizer.state:
            assert_same_snapshot(snapshot(optimizer), before)
        taken += call not in bad
        call += 1
    assert optimizer.skipped_steps == len(bad)
    return params, optimizer


@each_part
@pytest.mark.parametrize("kind", ["block_permutation", "log_diagonal", "identity"])
@pytest.mark.filterwarnings("ignore:LODO skipped a step")
def test_a_bad_gradient_changes_no_part(kind, options):
    expected_params, expected = trained_with_bad_gradients((), kind, options)
    params, optimizer = trained_with_bad_gradients((2, 3, 7, 12), kind, options)
    assert torch.equal(flat(params), flat(expected_params))
    assert_same({**state_of(optimizer), "skipped_steps": 0}, {**state_of(expected), "skipped_steps": 0})


@each_part
@pytest.mark.parametrize("kind", ["block_permutation", "log_diagonal", "identity"])
@pytest.mark.filterwarnings("ignore:LODO skipped a step")
def test_a_bad_gradient_changes_no_part_with_scalars_on_a_device(kind, options, on_a_device):
    """The first call may be bad too. What comes out is what it is on the host, but for rounding."""
    params, optimizer = trained_with_bad_gradients((0, 3, 4, 9), kind, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scalars, "is_readable", lambda tensor: True)
        expected_params, expected = trained_with_bad_gradients((), kind, options)
    torch.testing.assert_close(
        flat(params), flat(expected_params), rtol=0, atol=1e-7 if "soap" in str(options) else 1e-12
    )
    if "scale_lr" in options:
        scales = (state_of(each)["scale"] for each in (optimizer, expected))
        torch.testing.assert_close(*scales, rtol=1e-6 if "soap" in str(options) else 1e-10, atol=1e-12)
    for p, q in zip(params, expected_params, strict=True):
        assert optimizer.state[p].keys() == expected.state[q].keys()


def test_a_call_with_lr_zero_and_zero_gradients_makes_every_part_and_changes_nothing(on_a_device):
    params, optimizer = built("block_permutation", lr=0.0, **ALL)
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        zeros = ("step", "momentum_trace", "exp_avg_sq", "scale", "step_trace", "momenta")
        for p in params:
            assert {"factors", *zeros} <= optimizer.state[p].keys()
            assert not any(optimizer.state[p][name].any() for name in zeros)
    assert torch.equal(flat(params), flat(made(SHAPES)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_gradients_do_not_break_the_scales(dtype):
    """Their hypergradient may be the largest number there is; its square must not stay in the second moment."""
    x = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = lodo.LODO([x], lr=1e-3, meta_lr=0.0, preconditioner="identity", scale_lr=0.1)
    large = 0.1 * torch.finfo(dtype).max ** 0.5
    for size in (large, large, 1.0, 1.0):
        x.grad = torch.full_like(x, size)
        optimizer.step()
    assert optimizer.skipped_steps == 0
    assert state_of(optimizer)["scale"].isfinite().all()
    lodo.LODO([x], preconditioner="identity").load_state_dict(optimizer.state_dict())


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trace_decay": 1.0}, "trace_decay must be a number >= 0 and < 1, got 1.0"),
        ({"scale_trace_decay": -0.1}, "scale_trace_decay must be a number >= 0 and < 1, got -0.1"),
        ({"scale_lr": float("inf")}, "scale_lr must be a number >= 0 and finite, got inf"),
        ({"scale_lr": None}, "scale_lr must be a number"),
        ({"base": "newton"}, "base must be one of None, 'adam', 'soap', got 'newton'"),
        ({"base": "soap", "capturable": True}, "'soap' waits for the device; got 'soap'"),
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name_and_nothing_changes(change, message):
    with pytest.raises(ValueError, match=message):
        built(**change)
    params, optimizer = trained("block_permutation", base=change.get("base") if "capturable" in change else None)
    before = copy.deepcopy(flat(params)), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": made(((2,),)), **change})
    optimizer.param_groups[0].update(change)
    backward(params)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    optimizer.param_groups[0].update({name: before[1]["param_groups"][0][name] for name in change})
    saved = copy.deepcopy(before[1])
    saved["param_groups"][0].update(change)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert torch.equal(flat(params), before[0])
    assert_same(optimizer.state_dict(), before[1])


@pytest.mark.parametrize("kind", ["log_diagonal", "identity", "block_permutation"])
@pytest.mark.parametrize("options", [{}, {"base": "adam", "scale_lr": 0.05}], ids=str)
def test_a_group_may_start_with_a_learned_network_and_freeze_it(kind, options):
    """That of a composite is its `network`; the composite itself is none."""
    _, optimizer = trained(kind, meta_lr=0.05, **options)
    g = optimizer.preconditioners[0]
    network = getattr(g, "network", g)
    before = network.to_dense()
    params = made(SHAPES)
    frozen = lodo.LODO(params, lr=0.05, meta_lr=0.0, preconditioner=network, **options)
    assert frozen.param_groups[0]["preconditioner"] == kind
    for _ in range(5):
        backward(params)
        frozen.step()
    found = getattr(frozen.preconditioners[0], "network", frozen.preconditioners[0])
    assert torch.equal(found.to_dense(), before)
    assert not torch.equal(flat(params), flat(made(SHAPES)))
    with pytest.raises(ValueError, match="learned for"):
        lodo.LODO(made(((2,),)), preconditioner=network)
    if options:
        with pytest.raises(ValueError, match=r"preconditioner must be a network, .* its `.network`; got a Composite"):
            lodo.LODO(params, preconditioner=g)


@pytest.mark.parametrize("kind", [*KINDS, "identity"])
def test_every_network_over_a_base_trains(kind):
    """float32, with the rates that are on by default."""
    params = made(SHAPES, dtype=torch.float32)
    optimizer = lodo.LODO(params, lr=0.01, preconditioner=kind, base="adam", scale_lr=0.01, trace_decay=0.9)
    begin = float(loss_of(flat(params)))
    for _ in range(30):
        backward(params)
        optimizer.step()
    assert float(loss_of(flat(params))) < begin - 1


@pytest.mark.parametrize("make", [lambda: lodo.Identity(0), lambda: lodo.Identity(2.5), lambda: lodo.Identity(True)])
def test_an_identity_has_a_size(make):
    with pytest.raises(ValueError, match="size must be an int with 1 <= size"):
        make()


def test_an_identity_and_a_fresh_log_diagonal_are_one():
    dense = torch.eye(4, dtype=torch.float64)
    assert torch.equal(lodo.Identity(4, torch.float64).to_dense(), dense)
    assert torch.equal(lodo.LogDiagonal(torch.zeros(4, dtype=torch.float64)).to_dense(), dense)
    assert (fresh("log_diagonal", 4).to_dense().diagonal() > 0).all()
    v = torch.ones(4)
    assert lodo.Identity(4).matvec(v).data_ptr() != v.data_ptr()


def test_the_gains_of_a_log_diagonal_are_bounded_by_max_condition():
    g = lodo.LogDiagonal(torch.tensor([-9.0, -0.5, 0.0, 0.5, 9.0], dtype=torch.float64))
    g.bound_condition_(4.0)
    expected = torch.tensor([0.5, -0.5, 0.0, 0.5, 2.0], dtype=torch.float64)
    expected[1:4] = expected[1:4].exp()
    torch.testing.assert_close(g.to_dense().diagonal(), expected, rtol=1e-15, atol=0)
    lodo.Identity(3).bound_condition_(1.0)


# ---- groups, dtypes, copies ----------------------------------------------------------------------------------------


def test_groups_with_other_parts_are_separate_optimizers():
    settings = [
        {"preconditioner": "log_diagonal", "base": "adam", "lr": 0.02, "beta": 0.8},
        {"preconditioner": "block_permutation", "base": "soap", "trace_decay": 0.8, "depth": 2, "lr": 0.01},
        {"preconditioner": "identity", "scale_lr": 0.1, "scale_trace_decay": 0.5, "lr": 0.1},
    ]
    shapes = [((3, 4), (2,)), ((4, 4),), ((5,), (2, 2))]
    together, apart = ([made(own, seed) for seed, own in enumerate(shapes)] for _ in range(2))
    one = lodo.LODO([{"params": own, **setting} for own, setting in zip(together, settings, strict=True)])
    several = [lodo.LODO(own, **setting) for own, setting in zip(apart, settings, strict=True)]
    for _ in range(25):
        for params in (*together, *apart):
            backward(params)
        for optimizer in (one, *several):
            optimizer.step()
    for own, other, optimizer in zip(together, apart, several, strict=True):
        assert torch.equal(flat(own), flat(other))
        for p, q in zip(own, other, strict=True):
            assert_same(one.state[p], optimizer.state[q])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("base", ["adam", "soap"])
def test_parts_of_low_precision_parameters_are_float32(base, dtype):
    params = made(SHAPES, dtype=dtype)
    optimizer = lodo.LODO(params, lr=0.02, trace_decay=0.5, base=base, scale_lr=0.02, preconditioner="log_diagonal")
    twins = [nn.Parameter(p.detach().float()) for p in params]
    twin = lodo.LODO(twins, **optimizer.defaults)
    for _ in range(3):
        backward(params)
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.float()
        optimizer.step(), twin.step()
    names = ("momentum_trace", "exp_avg_sq", *(["factors", "eigenbasis"] if base == "soap" else []))
    for p in params:
        assert {optimizer.state[p][name].dtype for name in names} == {torch.float32}
        assert {p.dtype, optimizer.state[p]["scale"].dtype} == {dtype, torch.float64}
    for name in names:  # they depend on gradients alone
        assert torch.equal(state_of(optimizer)[name], state_of(twin)[name])
    # Where a rotated gradient is no more than the rounding of bfloat16 there is no step; the twin, of float32, has one.
    atol = 0.05 if base == "soap" and dtype == torch.bfloat16 else 0.02
    torch.testing.assert_close(flat(params).float(), flat(twins), rtol=0.02, atol=atol)


@each_part
@pytest.mark.parametrize("how", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_go_on_alike_and_apart(how, options):
    params, optimizer = trained("block_permutation", momentum_dtype="bfloat16", **options)
    others, other = how((params, optimizer))
    kept = flat(others), copy.deepcopy(other.state_dict())
    for _ in range(9):
        backward(params)
        optimizer.step()
    assert torch.equal(flat(others), kept[0])
    assert_same(other.state_dict(), kept[1])
    for _ in range(9):
        backward(others)
        other.step()
    assert torch.equal(flat(params), flat(others))
    assert_same(other.state_dict(), optimizer.state_dict())


@each_part
@pytest.mark.parametrize("exchange", ["share_memory", "data", "replaced"])
def test_memory_of_the_parts_may_be_exchanged(exchange, options):
    params, optimizer = trained("log_diagonal", **options)
    others, other = copy.deepcopy((params, optimizer))
    for _ in range(12):
        for entry in optimizer.state.values():
            for name, value in list(entry.items()):
                if isinstance(value, torch.Tensor) and exchange == "share_memory":
                    value.share_memory_()
                elif exchange == "data":  # not that of the momentum, whose exchange alone would be noticed
                    if name == "momentum":
                        continue
                    former, value.data = value.data, value.data.clone()
                    former.fill_(7)
                elif isinstance(value, torch.Tensor):
                    entry[name] = value.clone()
        for each, one in ((params, optimizer), (others, other)):
            backward(each)
            one.step()
    assert torch.equal(flat(params), flat(others))
    assert_same(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("base", ["adam", "soap"])
def test_moving_to_another_dtype_takes_the_parts_along(base):
    params, optimizer = trained("log_diagonal", base=base, scale_lr=0.05, trace_decay=0.9)
    before = state_of(optimizer)
    for p in params:
        p.data, p.grad = p.data.float(), None
    operator = optimizer.preconditioners[0]
    after, of_computed_dtype = state_of(optimizer), {*ELEMENTS, *PACKED, "theta", "theta_exp_avg", "theta_exp_avg_sq"}
    assert after.keys() == before.keys() > {"scale", "scale_peak", "unit", "step", "exp_avg_sq", "step_trace"}
    for name, value in before.items():  # tables are float64 for all
        is_cast = name in of_computed_dtype and value.is_floating_point()
        assert_same(after[name], value.float() if is_cast else value, name)
    assert operator.to_dense().dtype == torch.float32
    backward(params)
    optimizer.step()


NAMES = (
    *("step", "skipped_steps", "last_lr", "momentum", "momentum_trace", "theta", "theta_exp_avg", "theta_exp_avg_sq"),
    *(
        "meta_step",
        "exp_avg_sq",
        "unit",
        "factors",
        "eigenbasis",
        "seen",
        "scale",
        "scale_peak",
        "trace_peak",
        "progress",
        "recent_energy",
        "step_trace",
        "momenta",
        "mixture",
    ),
    *("written", "scheduled_lr", "reset_at", "average", "averaged"),
)


def test_all_that_is_kept_is_tested_below():
    assert {name for entry in trained("log_diagonal", **ALL)[1].state.values() for name in entry} == {*NAMES, "shards"}


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_state_of_a_wrong_shape_is_refused_before_a_kernel_reads_beyond_its_end(name, place):
    params, optimizer = trained("log_diagonal", **ALL)
    entry = optimizer.state[params[place]]
    entry[name] = entry[name][..., :-1].clone() if entry[name].dim() else entry[name].reshape(1)
    before = flat(params)
    backward(params)
    with pytest.raises(RuntimeError, match=f"{name} in the state of parameter {place} of a param group has shape"):
        optimizer.step()
    assert torch.equal(flat(params), before)


# ---- saved states --------------------------------------------------------------------------------------------------


@each_part
@pytest.mark.parametrize("kind", ["block_permutation", "log_diagonal"])
def test_a_resumed_run_is_the_uninterrupted_one(kind, options):
    """Saved at any step, before the first one too; what is saved is not written again."""
    for steps in (0, 1, 9, 10):
        params, optimizer = trained(kind, steps=steps, **options)
        saved = through_file(optimizer.state_dict())
        kept = copy.deepcopy(saved)
        others, other = built(kind, **options)
        for p, q in zip(params, others, strict=True):
            q.data.copy_(p.data)
        other.load_state_dict(saved)
        for _ in range(11):
            for each, one in ((params, optimizer), (others, other)):
                backward(each)
                one.step()
            assert torch.equal(flat(params), flat(others))
        assert_same(other.state_dict(), optimizer.state_dict())
        assert_same(saved, kept)


def damaged(name, value):
    def damage(saved, place):
        entry = saved["state"][place]
        entry[name] = value(entry[name].clone())

    return damage


def removed(*names):
    def damage(saved, place):
        for name in names:
            del saved["state"][place][name]

    return damage


def with_number(index, number):
    def change(tensor):
        tensor.view(-1)[index] = number
        return tensor

    return change


COUNTS = ("step", "skipped_steps", "reset_at", "averaged")
NUMBERS = (
    *(
        "momentum_trace",
        "exp_avg_sq",
        "unit",
        "factors",
        "eigenbasis",
        "scale",
        "scale_peak",
        "trace_peak",
        "progress",
        "recent_energy",
        "step_trace",
        "momenta",
        "mixture",
    ),
    *("written", "scheduled_lr", "average"),
)
TENSORS = (*COUNTS, "seen", *NUMBERS)
PLACES = (0, 3)  # those of SHAPES that have factors
DAMAGES = [
    *((f"no {name}", removed(name), f"an incomplete one: {name} missing") for name in TENSORS),
    ("no parts", removed(*NUMBERS), "an incomplete one: .* missing"),
    *((f"longer {name}", damaged(name, lambda t: torch.stack([t, t])), f"{name} has shape") for name in TENSORS),
    *((f"NaN in {name}", damaged(name, with_number(-1, float("nan"))), f"{name} holds NaN") for name in NUMBERS),
    *(
        (f"infinite {name}", damaged(name, with_number(0, float("inf"))), f"{name} holds NaN or inf")
        for name in NUMBERS
        if name not in ("written", "average")  # a mask may be infinite
    ),
    *((f"half {name}", damaged(name, torch.Tensor.half), f"{name} has dtype torch.float16") for name in TENSORS),
    *((f"sparse {name}", damaged(name, torch.Tensor.to_sparse), f"{name} has layout") for name in TENSORS),
    *((f"text for {name}", damaged(name, str), f"{name} must be a tensor") for name in TENSORS),
    *(
        (f"negative {name}", damaged(name, with_number(-1, -1.0)), f"{name} must hold numbers >= 0")
        for name in ("exp_avg_sq", "unit", "scale_peak", "trace_peak", "scheduled_lr")
    ),
    *(
        (f"negative {name}", damaged(name, with_number(0, -1)), f"{name} must hold whole numbers >= 0")
        for name in COUNTS
    ),
    (
        "nothing that is seen",
        damaged("seen", with_number(0, 4)),
        "seen must hold .* >= 0 and <= 3 .* got 4",
    ),
    *(
        (
            f"negative moment in {name}",
            damaged(name, with_number(-1, -1.0)),
            f"{name}, its second moments must hold numbers >= 0",
        )
        for name in ("scale", "mixture")
    ),
    (
        "another base",
        lambda saved, _: saved["param_groups"][0].update(base="adam"),
        "of base 'adam', this .* is 'soap'",
    ),
]


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES])
def test_a_damaged_state_is_refused_and_nothing_changes(damage, message):
    params, optimizer = trained("log_diagonal", **ALL)
    before = copy.deepcopy(optimizer.state_dict())
    others, other = built("log_diagonal", **ALL)
    for place in PLACES:
        saved = copy.deepcopy(before)
        damage(saved, place)
        where = "param group 0: " if "of base" in message else f"param group 0, parameter {place}: .*"
        for one in (optimizer, other):
            with pytest.raises(ValueError, match=f"^{where}.*{message}"):
                one.load_state_dict(saved)
        assert_same(optimizer.state_dict(), before)
        assert not other.state
    assert len(others) == len(params)


def test_a_state_of_another_base_is_refused_and_none_is_one():
    states = {base: trained("log_diagonal", base=base)[1].state_dict() for base in (None, "adam", "soap")}
    for base in states:
        _, optimizer = built("log_diagonal", base=base)
        for other, saved in states.items():
            if other == base:
                optimizer.load_state_dict(saved)
            else:
                with pytest.raises(ValueError, match=f"of base {other!r}, this optimizer's is {base!r}"):
                    optimizer.load_state_dict(saved)


SWITCHED_ON = (
    {"trace_decay": 0.9},
    {"scale_lr": 0.05},
    {"trace_decay": 0.9, "scale_lr": 0.05},
    {"meta_lr": 0.02},
)
switched_on = pytest.mark.parametrize("options", SWITCHED_ON, ids=str)


@switched_on
def test_parts_that_are_switched_on_after_a_load_start_then(options):
    params, optimizer = trained("block_permutation", steps=5, meta_lr=0.0)
    others, other = built("block_permutation", meta_lr=0.0)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    other.load_state_dict(through_file(optimizer.state_dict()))
    optimizer.param_groups[0].update(options), other.param_groups[0].update(options)
    again = built("block_permutation", **options)[1]
    again.load_state_dict(copy.deepcopy(other.state_dict()))  # it can be saved again at once
    for _ in range(5):
        for each, one in ((params, optimizer), (others, other)):
            backward(each)
            one.step()
    assert torch.equal(flat(params), flat(others))
    assert_same(other.state_dict(), optimizer.state_dict())
    for p in others:
        assert ("step_trace" in other.state[p]) == ("scale_lr" in options)
        assert ("momentum_trace" in other.state[p]) == ("trace_decay" in options)


@pytest.mark.parametrize("kind", ["block_permutation", "log_diagonal"])
@switched_on
def test_parts_that_are_switched_on_are_saved_before_their_first_step(kind, options):
    params, optimizer = trained(kind, base="adam", steps=5, meta_lr=0.0)
    optimizer.param_groups[0].update(options)
    others, other = built(kind, base="adam", meta_lr=0.0)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(5):
        for each, one in ((params, optimizer), (others, other)):
            backward(each)
            one.step()
    assert torch.equal(flat(params), flat(others))
    assert_same(other.state_dict(), optimizer.state_dict())
