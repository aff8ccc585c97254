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


def adam_state():
    model, *_ = resume.build("default")
    adam = torch.optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    adam.step()
    return adam.state_dict()


REFUSED = [
    (
        "another preconditioner",
        lambda: trained_state("diagonal"),
        "'diagonal', this optimizer's is 'block_permutation'",
    ),
    ("another optimizer", adam_state, "not a state of LODO"),
    ("incomplete", lambda: edit(trained_state(), last_lr=None), "last_lr missing"),
    (
        "another format",
        lambda: edit(trained_state(), format=99),
        "format 99, this version of lodo reads formats 1 to 3",
    ),
    ("another block size", lambda: trained_state("shuffle"), r"theta \(set by depth, block_size and expansion\)"),
    ("no momentum", lambda: edit(trained_state(), momentum=None), "momentum must be a tensor"),
    ("momentum shape", lambda: edit(trained_state(), momentum=torch.zeros(3)), r"shape \(3,\) in the saved state"),
    ("moment shape", lambda: edit(trained_state(), theta_exp_avg=torch.zeros(3)), "theta_exp_avg has shape"),
    ("one moment", lambda: edit(trained_state(), theta_exp_avg_sq=None), "theta_exp_avg_sq"),
    ("no indices", lambda: edit(trained_state(), permutations=None), "without indices"),
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
        "permutation='shuffle'",
    ),
    ("an option out of range", lambda: with_option(trained_state(), block_size=0), "block_size must be an int >= 1"),
    ("an option of another type", lambda: with_option(trained_state(), expansion="2"), "expansion must be a number"),
    ("format as a tensor", lambda: edit(trained_state(), format=torch.ones(2)), "the state has format tensor"),
    ("count", lambda: edit(trained_state(), meta_step=torch.zeros(2)), "meta_step has shape"),
    ("steps", lambda: edit(trained_state(), steps=None), "steps must be a tensor"),
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
def test_a_state_without_the_momentum_of_frozen_parameters_can_be_saved_again_at_once(dtype):
    """torch.distributed.checkpoint leaves it out; what is saved must not depend on whether there was a step since."""
    params = [nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)]
    params[0].grad = torch.ones_like(params[0])
    optimizer = lodo.LODO(params)
    optimizer.step()
    saved = optimizer.state_dict()
    whole = copy.deepcopy(saved)
    del saved["state"][1]["momentum"]
    other = lodo.LODO(params)
    other.load_state_dict(saved)
    assert_same(other.state_dict(), whole)
    lodo.LODO(params).load_state_dict(other.state_dict())


def test_a_frozen_network_of_format_1_is_not_taken_for_lost():
    """Format 1 had no count of the steps, and its inner optimizer took none: no warning, on the second load either."""
    x = nn.Parameter(torch.ones(3))
    x.grad = torch.ones_like(x)
    optimizer = lodo.LODO([x], meta_lr=0.0)
    optimizer.step()
    other = lodo.LODO([x])
    other.load_state_dict(edit(optimizer.state_dict(), format=1, steps=None))
    assert torch.equal(other.preconditioners[0].theta, optimizer.preconditioners[0].theta)
    saved = other.state_dict()
    assert (saved["state"][0]["format"], int(saved["state"][0]["steps"])) == (2, 0)
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


def test_an_optimizer_that_was_pickled_before_there_were_bounds_goes_on():
    x = nn.Parameter(torch.ones(5))
    optimizer = lodo.LODO([x], lr=0.1)
    x.grad = torch.ones(5)
    optimizer.step()
    old = copy.deepcopy(optimizer.__getstate__())
    for options in (old["defaults"], *old["param_groups"]):
        del options["max_step_norm"], options["max_condition"]
    resumed = lodo.LODO.__new__(lodo.LODO)
    resumed.__setstate__(old)
    y = resumed.param_groups[0]["params"][0]
    for p, goes_on in ((x, optimizer), (y, resumed)):
        p.grad = torch.ones(5)
        goes_on.step()
    assert torch.equal(x, y)
