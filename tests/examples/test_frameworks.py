"""LODO in the tools that people train with: runs examples/frameworks and asserts what matters in each.

Nothing is downloaded, and nothing is written outside of temporary folders.
"""

import copy
import importlib
import os
import socket
import tempfile

import pytest
import torch
from torch import nn

import lodo
from examples.frameworks import accumulation, amp, averages, compiled, swa
from examples.frameworks.tiny import LEAN, lean_lodo, network, state_bytes

# Read when the libraries are first imported.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

NEEDS = {
    "hf_trainer": ("transformers", "accelerate"),
    "hf_accelerate": ("accelerate",),
    "hf_peft": ("transformers", "peft"),
    "lightning_module": ("lightning",),
    "averages": (),
    "swa": (),
    "compiled": (),
    "amp": (),
    "accumulation": (),
}

# Warnings of one tool about another, and about resuming where there is a checkpoint already.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LIGHTNING_WARNS = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning",
)
COMPILER_WARNS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
WARNS = {"hf_peft": PEFT_WARNS, "lightning_module": LIGHTNING_WARNS, "compiled": COMPILER_WARNS}


@pytest.fixture(autouse=True)
def _stays_at_home(monkeypatch, tmp_path):
    """Temporary folders lie in the test's own, and whoever looks for the network fails the test."""
    sought = []

    def refuse(*args, **kwargs):
        sought.append(args)
        raise OSError("these tests are offline")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not sought


def example(name):
    for module in NEEDS[name]:
        pytest.importorskip(module)
    return importlib.import_module(f"examples.frameworks.{name}")


