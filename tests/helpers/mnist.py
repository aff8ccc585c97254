"""MNIST's files, with a small data set."""

import gzip
from pathlib import Path

import torch
from torch import Tensor


def write_idx(path: Path, array: Tensor, cut: int = 0) -> None:
    header = bytes((0, 0, 8, array.dim())) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    content = header + array.to(torch.uint8).numpy().tobytes()
    content = content[: len(content) - cut]
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder: Path, ending: str = ".gz") -> tuple[Tensor, Tensor]:
    """A small data set in MNIST's files; returns the training images and labels. Dark images are of even labels."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("t10k", 20), ("train", 60)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 100, (count, 6, 5)) + 100 * (labels % 2)[:, None, None]
        write_idx(folder / f"{part}-images-idx3-ubyte{ending}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{ending}", labels)
    return images, labels
