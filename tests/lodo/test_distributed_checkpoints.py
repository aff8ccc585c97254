"""Checkpoints of training on several ranks: torch.distributed.checkpoint and its options, files that are written while
training goes on, safetensors."""

import copy
import json
import re
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

import lodo
from lodo.state.layout import slots_of
from tests.helpers.distributed_runs import (
    OPTIONS,
    PARTS,
    assert_same,
    assert_same_shards,
    auto_run,
    bfloat16_run,
    ddp_auto_run,
    ddp_run,
    deeper_network,
    everything,
    from_docs,
    frozen_run,
    fsdp_run,
    hsdp_auto_run,
    hsdp_run,
    late_adam_run,
    late_run,
    local,
    local_or_same,
    network,
    one_group_run,
    own_share,
    parts_run,
    plain_run,
    train,
    two_dimensional_auto_run,
    two_dimensional_run,
    whole,
)
from tests.helpers.distributed_states import WAYS, load, resumed_in_all_ways, save
from tests.helpers.ranks import run


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (
            2,
            (
                (ddp_run, tuple(WAYS)),
                (ddp_auto_run, ("sharded", "full", "broadcast")),
                (fsdp_run, ("sharded", "flat", "full", "broadcast")),
                (bfloat16_run, ("sharded",)),
                (parts_run, ("sharded", "full")),
                (late_run, ("sharded", "flat", "offloaded", "gathered", "full", "broadcast")),
                (late_adam_run, ("sharded", "full")),
                (frozen_run, ("sharded", "offloaded", "trained only", "gathered")),
            ),
        ),
        (
            4,
            (
                (hsdp_run, ("sharded", "full")),
                (hsdp_auto_run, ("sharded", "full")),
                (two_dimensional_run, ("sharded", "flat", "full", "broadcast")),
                (two_dimensional_auto_run, ("sharded", "flat", "full", "broadcast")),
            ),
        ),
    ],
    ids=["2 ranks", "4 ranks"],
)
def test_distributed_checkpoints_resume_bit_for_bit(tmp_path, world, cases):
    run(world, resumed_in_all_ways, tmp_path, cases)


def resumed_after_a_nan(folder, makers):
    """One rank has skipped a step that the others have taken, so that their counts differ."""
    for make in makers:
        model, optimizer = make()
        train(model, optimizer, 0, 3)
        optimizer.zero_grad()
        model(torch.ones(2, 5)).square().mean().backward()
        if dist.get_rank() == 1:
            local(model[0].weight.grad)[0, 0] = torch.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        assert optimizer.skipped_steps == dist.get_rank()
        train(model, optimizer, 3, 5)
        save(folder / make.__name__, model, optimizer)
        other_model, other = make()
        load(folder / make.__name__, other_model, other)
        assert other.skipped_steps == dist.get_rank()
        train(model, optimizer, 5, 12)
        train(other_model, other, 5, 12)
        assert_same_shards(other_model, other, model, optimizer)


def test_a_nan_in_one_shard_does_not_keep_a_checkpoint_from_going_on_bit_for_bit(tmp_path):
    run(2, resumed_after_a_nan, tmp_path, (fsdp_run, parts_run, late_run, late_adam_run, one_group_run))


def momenta(model, optimizer):
    return {name: whole(optimizer.state[p]["momentum"]) for name, p in model.named_parameters()}


def saved_run(folder, make):
    """Leaves a sharded and a full checkpoint; returns parameters and momentum."""
    model, optimizer = make()
    train(model, optimizer, 0, 8)
    save(folder, model, optimizer)
    save(folder, model, optimizer, full_state_dict=True, cpu_offload=True)
    return {name: whole(p) for name, p in model.named_parameters()}, momenta(model, optimizer)


def resharded_run(folder, make, ways):
    """Loads both; returns parameters and momentum. Everything else is as in a new optimizer of these parameters."""
    results = []
    for name in ways:
        model, optimizer = make()
        if name == "sharded":  # into one that has its own state
            train(model, optimizer, 0, 2)
        planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(folder, model, optimizer, planner, **WAYS[name])
        assert sum("another number of shards" in str(warning.message) for warning in caught) == 1
        assert optimizer.param_groups[0]["meta_lr"] == OPTIONS["meta_lr"]
        new_model, new = make()
        for group in new.param_groups:
            group["lr"] = 0.0
        with torch.no_grad():
            for p, value in zip(new_model.parameters(), model.parameters(), strict=True):
                p.copy_(value)
                p.grad = torch.zeros_like(p)
        new.step()
        for p, q in zip(model.parameters(), new_model.parameters(), strict=True):
            entry, fresh = optimizer.state[p], new.state[q]
            assert entry.keys() == fresh.keys()
            for key in entry.keys() - {"momentum"}:
                assert_same(local_or_same(entry[key]), local_or_same(fresh[key]))
        results.append(({name: whole(p) for name, p in model.named_parameters()}, momenta(model, optimizer)))
        train(model, optimizer, 8, 10)
        assert optimizer.skipped_steps == 0
    return results


