"""Copies and saved state, under the contracts of torch's own battery (see test_torch_battery.py)."""

import copy
import io
import pickle

import pytest
import torch

from tests.helpers.battery import Problem, every_config, plain


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"]
)
@every_config
def test_copies_go_on_by_themselves(kwargs, copier):
    for steps in (0, 3):
        problem = Problem(kwargs).run(steps)
        twin = copier(problem)
        public, copied = ({name for name in vars(it.optimizer) if name[0] != "_"} for it in (problem, twin))
        assert copied == public
        before = twin.values(), twin.saved()
        problem.run(3)
        assert (twin.values(), twin.saved()) == before
        assert twin.run(3).values() == problem.values()
        assert twin.saved() == problem.saved()


@every_config
def test_saved_state_goes_on_bit_for_bit(kwargs):
    problem, other, file = Problem(kwargs).run(4), Problem(kwargs), io.BytesIO()
    torch.save(problem.optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    before = plain(saved)
    assert before == problem.saved()
    assert set(problem.optimizer.state) == set(problem.params)
    for p, entry in problem.optimizer.state.items():
        assert entry["momentum"].shape == p.shape
        assert (entry["step"], entry["step"].dtype, entry["step"].shape) == (4, torch.int64, ())
    for p, source in zip(other.params, problem.params, strict=True):
        p.data.copy_(source)
    other.optimizer.load_state_dict(saved)
    for _ in range(4):
        assert problem.run(1).values() == other.run(1).values()
        assert problem.saved() == other.saved()
    assert plain(saved) == before  # neither the load nor the steps write into it
    group = other.optimizer.param_groups[0]
    if group["preconditioner"] != "identity" and group["meta_optimizer"] == "adam":
        inner_steps = 8 // group["meta_every"] if group["meta_lr"] > 0 else 0
        assert other.optimizer.state[other.weight]["meta_step"] == inner_steps
    other.optimizer.param_groups.append(group)  # a parameter that is there twice is one in the state dict
    assert other.saved()["param_groups"][0] == other.saved()["param_groups"][1]


@pytest.mark.parametrize("named", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_names_travel_with_the_state(named):
    problem, other = (Problem({}, named=flag) for flag in named)
    other.optimizer.load_state_dict(problem.run(2).optimizer.state_dict())
    names = ["weight", "bias"] if any(named) else None
    assert other.run(1).saved()["param_groups"][0].get("param_names") == names


@every_config
def test_options_that_a_saved_state_lacks_come_from_the_constructor(kwargs):
    problem = Problem(kwargs).run(2)
    options = list(problem.optimizer.defaults)
    for missing in [options, *([name] for name in options)]:
        saved, other = copy.deepcopy(problem.optimizer.state_dict()), Problem(kwargs)
        for name in missing:
            del saved["param_groups"][0][name]
        other.optimizer.load_state_dict(saved)
        assert other.saved() == problem.saved()
        other.run(1)


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize(("dtype", "device"), [("bfloat16", "cpu"), pytest.param("float32", "cuda", marks=NO_CUDA)])
@every_config
def test_state_keeps_its_bits_where_parameters_are_cast_or_moved(kwargs, dtype, device):
    here, there = Problem(kwargs).run(3), Problem(kwargs, dtype=getattr(torch, dtype), device=device)
    there.optimizer.load_state_dict(here.optimizer.state_dict())
    assert there.saved() == here.saved()
    entry = there.run(1).optimizer.state[there.weight]
    learned = "exp_avg_sq" if kwargs.get("preconditioner") == "identity" else "theta"
    found = {name: (entry[name].dtype, entry[name].device.type) for name in ("momentum", learned)}
    kept = torch.bfloat16 if "momentum_dtype" in kwargs else torch.float32
    assert found == {"momentum": (kept, device), learned: (torch.float32, device)}
    back = Problem(kwargs)
    back.optimizer.load_state_dict(there.optimizer.state_dict())
    assert back.saved() == there.saved()
    back.run(1)


def test_state_dict_hooks():
    problem, seen = Problem({}).run(1), []
    optimizer = problem.optimizer
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda opt, saved: {**saved, "note": "saved"})
    optimizer.register_load_state_dict_pre_hook(lambda opt, given: seen.append(given["note"]))
    optimizer.register_load_state_dict_pre_hook(lambda opt, given: {**given, "note": "first"}, prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("loaded"))
    saved, before = optimizer.state_dict(), problem.saved()
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert seen == ["save", "save", "first", "loaded", "first"]
    assert saved["note"] == "saved"
    assert problem.saved() == before
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 2  # and none of LODO's


@pytest.mark.parametrize("value", [1, {"seen": torch.ones(2)}], ids=["number", "dict"])
def test_state_that_hooks_keep_under_their_own_key_survives(value):
    problem, other = Problem({}).run(1), Problem({})
    problem.optimizer.register_state_dict_pre_hook(lambda opt: opt.state.__setitem__("hook", value))
    other.optimizer.load_state_dict(problem.optimizer.state_dict())
    assert plain(other.optimizer.state["hook"]) == plain(value)
    twin = copy.deepcopy(problem)
    assert plain(twin.optimizer.state["hook"]) == plain(value)
    assert twin.run(1).values() == problem.run(1).values()
