"""LoRA with peft and LODO: a model that counts in steps of one learns to count in steps of three.

LODO's network covers every parameter of a param group, those too that never get a gradient (one may be unfrozen any
time). So give it the trainable parameters alone: with all of `model.parameters()` it trains, but pays for the frozen
ones in memory and time as for the others. Those of a quantized model, which are integers, it refuses.
"""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from examples.frameworks.tiny import gpt2, lean_lodo, sequences, state_bytes

PRETRAINING, STEPS, BATCH = 60, 60, 64


def train(model: nn.Module, optimizer: torch.optim.Optimizer, stride: int, steps: int) -> list[float]:
    tokens = torch.stack([item["input_ids"] for item in sequences(stride=stride)])
    losses = []
    for step in range(steps):
        batch = tokens.roll(-step * BATCH, 0)[:BATCH]
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def adapted() -> PeftModel:
    """A pretrained model with adapters on it: A is random, B is zero, all else is frozen."""
    torch.manual_seed(0)
    base = gpt2()
    train(base, lean_lodo(base.parameters(), lr=0.3), stride=1, steps=PRETRAINING)
    adapters = LoraConfig(
        r=8, lora_alpha=16, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    return get_peft_model(base, adapters)


def main() -> None:
    model = adapted()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = lean_lodo(trainable, lr=0.3)
    losses = train(model, optimizer, stride=3, steps=STEPS)
    print("training loss:", *(f"{loss:.3f}" for loss in losses[::10]), f"{losses[-1]:.3f}")

    wasteful = lean_lodo(model.parameters(), lr=0.3)
    train(model, wasteful, stride=3, steps=1)
    for what, params, used in (
        ("the trainable", trainable, optimizer),
        ("all", list(model.parameters()), wasteful),
    ):
        count = sum(p.numel() for p in params)
        print(f"given {what} parameters ({count}) the state takes {state_bytes(used) / 1024:.0f} kB")


if __name__ == "__main__":
    main()
