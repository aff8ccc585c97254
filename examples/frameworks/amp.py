"""Mixed precision: float16 with GradScaler, bfloat16 without, and the two ways in which a step may be skipped.

The scaler tries large scales. Where the scaled gradients overflow it does not call `step` at all and halves its scale:
LODO sees nothing of it, and `skipped_steps` does not count it. `skipped_steps` counts LODO's own check: calls of
`step` whose gradient holds a NaN or an infinity, as there may be without a scaler.
"""

import warnings

import torch
from torch import nn

import lodo
from examples.frameworks.tiny import lean_lodo, network, points

STEPS = 60


class Run:
    """A model in float32 that computes in `dtype` where autocast finds it safe."""

    def __init__(self, dtype: torch.dtype, device: torch.device, init_scale: float = 2.0**30) -> None:
        self.dtype, self.device = dtype, device
        self.model = network().to(device)
        self.optimizer: lodo.LODO = lean_lodo(self.model.parameters(), lr=1.0)
        # Disabled, it passes everything through: the loop below is the same for both dtypes.
        self.scaler = torch.amp.GradScaler(device.type, init_scale=init_scale, enabled=dtype == torch.float16)
        self.x, self.y = (tensor.to(device) for tensor in points().tensors)
        self.skipped_by_scaler = 0

    def step(self) -> float:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, dtype=self.dtype):
            loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)  # so that what is clipped is the gradient itself
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped_by_scaler += self.scaler.get_scale() < scale
        return float(loss.detach())

    def step_on_a_bad_gradient(self) -> None:
        """What happens without a scaler: LODO itself leaves the step out, and warns once."""
        self.optimizer.zero_grad()
        (self.model(self.x).sum() * float("nan")).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.optimizer.step()
        print("  a NaN in the gradient:", *(str(warning.message).split(":")[0] for warning in caught))


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in (torch.float16, torch.bfloat16):
        run = Run(dtype, device)
        losses = [run.step() for _ in range(STEPS)]
        print(f"{dtype}: training loss", *(f"{loss:.3f}" for loss in losses[::10]), f"{losses[-1]:.3f}")
        print(f"  skipped by the scaler: {run.skipped_by_scaler}, by LODO: {run.optimizer.skipped_steps}")
    run.step_on_a_bad_gradient()
    print(f"  skipped by LODO: {run.optimizer.skipped_steps}")


if __name__ == "__main__":
    main()
