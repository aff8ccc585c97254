"""Averaging weights with torch.optim.swa_utils: AveragedModel, SWALR and update_bn.

LODO steps the model; the average is another model that LODO knows nothing of. SWALR sets the lr of every param group,
that is the scale of G, and leaves what G has learned alone.
"""

import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn
from torch.utils.data import DataLoader

from examples.frameworks.tiny import lean_lodo, network, points

EPOCHS, AVERAGED_FROM = 12, 8


def train() -> tuple[nn.Module, AveragedModel, torch.optim.Optimizer]:
    """The model, the average of its weights at the ends of the last epochs, and the optimizer."""
    torch.manual_seed(0)
    loader = DataLoader(points(), batch_size=32, shuffle=True)
    model = network(batch_norm=True)
    averaged = AveragedModel(model)
    optimizer = lean_lodo(model.parameters(), lr=1.0)
    scheduler = SWALR(optimizer, swa_lr=0.3, anneal_epochs=2)
    for epoch in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        if epoch >= AVERAGED_FROM:
            averaged.update_parameters(model)
            scheduler.step()
    update_bn(loader, averaged)
    return model, averaged, optimizer


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """On points that were not trained on."""
    model.eval()
    x, y = points(2048, seed=1).tensors
    return float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    model, averaged, optimizer = train()
    print(f"lr at the end: {optimizer.param_groups[0]['lr']:.2f}")
    print(f"accuracy on new points: last weights {accuracy(model):.3f}, averaged weights {accuracy(averaged):.3f}")


if __name__ == "__main__":
    main()
