"""Accelerate with LODO: prepare, accumulate, clip_grad_norm_, and a run that is resumed with load_state.

`prepare` wraps the optimizer and hides what only LODO has, such as `skipped_steps`: keep the optimizer itself for that.
"""

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

import lodo
from examples.frameworks.tiny import LEAN, network, points

EPOCHS, SAVED_AFTER = 6, 3


class Run:
    """A training run, all of which Accelerate has prepared."""

    def __init__(self, seed: int = 0) -> None:
        # On a CPU two runs come out with the same bits.
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = network(seed)
        self.lodo = lodo.LODO(model.parameters(), lr=1.0, meta_lr=3e-3, **LEAN)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(self.lodo, 0.99)
        loader = DataLoader(points(), batch_size=32, shuffle=True)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, self.lodo, loader, scheduler
        )

    def epoch(self) -> float:
        """The mean training loss of an epoch."""
        total = 0.0
        for x, y in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = nn.functional.cross_entropy(self.model(x), y)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            total += float(loss.detach())
        return total / len(self.loader)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint"
        set_seed(0)
        whole, losses = Run(), []
        for epoch in range(EPOCHS):
            if epoch == SAVED_AFTER:
                whole.accelerator.save_state(str(folder))
            losses.append(whole.epoch())
        print("training loss:", *(f"{loss:.3f}" for loss in losses), f"(skipped steps: {whole.lodo.skipped_steps})")

        resumed = Run(seed=1)
        resumed.accelerator.load_state(str(folder))
        for _ in range(SAVED_AFTER, EPOCHS):
            resumed.epoch()
        same = all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
        print(f"resumed after epoch {SAVED_AFTER}: the parameters are the same, bit for bit: {same}")


if __name__ == "__main__":
    main()
