"""A plain loop with gradient accumulation and clipping.

Gradients of several small batches are summed in `.grad`, each weighted by its share, before one step: the step is
that of the large batch. Clip once, between the last backward pass and the step: LODO takes the gradient it is given
for the true one, to learn from as well as to step along.
"""

import torch
from torch import nn

from examples.frameworks.tiny import lean_lodo, network, points

STEPS = 60


def train(parts: int, max_norm: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[float]]:
    """Steps on batches of 128 points, each in so many parts of about the same size."""
    model = network().to(dtype)
    optimizer = lean_lodo(model.parameters(), lr=1.0)
    x, y = points().tensors
    losses = []
    for step in range(STEPS):
        batch_x, batch_y = (tensor.roll(-128 * step, 0)[:128] for tensor in (x.to(dtype), y))
        optimizer.zero_grad()
        total = 0.0
        for part_x, part_y in zip(batch_x.tensor_split(parts), batch_y.tensor_split(parts), strict=True):
            loss = nn.functional.cross_entropy(model(part_x), part_y) * (len(part_x) / len(batch_x))
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        losses.append(total)
    return model, losses


def main() -> None:
    for parts in (1, 3):
        _, losses = train(parts)
        print(f"batches in {parts} part(s): training loss", *(f"{loss:.4f}" for loss in [*losses[::10], losses[-1]]))


if __name__ == "__main__":
    main()