def assert_same(found, expected):
    """Bit for bit, whatever it is made of."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected


def assert_same_end(found_model, found_optimizer, model, optimizer):
    assert_same(list(found_model.parameters()), list(model.parameters()))
    assert_same(found_optimizer.state_dict(), optimizer.state_dict())


def steps_taken(optimizer):
    return int(optimizer.state[optimizer.param_groups[0]["params"][0]]["step"])


@pytest.mark.parametrize("name", [pytest.param(name, marks=WARNS.get(name, ())) for name in NEEDS])
def test_the_example_runs(name, capsys):
    example(name).main()
    printed = capsys.readouterr().out
    assert "nan" not in printed.lower().replace("a nan in the gradient", "")
    assert "bit for bit: False" not in printed
    assert ("bit for bit: True" in printed) == (name in ("hf_trainer", "hf_accelerate", "lightning_module"))


# ---- Hugging Face's Trainer ----------------------------------------------------------------------------------------


def test_trainer_resumes_bit_for_bit_in_mid_epoch(tmp_path):
    hf_trainer = example("hf_trainer")
    whole = hf_trainer.trainer(hf_trainer.gpt2(), tmp_path)
    whole.train()
    losses = hf_trainer.losses_of(whole)
    assert losses[-1] < 0.1 * losses[0]
    optimizer = whole.optimizer.optimizer
    assert isinstance(optimizer, lodo.LODO)
    assert steps_taken(optimizer) == hf_trainer.STEPS
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.03)  # the scheduler's end

    checkpoint = tmp_path / f"checkpoint-{hf_trainer.SAVED_AT}"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert int(saved["state"][0]["step"]) == hf_trainer.SAVED_AT
    assert saved["param_groups"][0]["param_names"][0] == "transformer.wte.weight"
    resumed = hf_trainer.trainer(hf_trainer.gpt2(seed=1), tmp_path)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_end(resumed.model, resumed.optimizer.optimizer, whole.model, optimizer)


def test_trainer_evaluates_averages_and_resumes_from_the_iterates(tmp_path):
    """From a checkpoint that it wrote with the averages in the model."""
    hf_trainer = example("hf_trainer")
    whole = hf_trainer.trainer_with_averages(hf_trainer.gpt2(), tmp_path)
    whole.train()
    plain = hf_trainer.trainer_with_averages(hf_trainer.gpt2(), tmp_path / "plain", share=None)
    plain.train()
    optimizer = whole.optimizer.optimizer
    shown = [p.detach().clone() for p in whole.model.parameters()]  # the last evaluation came after the last step
    losses = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert whole.evaluate()["eval_loss"] == losses[-1]
    optimizer.train()
    assert_same(list(whole.model.parameters()), list(plain.model.parameters()))
    assert not torch.equal(shown[0], next(whole.model.parameters()))

    checkpoint = tmp_path / f"checkpoint-{hf_trainer.SAVED_AT}"
    assert "iterate" in torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"][0]
    resumed = hf_trainer.trainer_with_averages(hf_trainer.gpt2(seed=1), tmp_path)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    resumed.optimizer.train()  # as Accelerate passes it on
    assert_same_end(resumed.model, resumed.optimizer.optimizer, whole.model, optimizer)


def test_trainer_makes_the_optimizer_with_a_group_for_what_has_no_weight_decay(tmp_path):
    hf_trainer = example("hf_trainer")
    from transformers import Trainer

    model = hf_trainer.gpt2()
    arguments = hf_trainer.trainer(model, tmp_path, max_steps=3, weight_decay=0.1).args
    trained = Trainer(
        model=model,
        args=arguments,
        train_dataset=hf_trainer.sequences(),
        optimizer_cls_and_kwargs=(lodo.LODO, {"lr": 0.3, **LEAN}),
    )
    trained.train()
    first, second = trained.optimizer.optimizer.preconditioners
    assert first.size + second.size == sum(p.numel() for p in model.parameters())
    assert [group["weight_decay"] for group in trained.optimizer.param_groups] == [0.1, 0.0]


# ---- Accelerate ----------------------------------------------------------------------------------------------------


def test_accelerate_resumes_bit_for_bit_and_steps_once_per_accumulation(tmp_path):
    hf_accelerate = example("hf_accelerate")
    hf_accelerate.set_seed(0)
    whole = hf_accelerate.Run()
    losses = [whole.epoch()]
    whole.accelerator.save_state(str(tmp_path / "checkpoint"))
    losses.append(whole.epoch())
    assert losses[1] < 0.7 * losses[0]
    assert steps_taken(whole.lodo) == len(whole.loader)  # two epochs, two batches a step
    assert whole.lodo.param_groups[0]["lr"] == pytest.approx(0.99 ** len(whole.loader))

    resumed = hf_accelerate.Run(seed=1)
    resumed.accelerator.load_state(str(tmp_path / "checkpoint"))
    resumed.epoch()
    assert_same_end(resumed.model, resumed.lodo, whole.model, whole.lodo)


def test_accelerate_clips_before_the_step(monkeypatch):
    run = example("hf_accelerate").Run()
    norms = []

    def note_norm(optimizer, args, kwargs):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(nn.utils.get_total_norm(grads)))

    run.lodo.register_step_pre_hook(note_norm)
    clip = run.accelerator.clip_grad_norm_
    monkeypatch.setattr(run.accelerator, "clip_grad_norm_", lambda params, norm: clip(params, 0.01))
    run.epoch()
    assert norms == pytest.approx([0.01] * (len(run.loader) // 2), rel=1e-3)


# ---- Lightning -----------------------------------------------------------------------------------------------------


@LIGHTNING_WARNS
def test_lightning_validates_averages_and_trains_on_the_iterates(tmp_path):
    lightning_module = example("lightning_module")
    plain, module = lightning_module.ClassifierWithoutTuning(), lightning_module.ClassifierWithAverages()
    lightning_module.fit(plain, tmp_path / "plain")
    trainer = lightning_module.fit(module, tmp_path)
    assert_same(list(module.parameters()), list(plain.parameters()))
    assert not torch.equal(module.validated[-1][0], next(module.parameters()))
    with trainer.optimizers[0].averaged():
        assert_same(module.validated[-1], [p.detach() for p in module.parameters()])


@LIGHTNING_WARNS
def test_lightning_puts_the_iterates_back_after_an_error_in_validation(tmp_path):
    lightning_module = example("lightning_module")

    class Failing(lightning_module.ClassifierWithAverages):
        def validation_step(self, batch, index):
            super().validation_step(batch, index)
            if len(self.losses) > 20:
                raise KeyError("validation")

    plain, module = lightning_module.ClassifierWithAverages(), Failing()
    with pytest.raises(KeyError):
        lightning_module.fit(module, tmp_path)
    steps = len(module.losses)
    lightning_module.fit(plain, tmp_path / "plain", max_steps=steps)
    assert_same(list(module.parameters()), list(plain.parameters()))


@LIGHTNING_WARNS
def test_lightning_resumes_bit_for_bit(tmp_path):
    lightning_module = example("lightning_module")
    whole = lightning_module.Classifier()
    trainer = lightning_module.fit(whole, tmp_path)
    assert whole.losses[-1] < 0.2 * whole.losses[0]
    assert steps_taken(trainer.optimizers[0]) == len(whole.losses) == trainer.global_step
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1)  # the scheduler's end

    checkpoint = tmp_path / f"epoch={lightning_module.SAVED_AFTER - 1}.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]
    assert int(saved["state"][0]["step"]) == len(whole.losses) // 2
    resumed = lightning_module.Classifier(seed=1)
    other = lightning_module.fit(resumed, tmp_path, resume_from=checkpoint)
    assert_same_end(resumed, other.optimizers[0], whole, trainer.optimizers[0])


@LIGHTNING_WARNS
@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 4, "profiler": "simple"}])
def test_lightning_trains_with_its_options(tmp_path, options):
    lightning_module = example("lightning_module")
    module = lightning_module.Classifier()
    trainer = lightning_module.fit(module, tmp_path, **options)
    assert module.losses[-1] < 0.5 * module.losses[0]
    assert steps_taken(trainer.optimizers[0]) == len(module.losses) // options.get("accumulate_grad_batches", 1)


# ---- peft ----------------------------------------------------------------------------------------------------------


@PEFT_WARNS
def test_adapters_learn_and_what_is_frozen_stays():
    hf_peft = example("hf_peft")
    model = hf_peft.adapted()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert all(bool((p == 0).all()) == ("lora_B" in name) for name, p in trainable.items())
    before = copy.deepcopy(frozen)
    losses = hf_peft.train(model, lean_lodo(trainable.values(), lr=0.3), stride=3, steps=hf_peft.STEPS)
    assert losses[-1] < 0.05 * losses[0]
    assert all((p != 0).any() for p in trainable.values())
    assert_same(frozen, before)


@PEFT_WARNS
def test_frozen_parameters_in_a_group_stay_and_cost_as_much_as_trainable_ones():
    """Which is why the example passes the trainable ones alone."""
    hf_peft = example("hf_peft")
    model = hf_peft.adapted()
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    before = copy.deepcopy(frozen)
    trainable = [p for p in model.parameters() if p.requires_grad]
    sparing = lean_lodo(trainable, lr=0.3)
    wasteful = lodo.LODO(model.parameters(), lr=0.3, weight_decay=0.1, **LEAN)
    hf_peft.train(model, sparing, stride=3, steps=1)
    losses = hf_peft.train(model, wasteful, stride=3, steps=hf_peft.STEPS)
    assert losses[-1] < 0.1 * losses[0]
    assert_same(frozen, before)
    sizes = [sum(p.numel() for p in params) for params in (trainable, model.parameters())]
    assert state_bytes(wasteful) / state_bytes(sparing) == pytest.approx(sizes[1] / sizes[0], rel=0.01)


def test_the_integers_of_a_quantized_base_are_refused_by_name():
    base = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"float64, got torch\.uint8"):
        lodo.LODO([nn.Parameter(torch.zeros(3)), base])


# ---- torch's own ---------------------------------------------------------------------------------------------------


def test_averages_in_a_loop_of_ones_own_leave_training_alone():
    model, _, accuracies, deployed = averages.train()
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(averages.points(), batch_size=32, shuffle=True)
    twin = averages.network(batch_norm=True)
    other = lodo.AutoLODO(twin.parameters())
    for _ in range(averages.EPOCHS):
        for x, y in loader:
            other.zero_grad()
            nn.functional.cross_entropy(twin(x), y).backward()
            other.step()
    assert_same(model.state_dict(), twin.state_dict())
    assert min(accuracies[-1]) > 0.8
    model.load_state_dict(deployed)
    assert averages.accuracy(model) == accuracies[-1][1]


def test_swa_averages_what_lodo_trains():
    model, averaged, optimizer = swa.train()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3)
    assert int(averaged.n_averaged) == swa.EPOCHS - swa.AVERAGED_FROM
    assert not set(averaged.parameters()) & set(optimizer.state)
    assert not torch.equal(averaged.module[0].weight, model[0].weight)
    assert swa.accuracy(averaged) > 0.85


@COMPILER_WARNS
@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_compiled_step_trains_as_the_plain_one_does():
    torch.compiler.reset()
    plain_model, plain = compiled.train(None)
    model, losses = compiled.train("aot_eager")
    assert plain[-1] < 0.1 * plain[0]
    assert losses == pytest.approx(plain, rel=1e-3)
    for p, q in zip(model.parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3)


def test_a_step_that_the_scaler_skips_leaves_lodo_untouched_and_is_not_its_own(device):
    run = amp.Run(torch.float16, device)
    run.step()
    assert run.skipped_by_scaler == 1
    assert not run.optimizer.state  # `step` was never called
    losses = [run.step() for _ in range(amp.STEPS)]
    assert losses[-1] < 0.1 * losses[0]
    skipped, before = run.skipped_by_scaler, copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    run.scaler.update(2.0**60)
    run.step()
    assert run.skipped_by_scaler == skipped + 1
    assert_same((run.model.state_dict(), run.optimizer.state_dict()), before)
    assert run.optimizer.skipped_steps == 0
    assert steps_taken(run.optimizer) == amp.STEPS + 2 - run.skipped_by_scaler


def test_a_step_that_lodo_skips_is_not_the_scalers(device):
    run = amp.Run(torch.bfloat16, device)
    losses = [run.step() for _ in range(amp.STEPS)]
    assert losses[-1] < 0.1 * losses[0]
    before = copy.deepcopy(run.model.state_dict())
    run.step_on_a_bad_gradient()
    assert_same(run.model.state_dict(), before)
    assert (run.optimizer.skipped_steps, run.skipped_by_scaler) == (1, 0)


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulated_gradients_make_the_steps_of_the_large_batch(parts):
    whole, losses = accumulation.train(1, dtype=torch.float64)
    model, others = accumulation.train(parts, dtype=torch.float64)
    assert losses[-1] < 0.1 * losses[0]
    assert others == pytest.approx(losses, rel=1e-8)
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_clipping_comes_before_the_step():
    """A bound so small that it always binds makes the length of every gradient the same."""
    _, free = accumulation.train(1, max_norm=1e9)
    _, clipped = accumulation.train(1, max_norm=1e-3)
    assert free[-1] < 0.1 * free[0]
    assert clipped[-1] > 0.9 * clipped[0]


# ---- what the tools do to an optimizer -----------------------------------------------------------------------------


def test_gradients_may_be_zeroed_in_place_or_dropped():
    trained = []
    for set_to_none in (True, False):
        model = network()
        optimizer = lean_lodo(model.parameters(), lr=1.0)
        for step in range(5):
            optimizer.zero_grad(set_to_none=set_to_none)
            x = torch.randn(16, 20, generator=torch.Generator().manual_seed(step))
            model(x).square().sum().backward()
            optimizer.step()
        trained.append((list(model.parameters()), optimizer.state_dict()))
    assert_same(trained[1], trained[0])
