"""What breaks loses nothing: short versions of `benchmarks.reliability`, and the promises of docs/reliability.md."""

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import lodo
from benchmarks import reliability
from benchmarks.faults import bad_gradients, broken_steps, corruption, kills
from benchmarks.faults.training import CASES, Training, fingerprint
from examples import checkpoints
from lodo.kernels import native
from lodo.state.group_state import GroupState
from tests.helpers import resume

KERNELS = [
    "plain torch",
    pytest.param("native", marks=pytest.mark.skipif(native.library() is None, reason="no C++ compiler")),
]


# ---- kills and checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL and forkserver")
def test_a_killed_training_goes_on_as_if_nothing_had_been():
    pytest.importorskip("sklearn")
    call = "import json; from benchmarks.faults import kills; print(json.dumps(kills.run('chain 0', 1, 4, 16)))"
    root = Path(reliability.__file__).parents[1]
    # A process of its own: the server that the trainings are forked from is made once, and other tests need another.
    done = subprocess.run([sys.executable, "-c", call], cwd=root, check=True, stdout=subprocess.PIPE, timeout=300)
    found = json.loads(done.stdout)
    assert found["kills"] == 4
    assert found["outcomes"] == {kills.GOOD[0]: 4}
    assert found["the end is that of a run nobody killed"]


