"""`lodo.AutoLODO`: the call without tuning, as people and their tools make it, and what it is the same as."""

import copy
import importlib
import inspect
import io
import os
import sys
from collections import UserList
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

import lodo
from lodo.options import HINTS, NETWORK
from tests.helpers.states import assert_same

# Read when the libraries are first imported.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
os.environ.update(JSONARGPARSE_DEPRECATION_WARNINGS="off")  # of its own names, which Lightning uses

CONFIGURED = {
    "class_path": "lodo.AutoLODO",
    "init_args": {"weight_decay": 0.1, "momentum_decays": [0.0, 0.95], "base": "adam"},
}


def mlp(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def lodo_recommended(params, **options):
    return lodo.LODO(params, **{**lodo.RECOMMENDED, **options})


def train(model, optimizer, begin, end):
    """Steps on batches that follow from the step's number alone."""
    losses = []
    for step in range(begin, end):
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (model(x) - x[:, :3].sin() * x[:, 3:]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_runs(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert_same(one.state_dict(), other.state_dict())


def options_of(optimizer, group=0):
    return {name: value for name, value in optimizer.param_groups[group].items() if name != "params"}


# ---- the same as LODO with the recommended options -----------------------------------------------------------------


def test_its_defaults_are_the_recommended_options_and_for_the_rest_those_of_lodo():
    def defaults(kind):
        parameters = inspect.signature(kind).parameters.values()
        return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}

    expected = {**defaults(lodo.LODO), **lodo.RECOMMENDED}
    fixed = {*NETWORK, "meta_optimizer", "seed"}  # of networks, which it has not
    assert defaults(lodo.AutoLODO) == {name: value for name, value in expected.items() if name not in fixed}
    params = [torch.ones(2, 3, requires_grad=True)]
    auto, recommended = lodo.AutoLODO(params), lodo_recommended(params)
    assert options_of(auto) == options_of(recommended)
    assert auto.defaults == recommended.defaults
    assert isinstance(auto, lodo.LODO)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.01, "weight_decay": 0.1},
        {"base": "adam", "momentum_decays": None, "scale_lr": 0.0, "max_step_norm": 0.1},
    ],
    ids=["defaults", "lr, weight_decay", "others"],
)
def test_it_takes_the_steps_of_the_recommended_options_to_the_last_bit(options):
    model, other = mlp(), mlp()
    auto, recommended = lodo.AutoLODO(model.parameters(), **options), lodo_recommended(other.parameters(), **options)
    losses = train(model, auto, 0, 30)
    assert train(other, recommended, 0, 30) == losses
    assert sum(losses[-5:]) < sum(losses[:5])
    assert_same_runs((model, auto), (other, recommended))


@pytest.mark.parametrize(
    ("first", "second"), [(lodo.AutoLODO, lodo_recommended), (lodo_recommended, lodo.AutoLODO)], ids=["from", "into"]
)
def test_states_load_both_ways_and_go_on_with_the_same_bits(first, second):
    model, other = mlp(), mlp(seed=1)
    optimizer = first(model.parameters())
    train(model, optimizer, 0, 12)
    loaded = second(other.parameters(), lr=0.5)
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert type(loaded) is not type(optimizer)
    assert train(other, loaded, 12, 25) == train(model, optimizer, 12, 25)
    assert_same_runs((other, loaded), (model, optimizer))


def test_saved_with_torch_save_it_goes_on_with_the_same_bits():
    model, other = mlp(), mlp(seed=1)
    optimizer = lodo.AutoLODO(model.parameters(), weight_decay=0.1)
    train(model, optimizer, 0, 12)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    loaded = lodo.AutoLODO(other.parameters())
    other.load_state_dict(saved["model"])
    loaded.load_state_dict(saved["optimizer"])
    train(model, optimizer, 12, 25)
    train(other, loaded, 12, 25)
    assert_same_runs((other, loaded), (model, optimizer))


def test_a_copy_stays_an_auto_lodo_and_goes_on_with_the_same_bits():
    model = mlp()
    optimizer = lodo.AutoLODO(model.parameters())
    train(model, optimizer, 0, 12)
    other, copied = copy.deepcopy((model, optimizer))
    assert type(copied) is lodo.AutoLODO
    train(model, optimizer, 12, 20)
    train(other, copied, 12, 20)
    assert_same_runs((other, copied), (model, optimizer))