SHARDED, FULL = ("sharded",), ("full", "broadcast")


@pytest.mark.parametrize(
    ("worlds", "makers", "ways"),
    [
        ((4, 2), (fsdp_run, fsdp_run), SHARDED + FULL),
        ((2, 4), (fsdp_run, fsdp_run), SHARDED + FULL),
        # A full state that every rank reads cannot go from one process to shards: torch stops at the 0-dimensional
        # numbers, which shards keep otherwise.
        ((1, 2), (plain_run, one_group_run), (*SHARDED, "broadcast")),
        ((2, 1), (one_group_run, plain_run), SHARDED + FULL),
    ],
    ids=["4 to 2", "2 to 4", "1 to 2", "2 to 1"],
)
def test_another_number_of_shards_keeps_the_momentum_and_renews_the_networks(tmp_path, worlds, makers, ways):
    (expected, *_) = run(worlds[0], saved_run, tmp_path, makers[0])
    for results in run(worlds[1], resharded_run, tmp_path, makers[1], ways):
        for found in results:
            assert_same(found, expected)


def unsharded_parts_run():
    model = network(torch.float32)
    return model, lodo.LODO(model.parameters(), **OPTIONS, **PARTS)


@pytest.mark.parametrize(
    ("worlds", "makers", "ways"),
    [
        ((4, 2), (parts_run, parts_run), SHARDED + FULL),
        ((2, 4), (parts_run, parts_run), SHARDED + FULL),
        ((1, 2), (unsharded_parts_run, parts_run), (*SHARDED, "broadcast")),
        ((2, 1), (parts_run, unsharded_parts_run), SHARDED + FULL),
    ],
    ids=["4 to 2", "2 to 4", "1 to 2", "2 to 1"],
)
def test_another_number_of_shards_renews_all_where_there_is_a_base(tmp_path, worlds, makers, ways):
    """Momentum is in its units."""
    ((parameters, momentum), *_) = run(worlds[0], saved_run, tmp_path, makers[0])
    assert all(value.any() for value in momentum.values())
    for results in run(worlds[1], resharded_run, tmp_path, makers[1], ways):
        for found in results:
            assert_same(found, (parameters, {name: torch.zeros_like(value) for name, value in momentum.items()}))


def unsharded_auto_run():
    model = network(torch.float32)
    return model, lodo.AutoLODO(model.parameters(), average_share=0.5)


def unsharded_deeper_run():
    model = deeper_network()
    return model, lodo.AutoLODO(model.parameters(), average_share=0.5)


def averages(model, optimizer):
    """The averages themselves, and how many iterates they are of."""
    entries = [optimizer.state[p] for p in model.parameters()]
    return [whole(entry["average"]) for entry in entries], [int(entry["averaged"]) for entry in entries]


def saved_averages(folder, make):
    model, optimizer = make()
    train(model, optimizer, 0, 8, own_share(model))
    save(folder, model, optimizer)
    save(folder, model, optimizer, full_state_dict=True, cpu_offload=True)
    return averages(model, optimizer)


def resharded_averages(folder, make, ways, expected):
    for name in ways:
        model, optimizer = make()
        train(model, optimizer, 0, 2, own_share(model))
        planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(folder, model, optimizer, planner, **WAYS[name])
        assert_same(averages(model, optimizer), expected)
        before, x = expected[0], [whole(p) for p in model.parameters()]
        train(model, optimizer, 8, 9, own_share(model))
        means = [mean.lerp(value, 1 / (1 + 0.5 * 8)) for mean, value in zip(before, x, strict=True)]
        torch.testing.assert_close(averages(model, optimizer), (means, [9] * len(means)))
        saved = optimizer.state_dict()
        marked = {**saved["state"][0], "shards": torch.tensor([7, 7])}
        for key, value, message in (
            ("averaged", torch.tensor(-1), "averaged must hold"),
            ("average", torch.zeros(2), "average has shape"),
        ):
            entries = {**saved["state"], 0: {**marked, key: value}}
            assert re.search(message, refusal(optimizer, {**saved, "state": entries}))


def other_shards():
    """A state of as many shards, but of other ones, as another way to shard leaves it."""
    model, optimizer = auto_run()
    train(model, optimizer, 0, 8)
    saved, kept = optimizer.state_dict(), averages(model, optimizer)
    for entry in saved["state"].values():
        entry["shards"] = entry["shards"] + torch.tensor([0, 1])
    other_model, other = auto_run()
    with pytest.warns(UserWarning, match="or other ones"):
        other.load_state_dict(saved)
    assert_same(averages(other_model, other), kept)
    for entry in other.state.values():
        assert int(entry["step"]) == 0
        assert not any(local(entry[name]).any() for name in ("momentum", "momenta", "exp_avg_sq", "seen"))


