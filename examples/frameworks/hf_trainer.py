"""Hugging Face's Trainer with LODO, and a run that is resumed from a checkpoint.

Trainer takes an optimizer that is made already, with its scheduler. It clips gradients (max_grad_norm), steps the
scheduler, saves the optimizer's state, and loads it with weights_only=True.

With `optimizer_cls_and_kwargs=(lodo.LODO, {"lr": 0.3})` Trainer makes the optimizer itself. It then puts biases and
norms into a param group of their own, without weight decay: two groups are two networks, and G is block-diagonal.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

import lodo
from examples.frameworks.tiny import LEAN, gpt2, sequences

STEPS, SAVED_AT = 60, 30


def trainer(model: PreTrainedModel, folder: Path, **arguments: Any) -> Trainer:
    optimizer = lodo.LODO(model.named_parameters(), lr=0.3, meta_lr=3e-3, **LEAN)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_steps": SAVED_AT,
        "logging_steps": 10,
        "per_device_train_batch_size": 32,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,  # where two runs come out with the same bits
        "dataloader_pin_memory": False,
        **arguments,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=sequences(),
        optimizers=(optimizer, scheduler),
    )


def losses_of(trained: Trainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        whole = trainer(gpt2(), Path(name))
        whole.train()
        print("training loss:", *(f"{loss:.3f}" for loss in losses_of(whole)))

        resumed = trainer(gpt2(seed=1), Path(name))
        resumed.train(resume_from_checkpoint=f"{name}/checkpoint-{SAVED_AT}")
        pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
        same = all(torch.equal(a, b) for a, b in pairs)
        print(f"resumed at step {SAVED_AT}: the parameters are the same, bit for bit: {same}")


if __name__ == "__main__":
    main()
