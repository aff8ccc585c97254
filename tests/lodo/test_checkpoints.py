"""Saving and loading: bit-exact resume in a new process, precision, and clear refusals."""

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lodo
from benchmarks.faults.training import fingerprint
from lodo.declarations import Dtype, Kind
from lodo.state.layout import slots_of
from tests.helpers import resume
from tests.helpers.states import assert_same, edit, fresh_pair, through_file


def test_resume_in_a_new_process_is_bit_exact(tmp_path, kernel):
    halfway, expected = {}, {}
    for name in resume.CASES:
        run = resume.build(name)
        resume.run(*run, begin=0)
        halfway[name] = copy.deepcopy(resume.state_of(*run))
        resume.run(*run, begin=resume.STEPS)
        expected[name] = resume.state_of(*run)
        assert not torch.equal(expected[name]["model"]["0.weight"], halfway[name]["model"]["0.weight"])
    torch.save(halfway, tmp_path / "halfway.pt")
    script = Path(resume.__file__)
    command = [sys.executable, str(script), str(tmp_path / "halfway.pt"), str(tmp_path / "resumed.pt")]
    environment = {**os.environ, "PYTHONPATH": str(Path(lodo.__file__).parents[1])}
    subprocess.run(command, check=True, env=environment)
    found = torch.load(tmp_path / "resumed.pt", weights_only=True)
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_loading_does_not_round_the_network_to_the_parameters_dtype(name):
    model, optimizer, _ = run = resume.build(name)
    resume.run(*run, begin=0)
    saved = through_file(optimizer.state_dict())
    other_model, other, _ = resume.build(name)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(saved)
    assert_same(other.state_dict(), saved)
    theta = optimizer.preconditioners[0].theta
    assert theta.dtype == torch.float32
    assert not torch.equal(theta, theta.to(next(model.parameters()).dtype).float())


def test_loading_into_a_cast_model_keeps_the_bits():
    """Trained in float32, saved, and gone on with in bfloat16: network and momentum stay as they were."""
    model, optimizer, _ = run = resume.build("default")
    resume.run(*run, begin=0)
    saved = through_file(optimizer.state_dict())
    cast = copy.deepcopy(model).to(torch.bfloat16)
    other = lodo.LODO(cast.parameters())
    other.load_state_dict(saved)
    assert torch.equal(other.preconditioners[0].theta, optimizer.preconditioners[0].theta)
    for p, q in zip(cast.parameters(), model.parameters(), strict=True):
        assert torch.equal(other.state[p]["momentum"], optimizer.state[q]["momentum"])
    doubled = copy.deepcopy(model).double()
    other = lodo.LODO(doubled.parameters())
    other.load_state_dict(saved)
    assert torch.equal(other.preconditioners[0].theta, optimizer.preconditioners[0].theta.double())


def test_loading_into_a_moved_model(device):
    model, optimizer, _ = run = resume.build("default")
    resume.run(*run, begin=0)
    saved = through_file(optimizer.state_dict())
    moved = copy.deepcopy(model).to(device)
    other = lodo.LODO(moved.parameters())
    other.load_state_dict(saved)
    g = other.preconditioners[0]
    assert g.theta.device.type == device.type
    assert torch.equal(g.theta.cpu(), optimizer.preconditioners[0].theta)
    for p in moved.parameters():
        p.grad = torch.ones_like(p)
    other.step()


def test_what_is_loaded_is_no_alias_and_saving_does_not_touch_anything():
    model, optimizer, _ = run = resume.build("default")
    resume.run(*run, begin=0)
    saved = copy.deepcopy(optimizer.state_dict())
    given = copy.deepcopy(saved)
    other_model, other, _ = resume.build("default")
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(given)
    resume.run(other_model, other, None, begin=resume.STEPS)
    assert_same(given, saved)
    assert_same(optimizer.state_dict(), saved)


