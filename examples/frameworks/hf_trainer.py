"""Hugging Face's Trainer with LODO, and runs that are resumed from a checkpoint.

With `optimizer_cls_and_kwargs=(lodo.AutoLODO, {})` Trainer makes the optimizer that wants no tuning itself, with a
param group without weight decay for biases and norms. It multiplies lr with a linear decay to zero unless another
`lr_scheduler_type` is given; AutoLODO needs none.

Trainer takes an optimizer that is made already too, with its scheduler: here the paper's LODO, one network over all
parameters. (Made by Trainer it would have a network for each of the two groups.)

It calls an optimizer's `eval` before it evaluates and its `train` before it trains, if there are such (as of
transformers 5): with `{"average_share": 0.1}` among AutoLODO's options it evaluates averages of the iterates.
Checkpoints that it writes after an evaluation have the averages in the model and the iterates in the optimizer's state,
so that a run that is resumed goes on from these. After `train()` call `trainer.optimizer.eval()` before `save_model`,
unless an evaluation came last.

It clips gradients (max_grad_norm), steps the scheduler, saves the optimizer's state, and loads it with
weights_only=True.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

import lodo
from examples.frameworks.tiny import LEAN, gpt2, sequences

STEPS, SAVED_AT = 60, 30


def training_arguments(folder: Path, **arguments: Any) -> TrainingArguments:
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
    return TrainingArguments(**settings)


def trainer_without_tuning(model: PreTrainedModel, folder: Path, **arguments: Any) -> Trainer:
    return Trainer(
        model=model,
        args=training_arguments(folder, **{"lr_scheduler_type": "constant", "weight_decay": 0.1, **arguments}),
        train_dataset=sequences(),
        optimizer_cls_and_kwargs=(lodo.AutoLODO, {}),
    )


def trainer_with_averages(model: PreTrainedModel, folder: Path, share: float | None = 0.1, **arguments: Any) -> Trainer:
    """Evaluates them just before each checkpoint."""
    settings = {"lr_scheduler_type": "constant", "eval_strategy": "steps", "eval_steps": SAVED_AT, **arguments}
    return Trainer(
        model=model,
        args=training_arguments(folder, **settings),
        train_dataset=sequences(),
        eval_dataset=sequences(),
        optimizer_cls_and_kwargs=(lodo.AutoLODO, {"average_share": share}),
    )


def trainer(model: PreTrainedModel, folder: Path, **arguments: Any) -> Trainer:
    """Of the paper's LODO."""
    optimizer = lodo.LODO(model.named_parameters(), lr=0.3, meta_lr=3e-3, **LEAN)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
    return Trainer(
        model=model,
        args=training_arguments(folder, **arguments),
        train_dataset=sequences(),
        optimizers=(optimizer, scheduler),
    )


def losses_of(trained: Trainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def main() -> None:
    makers = (("AutoLODO", trainer_without_tuning), ("with averages", trainer_with_averages), ("LODO", trainer))
    for title, make in makers:
        with tempfile.TemporaryDirectory() as name:
            whole = make(gpt2(), Path(name))
            whole.train()
            print(f"{title}: training loss:", *(f"{loss:.3f}" for loss in losses_of(whole)))

            resumed = make(gpt2(seed=1), Path(name))
            resumed.train(resume_from_checkpoint=f"{name}/checkpoint-{SAVED_AT}")
            pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
            same = all(torch.equal(a, b) for a, b in pairs)
            print(f"resumed at step {SAVED_AT}: the parameters are the same, bit for bit: {same}")


if __name__ == "__main__":
    main()