def test_other_shards_of_the_same_number_begin_anew():
    run(2, other_shards)


def shown_averages():
    """A state that was saved at the averages goes on from the iterates, on other shards too."""
    model, optimizer = auto_run()
    train(model, optimizer, 0, 8)
    iterates = [local(p).clone() for p in model.parameters()]
    optimizer.eval()
    saved, points = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    for entry in saved["state"].values():
        entry["shards"] = entry["shards"] + torch.tensor([0, 1])
    other_model, other = auto_run()
    other_model.load_state_dict(points)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.load_state_dict(saved)
    other.train()
    assert_same([local(p) for p in other_model.parameters()], iterates)


def test_a_state_saved_at_the_averages_has_the_iterates_on_other_shards_too():
    run(2, shown_averages)


@pytest.mark.parametrize(
    ("worlds", "makers", "ways"),
    [
        ((4, 2), (auto_run, auto_run), SHARDED + FULL),
        ((1, 2), (unsharded_auto_run, auto_run), (*SHARDED, "broadcast")),
        ((2, 1), (auto_run, unsharded_auto_run), SHARDED + FULL),
        ((4, 1), (two_dimensional_auto_run, unsharded_deeper_run), SHARDED + FULL),
        ((1, 4), (unsharded_deeper_run, two_dimensional_auto_run), (*SHARDED, "broadcast")),
    ],
    ids=["4 to 2", "1 to 2", "2 to 1", "2 x 2 to 1", "1 to 2 x 2"],
)
def test_averages_go_on_with_another_number_of_shards(tmp_path, worlds, makers, ways):
    expected, *_ = run(worlds[0], saved_averages, tmp_path, makers[0])
    run(worlds[1], resharded_averages, tmp_path, makers[1], ways, expected)


def spoilt(value, slot):
    """What may have become of a sharded entry of a saved state, each with what is said of it, on all ranks."""
    yield "missing", None
    yield "must be a DTensor|must be a tensor|its parameter is", 1.0
    if not isinstance(value, DTensor):
        yield "has shape", value.unsqueeze(0)
        yield "has dtype", value.to(torch.float16)
        yield "must hold", value - 100
        return
    yield "must be a DTensor|is a plain tensor|has shape", local(value)
    yield (
        "has shape",
        DTensor.from_local(local(value).repeat(2, *[1] * (value.dim() - 1)), value.device_mesh, value.placements),
    )
    numbers = [(torch.nan, "NaN or infinity")] if value.is_floating_point() else []
    numbers += [(-torch.inf, "NaN or infinity")] if numbers and not slot.may_be_infinite else []
    numbers += [(slot.low - 1, "must hold")] if slot.low > -torch.inf else []
    for number, message in numbers:
        changed = local(value).clone()
        changed.view(-1)[:1] = number
        yield (
            message,
            DTensor.from_local(changed, value.device_mesh, value.placements, shape=value.shape, stride=value.stride()),
        )
    for dtype in (torch.float16, torch.int16) if value.is_floating_point() else (torch.int16, torch.float32):
        yield "has dtype", value.to(dtype)


def refusal(optimizer, saved):
    """What is said of a saved state; nothing if it is loaded."""
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        return str(error)
    return ""


def misfits(cases):
    """A sharded optimizer refuses, before anything has changed, what it cannot go on from."""
    for make in cases:
        model, optimizer = make()
        train(model, optimizer, 0, 4)
        before = everything(model, optimizer)
        saved = optimizer.state_dict()
        slots = {slot.name: slot for slot in slots_of(saved["param_groups"][0])}
        for key, entry in saved["state"].items():
            for name, value in entry.items():
                slot = slots.get(name.removesuffix("_in_2_shards"))
                if local(value).numel() == 0 or name in ("shards", "step", "averaged"):  # read by nothing here
                    continue
                for message, other in spoilt(value, slot):
                    changed = {**entry, name: other}
                    if other is None:
                        del changed[name]
                    said = refusal(optimizer, {**saved, "state": {**saved["state"], key: changed}})
                    expected = rf"{slot.name}(_in_2_shards)?\b.*({message})"
                    assert re.search(expected, said), (make.__name__, key, name, message, said)
        assert_same(*(pytree.tree_map(local_or_same, seen) for seen in (everything(model, optimizer), before)))
        optimizer.load_state_dict(saved)
        assert_same(*(pytree.tree_map(local_or_same, seen) for seen in (everything(model, optimizer), before)))
    other = lodo.LODO(network(torch.float32).parameters())
    with pytest.raises(ValueError, match="its parameter is a plain tensor"):
        other.load_state_dict(saved)