def test_a_loaded_network_can_be_read_before_the_first_step():
    _, optimizer, _ = run = resume.build("residual")
    resume.run(*run, begin=0)
    _, other, _ = resume.build("residual")
    assert other.preconditioners == [None]
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.preconditioners[0].diagonals, optimizer.preconditioners[0].diagonals)


def test_a_state_saved_before_the_first_step_loads():
    _, optimizer, _ = resume.build("default")
    _, other, _ = run = resume.build("default")
    other.load_state_dict(optimizer.state_dict())
    resume.run(*run, begin=0)


def test_a_learned_preconditioner_is_saved_before_its_first_step():
    _, optimizer, _ = run = resume.build("default")
    resume.run(*run, begin=0)
    g = optimizer.preconditioners[0]
    model, _, _ = resume.build("default")
    fresh = lodo.LODO(model.parameters(), preconditioner=g)
    other = lodo.LODO(model.parameters())
    other.load_state_dict(through_file(fresh.state_dict()))
    assert torch.equal(other.preconditioners[0].theta, g.theta)


def test_hyperparameters_come_with_the_state_and_missing_ones_from_the_constructor():
    model, optimizer, _ = run = resume.build("default")
    resume.run(*run, begin=0)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["maximize"], group["seed"]
    other = lodo.LODO(model.parameters(), lr=7.0, seed=5)
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.1
    assert other.param_groups[0]["seed"] == 5
    assert other.param_groups[0]["maximize"] is False


def trained_state(name="default"):
    _, optimizer, _ = run = resume.build(name)
    resume.run(*run, begin=0)
    return copy.deepcopy(optimizer.state_dict())


def with_option(saved, **options):
    saved["param_groups"][0].update(options)
    return saved


def moved(saved, name):
    saved["state"][1][name] = saved["state"][0].pop(name)
    return saved


def without_entry(saved, place):
    del saved["state"][place]
    return saved


def adam_state():
    model, *_ = resume.build("default")
    adam = torch.optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    adam.step()
    return adam.state_dict()