def test_a_checkpoint_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    path = tmp_path / "a.pt"
    checkpoints.save(path, {"x": torch.ones(3)})
    assert calls == [path.stat().st_ino, "replace", tmp_path.stat().st_ino]


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_checkpoint_and_nothing_else(error, tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    checkpoints.save(path, {"x": torch.ones(3)})
    before = path.read_bytes()

    def fail(content, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(type(error)):
        checkpoints.save(path, {"x": torch.zeros(3)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_parts_of_files_that_kills_left_are_in_nobodys_way(tmp_path):
    path = tmp_path / "a.pt"
    (tmp_path / f"a.pt.{os.getpid()}.part").write_bytes(b"half")
    (tmp_path / "a.pt.1.part").write_bytes(b"half")
    checkpoints.save(path, {"x": 1})
    assert checkpoints.load(path) == {"x": 1}
    checkpoints.remove_parts(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", corruption.cases(2))
def test_a_bad_checkpoint_is_refused_and_nothing_changes(name):
    found = corruption.run(name, seed=1)
    assert found["outcome"] in corruption.GOOD, found


def test_every_byte_of_a_checkpoint_counts(tmp_path):
    path = tmp_path / "a.pt"
    checkpoints.save(path, {"x": torch.ones(3)})
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"a\.pt is no checkpoint of this program, or damaged"):
            checkpoints.load(path)


@pytest.mark.parametrize("broken", ["model", "optimizer"])
def test_nothing_is_half_loaded(broken):
    training, other = Training("default network"), Training("default network")
    training.advance(0, 3)
    other.advance(10, 12)
    saved, before = training.state(), fingerprint(other.state())
    if broken == "model":
        saved["model"]["2.bias"] = torch.zeros(7)  # the last one: torch copies the others before it complains
    else:
        saved["optimizer"]["state"][0]["theta"][0, 0, 0, 0] = torch.nan
    parts = [(other.model, saved["model"]), (other.optimizer, saved["optimizer"])]
    with pytest.raises(ValueError, match="here does not fit this run"):
        checkpoints.load_together(Path("here"), parts)
    assert fingerprint(other.state()) == before


# ---- saved states ----------------------------------------------------------------------------------------------------


def trained_state(name="default"):
    _, optimizer, _ = run = resume.build(name)
    resume.run(*run, begin=0)
    return copy.deepcopy(optimizer.state_dict())


def put(name, value):
    """An edit of the saved state: one number of a tensor in the first parameter's entry."""

    def edit(saved):
        saved["state"][0][name].view(-1)[-1] = value

    return edit


def without_moments(saved):
    for name in ("theta_exp_avg", "theta_exp_avg_sq"):
        del saved["state"][0][name]


NAN, INF = float("nan"), float("inf")
REFUSED = [
    (put("theta", NAN), r"param group 0: theta \(set by .*\) holds NaN or infinity"),
    (put("momentum", INF), "param group 0, parameter 0: momentum holds NaN or infinity"),
    (put("theta_exp_avg", -INF), "theta_exp_avg holds NaN or infinity"),
    (put("theta_exp_avg_sq", NAN), "theta_exp_avg_sq holds NaN or infinity"),
    (put("theta_exp_avg_sq", -1e-30), "theta_exp_avg_sq must hold numbers >= 0"),
    (put("last_lr", INF), "last_lr holds NaN or infinity"),
    (put("meta_step", -1), "meta_step must hold whole numbers >= 0 in the saved state, got -1"),
    (lambda s: s["state"][0].update(meta_step=torch.tensor(2.5)), "meta_step has dtype torch.float32"),
    (put("step", -1), "parameter 0: step must hold whole numbers >= 0"),
    (put("skipped_steps", -7), "parameter 0: skipped_steps must hold whole numbers >= 0"),
    (without_moments, "theta_exp_avg.* missing"),
    (lambda s: s["state"][1].update(theta=torch.ones(3)), r"networks with several parameters, got \[0, 1\]"),
    (lambda s: s["state"][0].update(thetas=1), "parameter 0: 'thetas' in the saved state is no entry"),
    (lambda s: s["state"][0].update(format=True), "parameter 0: 'format' in the saved state is no entry"),
    (lambda s: s["state"][0].update(shards=2), "shards must be a tensor"),
    (lambda s: s["state"][0].update(shards=torch.ones(2)), "shards has dtype torch.float32"),
    (lambda s: s["state"][0].update(fsdp1_rank=0), "fsdp1_rank must be a tensor"),
    (lambda s: s["state"][0].update(theta=s["state"][0]["theta"].half()), r"theta .* has dtype torch.float16"),
    (lambda s: s["state"][0].update(theta=s["state"][0]["theta"].to_sparse()), "layout torch.sparse_coo"),
    (lambda s: s["state"].update({1: None}), "the saved state of parameter 1 must be a dict, got None"),
    (lambda s: s.pop("state"), "must hold a dict 'state'"),
    (lambda s: s["param_groups"][0].update(params=[0, 0, 1, 2]), "name a parameter twice"),
    (lambda s: s["param_groups"][0].update(depth=[4]), r"depth must be an int >= 0, got \[4\]"),
    (lambda s: s["param_groups"][0].update(expansion=1e308), "expansion times the number of parameters must be finite"),
]


@pytest.mark.parametrize(("edit", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_a_state_that_no_training_leaves_is_refused_and_nothing_changes(edit, message):
    saved = trained_state()
    edit(saved)
    _, optimizer, _ = run = resume.build("default")
    resume.run(*run, begin=2)
    before = fingerprint(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert fingerprint(optimizer.state_dict()) == before


def test_a_network_that_never_learned_needs_no_moments():
    saved = trained_state("frozen")
    assert "theta_exp_avg" not in saved["state"][0]
    saved["param_groups"][0]["meta_lr"] = 1e-3  # thawed, and saved before the next step
    _, optimizer, _ = run = resume.build("frozen")
    optimizer.load_state_dict(saved)
    resume.run(*run, begin=0)


def test_numbers_that_a_schedule_may_leave_are_no_fault():
    saved = trained_state()
    put("last_lr", -1e-18)(saved)  # a cosine, rounded
    put("theta_exp_avg_sq", -0.0)(saved)
    _, optimizer, _ = resume.build("default")
    optimizer.load_state_dict(saved)
    assert fingerprint(optimizer.state_dict()) == fingerprint(saved)


# ---- steps and gradients ---------------------------------------------------------------------------------------------


@pytest.fixture
def _more_cases(monkeypatch):
    monkeypatch.setitem(CASES, "Adam's base", {"auto": True, "base": "adam"})


@pytest.mark.usefixtures("_more_cases")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", ["two groups", "bfloat16 state, meta_every 3", "without tuning", "Adam's base"])
def test_bad_gradients_leave_no_trace_but_their_count(case, kernel):
    found = bad_gradients.run(f"{case}; {kernel}", seed=0, steps=250)
    assert found["bad"] > 0
    assert found["counted exactly"]
    assert (found["checks with NaN or infinity"], found["checks unlike the twin"]) == (0, 0)


@pytest.mark.usefixtures("_more_cases")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("moment", broken_steps.MOMENTS)
@pytest.mark.parametrize("case", ["two groups", "without tuning", "Adam's base"])
def test_memory_that_runs_out_at_any_operation_loses_nothing(case, moment, kernel):
    every = {"native": 5, "plain torch": 41}[kernel]
    found = broken_steps.run(f"memory runs out; {moment}; {case}; {kernel}", every)
    assert found["injected"] > 5
    assert found["outcomes"].keys() <= set(broken_steps.GOOD)
    assert moment == "load" or found["outcomes"]["refused until loaded"] > 4


@pytest.mark.parametrize("name", ["eigh", "qr"])
def test_memory_that_runs_out_in_a_decomposition_is_not_taken_for_one_that_fails(name, monkeypatch):
    """One that fails is done without."""
    training = Training("without tuning")
    training.advance(0, {"eigh": 0, "qr": 9}[name])
    saved = training.state()
    training.set_gradients(9)

    def fail(*_):
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, name, fail)
        with pytest.raises(torch.OutOfMemoryError, match="injected"):
            training.optimizer.step()
    with pytest.raises(RuntimeError, match="broken off in the middle"):
        training.optimizer.step()
    training.load(saved)
    training.advance(9, 10)


@pytest.mark.usefixtures("_more_cases")
@pytest.mark.parametrize("case", ["two groups", "without tuning", "Adam's base"])
def test_an_interrupt_at_any_line_of_a_step_loses_nothing(case):
    found = broken_steps.run(f"Ctrl-C; later step; {case}; native", every=11)
    assert found["injected"] > 30
    assert found["outcomes"].keys() <= set(broken_steps.GOOD)


def test_memory_that_runs_out_at_the_end_of_a_load_is_no_exception():
    """At every operation, not at every so many."""
    found = broken_steps.run("memory runs out; load; lean, shuffle; native")
    assert found["outcomes"].keys() == {"nothing changed"}


def broken_off():
    """A training whose step was broken off in the middle, and its state before."""
    training = Training("default network")
    training.advance(0, 2)
    saved = training.state()
    training.set_gradients(2)
    take = lodo.optimizer.take_step_

    def fail(*arguments):
        take(*arguments)
        raise torch.OutOfMemoryError("injected")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lodo.optimizer, "take_step_", fail)
        with pytest.raises(torch.OutOfMemoryError, match="injected") as caught:
            training.optimizer.step()
    assert any("load_state_dict" in note for note in caught.value.__notes__)
    return training, saved


def test_a_step_that_was_broken_off_is_not_gone_on_from_until_a_state_is_loaded():
    training, saved = broken_off()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken off in the middle"):
            training.optimizer.step()
    with pytest.warns(UserWarning, match="not worth keeping"):
        training.optimizer.state_dict()
    with pytest.raises(ValueError, match="must hold a dict"):  # a load that fails is none
        training.optimizer.load_state_dict({})
    with pytest.raises(RuntimeError, match="broken off in the middle"):
        training.optimizer.step()
    training.load(saved)
    training.advance(2, 4)
    twin = Training("default network")
    twin.advance(0, 4)
    assert fingerprint(training.state()) == fingerprint(twin.state())


def test_a_copy_of_a_broken_off_optimizer_does_not_go_on_either():
    training, saved = broken_off()
    copied = copy.deepcopy(training.optimizer)
    with pytest.raises(RuntimeError, match="broken off in the middle"):
        copied.step()
    copied.load_state_dict(saved["optimizer"])
    copied.step()


def test_state_that_is_exchanged_past_load_state_dict_is_a_loaded_one():
    """As ZeroRedundancyOptimizer does it."""
    training, saved = broken_off()
    optimizer = training.optimizer
    fresh = Training("default network")
    fresh.load(saved)
    for p, other in zip(training.params, fresh.params, strict=True):
        with torch.no_grad():
            p.copy_(other)
        optimizer.state[p] = copy.deepcopy(fresh.optimizer.state[other])
    training.advance(2, 4)
    fresh.advance(2, 4)
    assert fingerprint(training.state()) == fingerprint(fresh.state())


def test_a_broken_off_optimizer_takes_the_call_that_makes_state_to_load_into():
    """Distributed checkpointing calls `step` with lr = 0 and zero gradients first."""
    training, _ = broken_off()
    optimizer = training.optimizer
    with pytest.warns(UserWarning, match="not worth keeping"):
        before = copy.deepcopy(optimizer.state_dict()["state"])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in training.params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    with pytest.warns(UserWarning, match="not worth keeping"):
        after = optimizer.state_dict()["state"]
    assert fingerprint(after) == fingerprint(before)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    with pytest.raises(RuntimeError, match="broken off in the middle"):
        optimizer.step()


def test_a_closure_that_fails_breaks_nothing_off():
    training = Training("default network")
    with pytest.raises(ZeroDivisionError):
        training.optimizer.step(lambda: 1 / 0)
    training.advance(0, 1)


def test_a_warning_that_is_an_error_comes_when_the_step_is_over():
    training = Training("two groups")
    training.advance(0, 1)
    training.set_gradients(1)
    training.params[0].grad[0, 0] = NAN
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="skipped"):
            training.optimizer.step()
    entries = training.optimizer.state.values()
    assert [int(entry["skipped_steps"]) for entry in entries] == [1, 1, 1, 1]
    training.advance(1, 2)


def test_moments_that_could_not_be_published_are_made_again(monkeypatch):
    """Else the inner optimizer would use ones that are not in the state, and a checkpoint would not have them."""
    x = nn.Parameter(torch.ones(5))
    optimizer = lodo.LODO([x], lr=0.1, depth=2)
    x.grad = torch.ones(5)
    optimizer.step()
    optimizer.param_groups[0]["meta_state_dtype"] = "bfloat16"

    def fail(self, *_):
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(GroupState, "_publish", fail)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    optimizer.step()
    assert optimizer.state[x]["theta_exp_avg"].dtype == torch.bfloat16


# ---- the harness and its page ----------------------------------------------------------------------------------------


def test_the_harness_goes_on_where_it_was_cut_off_and_mixes_nothing(tmp_path, monkeypatch, capsys):
    done = []

    def run(name, seed):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(name)
        return {"outcome": corruption.GOOD[0]}

    monkeypatch.setattr(corruption, "run", run)
    arguments = ["corruption", "--corruptions", "1", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        reliability.main(arguments)
    first = list(done)
    done.clear()
    monkeypatch.setattr(corruption, "run", lambda name, seed: done.append(name) or {"outcome": "LOST: all"})
    assert reliability.main(arguments) == 1
    assert first + done == corruption.cases(1)
    said = capsys.readouterr().out
    assert "| checkpoint: truncated | 1 | refused, nothing changed: 1 | 0 |" in said
    assert f"silent losses: {len(done)}" in said
    with pytest.raises(SystemExit):
        reliability.main([*arguments, "--seed", "5"])
    assert "asked for is" in capsys.readouterr().err


def test_the_page_shows_the_committed_results(capsys):
    page = (Path(reliability.__file__).parents[1] / "docs" / "reliability.md").read_text(encoding="utf-8")
    found = {name: reliability.OUT / f"{name}.json" for name in reliability.PARTS}
    rows = []
    for name, path in found.items():
        rows += reliability.PARTS[name].rows(json.loads(path.read_text(encoding="utf-8"))["results"])
    assert reliability.table(rows) in page
    assert sum(losses for *_, losses in rows) == 0
