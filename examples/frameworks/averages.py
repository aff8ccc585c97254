"""Evaluating and deploying averages of the iterates, in a loop of one's own.

AutoLODO keeps them (`average_share`), training knows nothing of them, and inside `averaged` the model has them, with
the statistics of batch normalisation that belong to them. Hugging Face's Trainer does the same by itself
(`hf_trainer`), Lightning with a short callback (`lightning_module`).
"""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lodo
from examples.frameworks.tiny import network, points

EPOCHS, SHARE = 12, 0.1


def train() -> tuple[nn.Module, lodo.AutoLODO, list[tuple[float, float]], dict[str, Tensor]]:
    """The model as training leaves it, its optimizer, accuracies after each epoch (of the iterate, of the average), and
    the averages, to be deployed."""
    torch.manual_seed(0)
    loader = DataLoader(points(), batch_size=32, shuffle=True)
    model = network(batch_norm=True)
    optimizer = lodo.AutoLODO(model.parameters(), average_share=SHARE)
    accuracies = []
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        own = accuracy(model)
        with optimizer.averaged(model, loader):
            accuracies.append((own, accuracy(model)))
            deployed = {name: value.clone() for name, value in model.state_dict().items()}
    return model, optimizer, accuracies, deployed


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """On points that were not trained on; the model is in training mode again afterwards."""
    model.eval()
    x, y = points(2048, seed=1).tensors
    found = float((model(x).argmax(1) == y).float().mean())
    model.train()
    return found


def main() -> None:
    _, _, accuracies, _ = train()
    for title, found in zip(("iterates", "averages"), zip(*accuracies, strict=True), strict=True):
        print(f"accuracy on new points, epoch by epoch, {title}:", *(f"{each:.3f}" for each in found))


if __name__ == "__main__":
    main()