SCATTERED = r"networks with several parameters, got \[0, 1\]"
REFUSED = [
    (
        "another preconditioner",
        lambda: trained_state("diagonal"),
        "'diagonal', this optimizer's is 'block_permutation'",
    ),
    ("another optimizer", adam_state, "not a state of LODO"),
    ("incomplete", lambda: edit(trained_state(), last_lr=None), "last_lr missing"),
    ("another permutation", lambda: trained_state("shuffle"), "permutation 'shuffle', this optimizer's is 'random'"),
    ("another block size", lambda: trained_state("blocks_of_3"), r"theta \(set by depth, block_size and expansion\)"),
    ("no momentum", lambda: edit(trained_state(), momentum=None), "momentum missing"),
    ("momentum shape", lambda: edit(trained_state(), momentum=torch.zeros(3)), r"shape \(3,\) in the saved state"),
    ("moment shape", lambda: edit(trained_state(), theta_exp_avg=torch.zeros(3)), "theta_exp_avg has shape"),
    ("one moment", lambda: edit(trained_state(), theta_exp_avg_sq=None), "theta_exp_avg_sq"),
    ("no indices", lambda: edit(trained_state(), permutations=None), "permutations missing"),
    (
        "indices elsewhere",
        lambda: moved(trained_state(), "permutations"),
        SCATTERED,
    ),
    (
        "a count elsewhere",
        lambda: moved(trained_state(), "meta_step"),
        SCATTERED,
    ),
    ("no network", lambda: without_entry(trained_state(), 0), "theta missing"),
    (
        "indices out of range",
        lambda: edit(trained_state(), permutations=trained_state()["state"][0]["permutations"] + 1),
        "each row of permutations must hold 0 to",
    ),
    (
        "indices twice",
        lambda: edit(trained_state(), permutations=trained_state()["state"][0]["permutations"] // 2),
        "each row of permutations must hold 0 to",
    ),
    (
        "options of another network",
        lambda: with_option(trained_state(), permutation="shuffle"),
        "permutation .*'shuffle'",
    ),
    ("an option out of range", lambda: with_option(trained_state(), block_size=0), "block_size must be an int >= 1"),
    ("an option of another type", lambda: with_option(trained_state(), expansion="2"), "expansion must be a number"),
    ("count", lambda: edit(trained_state(), meta_step=torch.zeros(2)), "meta_step has shape"),
    ("steps", lambda: edit(trained_state(), step=None), "step missing"),
    ("steps as a number", lambda: edit(trained_state(), step=3), "step must be a tensor, got 3"),
    ("integers for theta", lambda: edit(trained_state(), theta=trained_state()["state"][0]["theta"].int()), "int32"),
]


@pytest.mark.parametrize(("make", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(make, message):
    _, optimizer, _ = run = resume.build("default")
    resume.run(*run, begin=0)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(make())
    assert_same(optimizer.state_dict(), before)


def test_a_state_for_another_model_is_refused():
    _, optimizer, _ = resume.build("default")
    other = lodo.LODO([nn.Parameter(torch.zeros(7, 5))])
    with pytest.raises(ValueError, match="doesn't match the size"):
        other.load_state_dict(optimizer.state_dict())
    saved = trained_state()
    other = lodo.LODO([nn.Parameter(torch.zeros(3)) for _ in range(4)])
    with pytest.raises(ValueError, match="parameter 0: momentum has shape"):
        other.load_state_dict(saved)


def test_users_load_hooks_come_first_and_post_hooks_see_the_loaded_state():
    _, optimizer, _ = run = resume.build("default")
    resume.run(*run, begin=0)
    _, other, _ = resume.build("default")
    seen = []

    def rename(_, state_dict):
        state = {
            key: {k.removeprefix("old_"): v for k, v in entry.items()} for key, entry in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    other.register_load_state_dict_pre_hook(rename)
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.state[o.param_groups[0]["params"][0]]["theta"]))
    saved = optimizer.state_dict()
    saved["state"] = {key: {f"old_{k}": v for k, v in entry.items()} for key, entry in saved["state"].items()}
    other.load_state_dict(saved)
    assert torch.equal(seen[0], optimizer.preconditioners[0].theta)


@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoints_keep_everything(tmp_path, flat):
    """The template that torch.distributed.checkpoint loads into comes from a probing step: it must have every entry."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as dsd

    options = dsd.StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer, _ = run = resume.build("default")
    resume.run(*run, begin=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about running without a process group
        saved = {"optimizer": dsd.get_optimizer_state_dict(model, optimizer, options=options)}
        dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
        other_model, other = fresh_pair(model)
        template = {"optimizer": dsd.get_optimizer_state_dict(other_model, other, options=options)}
        dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
        dsd.set_optimizer_state_dict(other_model, other, template["optimizer"], options=options)
    resume.run(*run, begin=resume.STEPS)
    resume.run(other_model, other, None, begin=resume.STEPS)
    assert_same(other_model.state_dict(), model.state_dict())
    assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("exchange", ["share_memory", "data"])
def test_memory_of_the_state_may_be_exchanged_behind_its_tensors(exchange):
    """As when a state dict is sent to a process that writes it, or offloaded."""
    model, optimizer, _ = run = resume.build("default")
    other_model, other = fresh_pair(model)
    for step in range(4):
        for entry in list(optimizer.state.values()):
            for value in entry.values():
                if isinstance(value, torch.Tensor) and exchange == "share_memory":
                    value.share_memory_()
                elif isinstance(value, torch.Tensor):
                    value.data = value.data.clone()
        resume.run(*run, begin=step, steps=1)
        resume.run(other_model, other, None, begin=step, steps=1)
    assert_same(optimizer.state_dict()["state"], other.state_dict()["state"])
    assert_same(model.state_dict(), other_model.state_dict())


def test_replaced_state_is_used():
    model, optimizer, _ = run = resume.build("default")
    resume.run(*run, begin=0)
    other_model, other = copy.deepcopy((model, optimizer))
    for entry in other.state.values():
        for name, value in entry.items():
            entry[name] = value.clone() if isinstance(value, torch.Tensor) else value
    resume.run(*run, begin=resume.STEPS)
    resume.run(other_model, other, None, begin=resume.STEPS)
    assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])


def test_numpy_numbers_among_the_options_are_saved_as_plain_ones():
    x = nn.Parameter(torch.ones(3))
    optimizer = lodo.LODO([x], lr=np.float64(0.1), beta=np.float32(0.5), expansion=np.float64(2))
    loaded = through_file(optimizer.state_dict())
    assert loaded["param_groups"][0]["lr"] == 0.1
    assert type(loaded["param_groups"][0]["beta"]) is float


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_state_without_that_of_frozen_parameters_can_be_saved_again_at_once(dtype):
    """torch.distributed.checkpoint leaves it out; what is saved must not depend on whether there was a step since."""
    params = [nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)]
    params[0].grad = torch.ones_like(params[0])
    optimizer = lodo.LODO(params)
    optimizer.step()
    saved = optimizer.state_dict()
    whole = copy.deepcopy(saved)
    del saved["state"][1]
    other = lodo.LODO(params)
    other.load_state_dict(saved)
    assert_same(other.state_dict(), whole)
    lodo.LODO(params).load_state_dict(other.state_dict())


@pytest.mark.parametrize("last_lr", [1.0, 0.0])
def test_a_frozen_network_is_not_taken_for_lost(last_lr):
    """Its inner optimizer takes no steps: no warning, on the second load either, nor where a schedule ended at 0."""
    x = nn.Parameter(torch.ones(3))
    optimizer = lodo.LODO([x], meta_lr=0.0)
    for lr in (1.0, last_lr):
        x.grad = torch.ones_like(x)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    other = lodo.LODO([x])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(other.preconditioners[0].theta, optimizer.preconditioners[0].theta)
    saved = other.state_dict()
    assert_same(saved, optimizer.state_dict())
    lodo.LODO([x]).load_state_dict(saved)


def test_a_parameter_slipped_into_a_group_is_noticed():
    x, y = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = lodo.LODO([x])
    x.grad = y.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["params"].append(y)
    with pytest.raises(RuntimeError, match="use add_param_group"):
        optimizer.step()


def test_a_switch_of_the_inner_optimizer_is_saved_before_its_first_step():
    """Nothing in a state tells moments that were lost from moments that were not started, so saving starts them."""
    xs = [nn.Parameter(torch.ones(5)) for _ in range(2)]
    first, second = lodo.LODO([xs[0]], lr=0.1, meta_optimizer="sgd"), lodo.LODO([xs[1]], lr=0.1)

    def step(optimizer, x):
        x.grad = x.detach().cos()
        optimizer.step()

    step(first, xs[0]), step(first, xs[0])
    first.param_groups[0]["meta_optimizer"] = "adam"
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        xs[1].copy_(xs[0])
    for _ in range(3):
        step(first, xs[0]), step(second, xs[1])
    assert torch.equal(xs[0], xs[1])
    assert torch.equal(first.preconditioners[0].theta, second.preconditioners[0].theta)


# ---- every single key of every parameter's entry ---------------------------------------------------------------------

OPTIONS = {
    "default": {},
    "residual": {"preconditioner": "residual", "depth": 5, "trace_decay": 0.9},
    "diagonal": {"preconditioner": "diagonal", "meta_state_dtype": "bfloat16", "momentum_dtype": "bfloat16"},
    "scalar, inner SGD": {"preconditioner": "scalar", "meta_optimizer": "sgd"},
    "log_diagonal": {"preconditioner": "log_diagonal", "meta_state_dtype": "bfloat16", "momentum_dtype": "bfloat16"},
    "identity, scaled": {"preconditioner": "identity", "scale_lr": 0.05},
    "adam and blocks": {"base": "adam", "scale_lr": 0.03, "momentum_decays": (0.0, 0.9), "depth": 2, "block_size": 3},
    "recommended": {**lodo.RECOMMENDED},
    "recommended, adam": {**lodo.RECOMMENDED, "base": "adam"},
}
of_every_kind = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
STARTS = (0, 3, 1)


def uneven(options, steps=6, starts=STARTS):
    """Parameters that had their first gradients at different steps: where the network allows it, they have counts of
    their own."""
    params = [nn.Parameter(torch.linspace(-1, 1, n).view(shape)) for n, shape in ((12, (3, 4)), (1, ()), (5, (5,)))]
    optimizer = lodo.LODO(params, **{"lr": 0.05, "weight_decay": 0.01, **options})
    step_unevenly(params, optimizer, 0, steps, starts)
    return params, optimizer


def step_unevenly(params, optimizer, begin, end, starts=STARTS):
    for step in range(begin, end):
        for p, start in zip(params, starts, strict=True):
            p.grad = (p.detach() + step).cos() if step >= start else None
        optimizer.step()


def with_last(value, number):
    """A copy with another last number."""
    value = value.clone()
    value.view(-1)[-1] = number
    return value


def damages(slot, value):
    """What may have become of an entry of a saved state, each with the beginning of what is said of it."""
    yield "missing", None
    yield "must be a tensor", 1.0
    yield "has layout", value.unsqueeze(0).to_sparse()
    yield "has shape", value.unsqueeze(0)
    yield "has shape", value.new_zeros((*value.shape, 2))
    yield "has shape", value.new_zeros(value.numel() + 1)
    yield "has dtype", value.to(torch.float16)
    yield "has dtype", value.to(torch.int16)
    yield "has dtype", value.to(torch.bool)
    if value.numel() == 0:  # the factors of a vector
        return
    if value.is_floating_point():
        for number in (torch.nan,) if slot.may_be_infinite else (torch.nan, torch.inf, -torch.inf):
            yield "holds NaN or infinity", with_last(value, number)
    if slot.low > -torch.inf:
        yield "must hold", with_last(value, slot.low - 1 if value.dtype != torch.uint8 else 255)
    if slot.high < torch.inf:
        yield "must hold", with_last(value, slot.high + 1)
    for row in slot.squares:
        spoilt = value.clone()
        spoilt[row].view(-1)[-1:] = -1e-30
        yield "second moments must hold", spoilt


@of_every_kind
def test_every_key_of_every_entry_is_checked(options):
    """Whatever the parts keep: what is known of it here is what they declare, so that a new one is covered."""
    saved = uneven(options)[1].state_dict()
    _, optimizer = uneven(options, 2)
    slots = {slot.name: slot for slot in slots_of(saved["param_groups"][0])}
    before, refused = fingerprint(optimizer.state_dict()), 0
    for key, entry in saved["state"].items():
        kept = {name: slot for name, slot in slots.items() if slot.kind is not Kind.NETWORK or name in entry}
        assert entry.keys() - {"shards"} == kept.keys()
        for name, slot in kept.items():
            for message, value in damages(slot, entry[name]):
                damaged = {**entry, name: value}
                if value is None:
                    del damaged[name]
                where = rf"{name} missing" if value is None else rf"(group 0|parameter {key}): {name}\b.*{message}"
                with pytest.raises(ValueError, match=where):
                    optimizer.load_state_dict({**saved, "state": {**saved["state"], key: damaged}})
                refused += 1
        unknown = {**entry, "thetas": torch.ones(3)}
        with pytest.raises(ValueError, match=rf"parameter {key}: 'thetas' in the saved state is no entry"):
            optimizer.load_state_dict({**saved, "state": {**saved["state"], key: unknown}})
    assert refused > 9 * len(slots)
    assert fingerprint(optimizer.state_dict()) == before
    optimizer.load_state_dict(saved)
    assert fingerprint(optimizer.state_dict()) == fingerprint(saved)


@of_every_kind
def test_what_may_not_be_negative_is_declared(options):
    """What the test above cannot tell: that a slot says what numbers it allows."""
    for slot in slots_of(lodo.LODO([torch.ones(1)], **options).param_groups[0]):
        if (
            slot.is_whole
            or slot.name.endswith("_sq")
            or slot.name in ("unit", "scheduled_lr", "scale_peak", "trace_peak")
        ):
            assert slot.low == 0, slot.name
        if slot.dtype is Dtype.FLAG:
            assert slot.high < 255, slot.name
        assert slot.squares == ((2,) if slot.name in ("scale", "mixture") else ()), slot.name


@of_every_kind
def test_parameters_with_different_counts_resume_bit_for_bit(options, kernel):
    params, optimizer = uneven(options, starts=(0, 9, 2))
    saved = through_file([params, optimizer.state_dict()])
    is_elementwise = options.get("preconditioner") in ("log_diagonal", "identity")
    assert [int(optimizer.state[p]["step"]) for p in params] == [6, 0, 4]
    others, other = uneven(options, 1)
    with torch.no_grad():
        for p, value in zip(others, saved[0], strict=True):
            p.copy_(value)
    other.load_state_dict(saved[1])
    for begin in (6, 9, 12):
        step_unevenly(params, optimizer, begin, begin + 3, (0, 9, 2) if begin < 12 else (0, 99, 2))
        step_unevenly(others, other, begin, begin + 3, (0, 9, 2) if begin < 12 else (0, 99, 2))
    assert [int(other.state[p]["step"]) for p in others] == [15, 3 if is_elementwise else 6, 13]
    assert_same([p.detach() for p in others], [p.detach() for p in params])
    assert_same(other.state_dict(), optimizer.state_dict())


@of_every_kind
def test_a_parameter_without_an_entry_in_a_saved_state_starts_anew_and_the_others_go_on(options, kernel):
    """As one whose state was popped does; here one that no network of the whole group lies with."""
    (params, optimizer), (others, other), (twins, twin) = (uneven(options) for _ in range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][2]
    other.load_state_dict(saved)
    del optimizer.state[params[2]]
    for each in ((params, optimizer), (others, other), (twins, twin)):
        step_unevenly(*each, 6, 10)
    assert_same([p.detach() for p in others], [p.detach() for p in params])
    assert_same(other.state_dict(), optimizer.state_dict())
    assert [int(other.state[p]["step"]) for p in others] == [10, 7, 4]
    assert not torch.equal(others[2], twins[2])
    if options.get("preconditioner") in ("log_diagonal", "identity"):
        assert_same([p.detach() for p in others[:2]], [p.detach() for p in twins[:2]])
        for p, q in zip(others[:2], twins[:2], strict=True):
            assert_same(other.state[p], twin.state[q])


def test_a_parameter_slipped_into_a_group_of_an_elementwise_network_is_saved_with_it():
    params, optimizer = uneven(lodo.RECOMMENDED)
    late = nn.Parameter(torch.ones(4))
    optimizer.param_groups[0]["params"].append(late)
    saved = copy.deepcopy(optimizer.state_dict())
    assert sorted(saved["state"]) == [0, 1, 2, 3]
    others = [nn.Parameter(p.detach().clone()) for p in (*params, late)]
    other = lodo.LODO(others)
    other.param_groups[0].update({name: saved["param_groups"][0][name] for name in lodo.RECOMMENDED})
    other.load_state_dict(saved)
    step_unevenly([*params, late], optimizer, 6, 10, (0, 0, 0, 7))
    step_unevenly(others, other, 6, 10, (0, 0, 0, 7))
    assert [int(other.state[p]["step"]) for p in others] == [10, 7, 9, 3]
    assert_same([p.detach() for p in others], [p.detach() for p in (*params, late)])