# ---- what it does not have -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value", "instead"),
    [
        ("betas", (0.9, 0.999), "`beta`"),
        ("momentum", 0.9, "`beta`"),
        ("eps", 1e-8, "it needs none"),
        ("foreach", True, "None and False are allowed"),
        ("fused", True, "None and False are allowed"),
        ("differentiable", True, "None and False are allowed"),
        ("amsgrad", True, "None and False are allowed"),
        ("depth", 4, "lodo.LODO"),
        ("preconditioner", "identity", "lodo.LODO"),
        ("nesterov", False, ""),
    ],
)
def test_arguments_that_it_does_not_have_are_refused_by_name_and_value(argument, value, instead):
    with pytest.raises(TypeError) as raised:
        lodo.AutoLODO(mlp().parameters(), **{argument: value})
    message = str(raised.value)
    assert message.startswith(f"AutoLODO has no argument {argument!r}, got {value!r}")
    assert instead in message
    assert len(message.splitlines()) == 1
    assert raised.value.__cause__ is raised.value.__context__ is None


@pytest.mark.parametrize("nothing", [None, False])
def test_arguments_of_factories_that_ask_for_nothing_are_accepted_and_leave_no_trace(nothing):
    params = list(mlp().parameters())
    optimizer = lodo.AutoLODO(params, lr=0.01, **dict.fromkeys(HINTS, nothing))
    assert set(HINTS) == {"foreach", "fused", "differentiable", "amsgrad"}
    assert options_of(optimizer) == options_of(lodo.AutoLODO(params, lr=0.01))


@pytest.mark.parametrize(
    ("option", "value"), [("lr", -1.0), ("weight_decay", -0.1), ("base", "shampoo"), ("momentum_decays", [0.9, 1.0])]
)
def test_values_out_of_range_are_refused_by_name_as_by_lodo(option, value):
    with pytest.raises(ValueError, match=f"^{option} must be ") as raised:
        lodo.AutoLODO(mlp().parameters(), **{option: value})
    with pytest.raises(ValueError, match=f"^{option} must be ") as others:
        lodo_recommended(mlp().parameters(), **{option: value})
    assert str(raised.value) == str(others.value)


# ---- made by tools -------------------------------------------------------------------------------------------------


def made_from(config, params):
    """As frameworks make it of a class path and its arguments."""
    module, _, name = config["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)(params, **config.get("init_args", {}))


def test_it_is_made_from_a_class_path_alone():
    optimizer = made_from({"class_path": "lodo.AutoLODO"}, mlp().parameters())
    assert type(optimizer) is lodo.AutoLODO
    assert options_of(optimizer) == options_of(lodo.AutoLODO(mlp().parameters()))


def test_it_is_made_from_a_class_path_and_the_lists_that_yaml_has():
    model = mlp()
    optimizer = made_from(CONFIGURED, model.parameters())
    assert options_of(optimizer) == {
        **options_of(lodo.AutoLODO(mlp().parameters())),
        "weight_decay": 0.1,
        "momentum_decays": (0.0, 0.95),
        "base": "adam",
    }
    train(model, optimizer, 0, 3)


def test_decays_may_be_a_sequence_of_a_configurations_own_and_are_saved_as_plain_numbers():
    """As Hydra's lists are, which are no `list`."""
    model, file = mlp(), io.BytesIO()
    optimizer = lodo.AutoLODO(model.parameters(), momentum_decays=UserList([0.0, 0.9]))
    train(model, optimizer, 0, 2)
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    (group,) = torch.load(file, weights_only=True)["param_groups"]
    assert group["momentum_decays"] == (0.0, 0.9)


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        (["--optimizer=lodo.AutoLODO"], {}),
        (
            ["--optimizer=lodo.AutoLODO", "--optimizer.lr=1e-2", "--optimizer.momentum_decays=[0.0, 0.9]"],
            {"lr", "momentum_decays"},
        ),
        (["--optimizer=lodo.AutoLODO", "--optimizer.momentum_dtype=bfloat16"], {"momentum_dtype"}),
        ([f"--optimizer={CONFIGURED!r}"], {"weight_decay", "momentum_decays", "base"}),
    ],
    ids=["class path", "options", "dtype", "YAML"],
)
def test_jsonargparse_makes_it_from_its_class_path(arguments, changed):
    jsonargparse = pytest.importorskip("jsonargparse")
    pytest.importorskip("typeshed_client")  # of jsonargparse[signatures]
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=Callable[[Iterable], torch.optim.Optimizer])
    parsed = parser.parse_args(arguments)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    made = instantiate(parsed).optimizer
    model = mlp()
    optimizer = made(model.parameters())
    assert type(optimizer) is lodo.AutoLODO
    found, expected = options_of(optimizer), options_of(lodo.AutoLODO(mlp().parameters()))
    assert {name for name in expected if found[name] != expected[name]} == set(changed)
    train(model, optimizer, 0, 3)
    assert "class_path: lodo.AutoLODO\n" in parser.dump(parsed)