def test_a_state_that_does_not_fit_the_shards_is_refused():
    """Each single key of each parameter's entry."""
    run(2, misfits, (fsdp_run, parts_run, auto_run, one_group_run))


class HeldWriter(dcp.FileSystemWriter):
    """Writes nothing until it may."""

    def __init__(self, folder):
        super().__init__(folder)
        self.may_write = threading.Event()

    def prepare_local_plan(self, plan):
        assert self.may_write.wait(60)
        return super().prepare_local_plan(plan)


def saved_while_training(folder, makers):
    """The file holds the state at the time of the call, although the optimizer changes it in place meanwhile."""
    alone = {} if dist.is_initialized() else {"no_dist": True}
    group = None if alone else dist.new_group(backend="gloo")
    default = DefaultStager(StagingOptions(False, False, False, False))  # as torch makes it for a `checkpoint_id`
    for make in makers:
        for stager in (default, None):  # None: the writer's own
            path = folder / f"{make.__name__}-{stager is None}"
            model, optimizer = make()
            train(model, optimizer, 0, 4, own_share())
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            writer = HeldWriter(path)
            future = dcp.async_save(state, storage_writer=writer, async_stager=stager, process_group=group, **alone)
            train(model, optimizer, 4, 8, own_share())
            assert not future.done()
            writer.may_write.set()
            future.result()
            other_model, other = make()
            load(path, other_model, other)
            train(other_model, other, 4, 8, own_share())
            assert_same_shards(other_model, other, model, optimizer)


@pytest.mark.parametrize(("world", "makers"), [(1, (fsdp_run,)), (2, (ddp_run, fsdp_run, bfloat16_run))])
def test_an_asynchronous_save_holds_the_state_at_the_time_of_its_call(tmp_path, world, makers):
    run(world, saved_while_training, tmp_path, makers)


@pytest.mark.filterwarnings("ignore")  # torch's own, about running without a process group
def test_an_asynchronous_save_needs_no_process_group(tmp_path):
    saved_while_training(tmp_path, (plain_run,))


def named_run():
    """Named parameters, and an lr that is a tensor."""
    model = network(torch.float32)
    return model, lodo.LODO(model.named_parameters(), **{**OPTIONS, "lr": torch.tensor(0.1)}, permutation="shuffle")


def through_safetensors(folder, makers):
    save_optimizer, load_optimizer = from_docs("save_optimizer"), from_docs("load_optimizer")
    for make in makers:
        path = folder / f"{make.__name__}.safetensors"
        model, optimizer = make()
        train(model, optimizer, 0, 5, own_share(model))
        save_optimizer(path, model, optimizer)
        other_model, other = make()
        set_model_state_dict(other_model, get_model_state_dict(model))
        if dist.is_initialized():
            dist.barrier()
        load_optimizer(path, other_model, other)
        assert_same_shards(other_model, other, model, optimizer)
        assert other.param_groups[0].keys() == optimizer.param_groups[0].keys()
        train(model, optimizer, 5, 10, own_share(model))
        train(other_model, other, 5, 10, own_share(model))
        assert_same_shards(other_model, other, model, optimizer)


def test_a_safetensors_file_resumes_bit_for_bit(tmp_path):
    pytest.importorskip("safetensors")
    through_safetensors(tmp_path, (plain_run, named_run))


def test_a_safetensors_file_has_names_of_the_model_and_is_checked(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    files = pytest.importorskip("safetensors.torch")
    model, optimizer = plain_run()
    train(model, optimizer, 0, 2)
    from_docs("save_optimizer")(tmp_path / "saved", model, optimizer)
    with safetensors.safe_open(tmp_path / "saved", framework="pt") as file:
        rest = json.loads(file.metadata()["lodo"])
    tensors = files.load_file(tmp_path / "saved")
    names = ("theta", "permutations", "theta_exp_avg", "theta_exp_avg_sq", "meta_step", "network_step", "last_lr")
    expected = {f"state.0.weight.{name}" for name in names}
    for name, _ in model.named_parameters():
        expected |= {f"state.{name}.{own}" for own in ("step", "skipped_steps", "shards", "momentum")}
    assert expected == tensors.keys()
    assert rest["param_groups"][0]["params"] == [name for name, _ in model.named_parameters()]
    assert not rest.get("numbers")
    tensors["state.2.bias.step"] -= 3
    files.save_file(tensors, tmp_path / "later", metadata={"lodo": json.dumps(rest)})
    with pytest.raises(ValueError, match="parameter 3: step must hold whole numbers >= 0"):
        from_docs("load_optimizer")(tmp_path / "later", model, optimizer)


def test_a_safetensors_file_of_several_ranks_resumes_bit_for_bit(tmp_path):
    pytest.importorskip("safetensors")
    run(2, through_safetensors, tmp_path, (ddp_run, fsdp_run))
