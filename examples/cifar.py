"""CIFAR-10 from its original files, binary or pickled."""

import hashlib
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.image_data import CLASSES, Bytes

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
RECORDS = 10_000  # in each file
TRAIN = tuple(f"data_batch_{index}" for index in range(1, 6))
NAMES = (*TRAIN, "test_batch")
BINARY, PICKLED = "cifar-10-batches-bin", "cifar-10-batches-py"  # folders in the two archives

# of the files in cifar-10-batches-py
MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}


@dataclass(frozen=True)
class Cifar10:
    """Images as uint8, (count, 3, 32, 32), and labels from 0 to 9 as int64, (count,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def cifar10(root: Path) -> Cifar10:
    """CIFAR-10's 50,000 training and 10,000 test images, in their original order.

    They come from the binary files in `root` or `root`/cifar-10-batches-bin, else from the pickled ones in
    `root`/cifar-10-batches-py, which torchvision, if it is installed, downloads where both are incomplete. A pickle can
    run any code, so none is opened but those with the official checksums. None are known for the binary files: these
    are checked for sizes and labels only.

    Raises:
        FileNotFoundError: saying which files to put where.
        ValueError: naming the file that is not what it should be.
    """
    reason = ""
    if _missing_binary(root) and _missing_pickled(root):
        reason = _download(root)
    if not _missing_binary(root):
        return _assemble(lambda name: _read_binary(_find_binary(root, name)))
    if not _missing_pickled(root):
        return _assemble(lambda name: _read_pickled(root / PICKLED / name))
    raise FileNotFoundError(
        f"CIFAR-10 is not complete in {root}: put {', '.join(_missing_binary(root))} into it or {root / BINARY}, or "
        f"{', '.join(_missing_pickled(root))} into {root / PICKLED}; {reason}"
    )


def _assemble(read: Callable[[str], tuple[Bytes, Bytes]]) -> Cifar10:
    images, labels = zip(*map(read, NAMES), strict=True)
    train = torch.from_numpy(np.concatenate(images[:-1]))
    train_labels = torch.from_numpy(np.concatenate(labels[:-1]).astype(np.int64))
    test, test_labels = torch.from_numpy(images[-1].copy()), torch.from_numpy(labels[-1].astype(np.int64))
    return Cifar10(train.view(-1, *SHAPE), train_labels, test.view(-1, *SHAPE), test_labels)


def _find_binary(root: Path, name: str) -> Path:
    """Where the file is, or would be in the archive's folder."""
    path = root / f"{name}.bin"
    return path if path.is_file() else root / BINARY / path.name


def _missing_binary(root: Path) -> list[str]:
    return [f"{name}.bin" for name in NAMES if not _find_binary(root, name).is_file()]


def _missing_pickled(root: Path) -> list[str]:
    return [name for name in NAMES if not (root / PICKLED / name).is_file()]


def _download(root: Path) -> str:
    """Tries to fetch CIFAR-10 through torchvision; returns why that did not help, should it not have."""
    try:
        from torchvision.datasets import CIFAR10
    except ImportError:
        return "with torchvision installed the latter are downloaded"
    try:
        CIFAR10(str(root), download=True)
    except (OSError, RuntimeError) as error:  # no network, no permission, no mirror
        return f"downloading the latter failed ({error})"
    return "downloading the latter did not help"


def _read_binary(path: Path) -> tuple[Bytes, Bytes]:
    """Images, (RECORDS, PIXELS), and labels, (RECORDS,), from records of a label's byte and the pixels' bytes."""
    size, expected = path.stat().st_size, RECORDS * (1 + PIXELS)
    if size != expected:
        raise ValueError(f"{path} must have {expected} bytes ({RECORDS} records of {1 + PIXELS}), it has {size}")
    records = np.fromfile(path, np.uint8).reshape(RECORDS, 1 + PIXELS)
    return records[:, 1:], _checked_labels(path, records[:, 0])


def _read_pickled(path: Path) -> tuple[Bytes, Bytes]:
    """As `_read_binary`, from a pickled dict, which is opened if its checksum is the official one."""
    content = path.read_bytes()
    found, expected = hashlib.md5(content, usedforsecurity=False).hexdigest(), MD5[path.name]
    if found != expected:
        raise ValueError(
            f"{path} is not CIFAR-10's file and was not opened, since pickles can run any code: its MD5 is {found}, "
            f"expected {expected}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the arrays' dtypes are stored in a way that newer NumPy deprecates
        batch: dict[str, Any] = pickle.loads(content, encoding="latin1")
    images, labels = np.asarray(batch["data"]), np.asarray(batch["labels"])
    if images.shape != (RECORDS, PIXELS) or images.dtype != np.uint8 or labels.shape != (RECORDS,):
        raise ValueError(
            f"{path} must hold {RECORDS} labels and uint8 images of {PIXELS} bytes, it holds {labels.shape} labels and "
            f"{images.dtype} images {images.shape}"
        )
    return images, _checked_labels(path, labels)


def _checked_labels(path: Path, labels: Any) -> Bytes:
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise ValueError(f"{path}: labels must be from 0 to {CLASSES - 1}, got {labels.min()} to {labels.max()}")
    return labels.astype(np.uint8)
