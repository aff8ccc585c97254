"""LODO's diagnostics in TensorBoard: the ten lines of `train` are all there is to it.

python -m examples.tensorboard_logging
tensorboard --logdir out/tensorboard
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.tensorboard import SummaryWriter

import lodo
from examples.image_data import ImageData, batches, digits


def train(model: nn.Module, optimizer: lodo.LODO, data: ImageData, steps: int, writer: SummaryWriter) -> None:
    for step, picked in zip(range(steps), batches(len(data.train_images), 64, seed=0, step=0), strict=False):
        optimizer.zero_grad()
        loss = cross_entropy(model(data.train_images[picked]), data.train_labels[picked])
        loss.backward()
        if step % 20 == 0:  # after backward, before step: the gradient where the last step landed judges that step
            writer.add_scalar("loss", loss.item(), step)
            for index, figures in enumerate(optimizer.diagnostics()):
                for name, value in figures.items():
                    writer.add_scalar(f"group {index}/{name}", value, step)
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="training steps (default: 500)")
    parser.add_argument("--out", type=Path, default=Path("out/tensorboard"), help="(default: out/tensorboard)")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = lodo.AutoLODO(model.parameters())
    with SummaryWriter(options.out) as writer:
        train(model, optimizer, digits(), options.steps, writer)
    print(f"Look at it with: tensorboard --logdir {options.out}")


if __name__ == "__main__":
    main()
