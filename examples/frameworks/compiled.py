"""A training step under torch.compile.

Forward and backward are compiled; LODO's step is not: it leaves the compiled graph, runs its own kernels, and comes
back, once per step and without recompilation. An LR scheduler may be attached.

Any backend will do. "aot_eager", the default here, compiles no code and so runs everywhere. torch's own default,
"inductor", needs a C++ compiler on a CPU, and Triton (which comes with torch's CUDA builds) on CUDA:

    python -m examples.frameworks.compiled inductor
"""

import sys
import time

import torch
from torch import Tensor, nn

from examples.frameworks.tiny import lean_lodo, network, points

STEPS = 60


def train(backend: str | None) -> tuple[nn.Module, list[float]]:
    """Trains on all points at once, compiled with a backend or, with None, not at all."""
    model = network()
    optimizer = lean_lodo(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    x, y = points().tensors

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    run = step if backend is None else torch.compile(step, backend=backend)
    losses = []
    for _ in range(STEPS):
        losses.append(float(run(x, y)))
        scheduler.step()
    return model, losses


def main(backend: str = "aot_eager") -> None:
    _, plain = train(None)
    begin = time.perf_counter()
    _, compiled = train(backend)
    print(f"{backend}: {time.perf_counter() - begin:.1f} s with compilation")
    print("training loss, plain:   ", *(f"{loss:.4f}" for loss in plain[::10]), f"{plain[-1]:.4f}")
    print("training loss, compiled:", *(f"{loss:.4f}" for loss in compiled[::10]), f"{compiled[-1]:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