def test_jsonargparse_refuses_what_it_does_not_have():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=Callable[[Iterable], torch.optim.Optimizer])
    with pytest.raises(jsonargparse.ArgumentError, match="betas"):
        parser.parse_args(["--optimizer=lodo.AutoLODO", "--optimizer.betas=[0.9, 0.999]"])


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_the_command_line_of_lightning_makes_it_from_its_class_path(monkeypatch):
    lightning = pytest.importorskip("lightning")
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = mlp()

        def training_step(self, batch, index):
            return self.network(batch).square().mean()

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.randn(32, 6), batch_size=8)

    trainer = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False}
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False}
    monkeypatch.setattr(sys, "argv", ["train"])
    command = LightningCLI(
        Module,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        args={"optimizer": CONFIGURED, "trainer": trainer},
    )
    command.trainer.fit(command.model)
    (optimizer,) = command.trainer.optimizers
    assert type(optimizer) is lodo.AutoLODO
    assert options_of(optimizer)["momentum_decays"] == (0.0, 0.95)
    assert command.trainer.global_step == 4


def test_the_trainer_of_hugging_face_makes_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from examples.frameworks.tiny import gpt2, sequences

    model = gpt2()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        logging_steps=10,
        per_device_train_batch_size=32,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=sequences(),
        optimizer_cls_and_kwargs=(lodo.AutoLODO, {}),
    )
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is lodo.AutoLODO
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == [lodo.RECOMMENDED["lr"]] * 2
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


# ---- param groups as timm makes them -------------------------------------------------------------------------------


def timm_groups(model, weight_decay):
    """As timm's `param_groups_layer_decay`: a group for each layer and decay, with a scale of lr for its scheduler."""
    groups = []
    for depth, layer in enumerate(module for module in model if isinstance(module, nn.Linear)):
        for name, p in layer.named_parameters():
            groups.append(
                {
                    "lr_scale": 0.5 ** (1 - depth),
                    "weight_decay": 0.0 if p.ndim <= 1 else weight_decay,
                    "params": [p],
                    "param_names": [f"{depth}.{name}"],
                }
            )
    return groups


def test_param_groups_with_the_keys_of_timm_train_and_are_kept():
    model, other = mlp(), mlp(seed=1)
    optimizer = lodo.AutoLODO(timm_groups(model, 0.05), lr=1e-2, weight_decay=0.7)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0, 0.05, 0.0]
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_scale"]
    losses = train(model, optimizer, 0, 20)
    assert sum(losses[-5:]) < sum(losses[:5])
    loaded = lodo.AutoLODO(timm_groups(other, 0.05))
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["lr_scale"] for group in loaded.param_groups] == [0.5, 0.5, 1.0, 1.0]
    assert [group["param_names"] for group in loaded.param_groups] == [
        ["0.weight"],
        ["0.bias"],
        ["1.weight"],
        ["1.bias"],
    ]
    train(model, optimizer, 20, 30)
    train(other, loaded, 20, 30)
    assert_same_runs((other, loaded), (model, optimizer))


def test_the_weight_decay_of_each_group_is_its_own():
    lr, weight_decay = 0.01, 0.5
    model, other = mlp(), mlp()
    before = copy.deepcopy(list(model.parameters()))
    train(model, lodo.AutoLODO(timm_groups(model, weight_decay), lr=lr), 0, 1)
    train(other, lodo.AutoLODO(timm_groups(other, 0.0), lr=lr), 0, 1)
    for p, without, start in zip(model.parameters(), other.parameters(), before, strict=True):
        factor = lr * weight_decay if p.ndim == 2 else 0.0  # at the first step the scales are 1
        torch.testing.assert_close(without - p, factor * start, rtol=1e-4, atol=1e-7)


def test_weight_decay_is_in_proportion_to_the_steps_that_are_taken():
    model = mlp()
    optimizer = lodo.AutoLODO(model.parameters(), lr=1e-4, scale_lr=0.3)
    train(model, optimizer, 0, 20)
    scales = [optimizer.state[p]["scale"][0].exp() for p in model.parameters()]
    assert min(scales) > 1.5
    ends = []
    for weight_decay in (0.0, 50.0):
        twin, continued = copy.deepcopy((model, optimizer))
        continued.param_groups[0].update(weight_decay=weight_decay, scale_lr=1e-12)  # so that the scales stay
        train(twin, continued, 20, 21)
        ends.append(list(twin.parameters()))
    for p, without, start, scale in zip(ends[1], ends[0], model.parameters(), scales, strict=True):
        torch.testing.assert_close(without - p, 1e-4 * scale * 50.0 * start, rtol=1e-3, atol=1e-6)
