"""Images of handwritten digits, scikit-learn's bundled ones and MNIST from its original files, and their batches."""

import gzip
import hashlib
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CLASSES = 10
UNSIGNED_BYTE = 8  # type code in the third byte of an IDX file

MNIST_MD5 = {  # of the gzipped files
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ImageData:
    """Images as float32 rows, (count, pixels), with the training set's mean 0 and variance 1; labels as int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device) -> "ImageData":
        return ImageData(*(tensor.to(device) for tensor in vars(self).values()))


@dataclass(frozen=True)
class ImageBytes:
    """Images as they come, (count, rows, columns), pixels from 0 to 255; labels, (count,)."""

    train_images: Bytes
    train_labels: Bytes
    test_images: Bytes
    test_labels: Bytes


def digits() -> ImageData:
    """scikit-learn's 1,797 images of 8 x 8 pixels, a fifth of them for testing, always the same ones."""
    from sklearn.datasets import load_digits  # MNIST and CIFAR-10 do without it
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    return _prepare(train_x, train_y, test_x, test_y)


def mnist(root: Path) -> ImageData:
    """MNIST from the files that `mnist_bytes` reads, with its errors."""
    raw = mnist_bytes(root)
    return _prepare(raw.train_images, raw.train_labels, raw.test_images, raw.test_labels)


def mnist_bytes(root: Path) -> ImageBytes:
    """MNIST from the IDX files in `root` or `root`/MNIST/raw, gzipped or not.

    If files are missing and torchvision is installed, it downloads them.

    Raises:
        FileNotFoundError: saying which files to put where.
        ValueError: naming the file that is not what it should be.
    """
    if _missing(root):
        reason = _download(root)
        if missing := _missing(root):
            raise FileNotFoundError(
                f"MNIST is not complete in {root} or {root / 'MNIST' / 'raw'}: put {', '.join(missing)} (gzipped with "
                f"the ending .gz, or unpacked) into one of them; {reason}"
            )
    train_x, train_y = _read_pair(root, "train")
    test_x, test_y = _read_pair(root, "t10k")
    if train_x.shape[1:] != test_x.shape[1:]:
        raise ValueError(
            f"MNIST in {root}: training images are {train_x.shape[1:]}, test images {test_x.shape[1:]} pixels"
        )
    return ImageBytes(train_x, train_y, test_x, test_y)


def check_mnist(root: Path) -> None:
    """Compares the gzipped files with the official checksums; unpacked ones have none.

    Raises:
        ValueError: naming the file, its checksum and the official one.
    """
    for name, expected in MNIST_MD5.items():
        path = _find(root, name)
        if path is None or path.suffix != ".gz":
            continue
        found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        if found != expected:
            raise ValueError(f"{path} is not MNIST's file: its MD5 is {found}, expected {expected}")


def _prepare(
    train_x: npt.NDArray[np.generic],
    train_y: npt.NDArray[np.generic],
    test_x: npt.NDArray[np.generic],
    test_y: npt.NDArray[np.generic],
) -> ImageData:
    """Flattens the images and scales them by one mean and one deviation, which keep dark border pixels harmless."""
    train, test = (torch.from_numpy(x.astype(np.float32)).flatten(1) for x in (train_x, test_x))
    mean, deviation = train.mean(), train.std().clamp(min=1e-6)
    train_labels, test_labels = (torch.from_numpy(y.astype(np.int64)) for y in (train_y, test_y))
    return ImageData((train - mean) / deviation, train_labels, (test - mean) / deviation, test_labels)


def batches(count: int, batch_size: int, seed: int, step: int) -> Iterator[Tensor]:
    """Indices of the batches from `step` on, in epochs shuffled anew. Each follows from seed and step alone."""
    per_epoch = count // batch_size
    while True:
        epoch, done = divmod(step, per_epoch)
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(count))
        yield from order[: per_epoch * batch_size].split(batch_size)[done:]
        step = (epoch + 1) * per_epoch


def _names(part: str) -> tuple[str, str]:
    return f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"


def _find(root: Path, name: str) -> Path | None:
    folders = (root, root / "MNIST" / "raw")
    candidates = (folder / f"{name}{ending}" for folder in folders for ending in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _missing(root: Path) -> list[str]:
    return [name for part in ("train", "t10k") for name in _names(part) if _find(root, name) is None]


def _download(root: Path) -> str:
    """Tries to fetch MNIST through torchvision; returns why that did not help, should it not have."""
    try:
        from torchvision.datasets import MNIST
    except ImportError:
        return "with torchvision installed they are downloaded"
    try:
        MNIST(str(root), download=True)
    except (OSError, RuntimeError) as error:  # no network, no permission, no mirror
        return f"downloading them failed ({error})"
    return "downloading them did not help"


def _read_pair(root: Path, part: str) -> tuple[Bytes, Bytes]:
    """The images, (count, rows, columns), and labels, (count,), of the training ("train") or test ("t10k") set."""
    image_path, label_path = (_find(root, name) for name in _names(part))
    assert image_path is not None
    assert label_path is not None
    images, labels = read_idx(image_path, dims=3), read_idx(label_path, dims=1)
    if len(images) != len(labels):
        raise ValueError(f"{image_path} holds {len(images)} images, but {label_path} {len(labels)} labels")
    if images.size == 0:
        raise ValueError(f"{image_path} holds no pixels: its sizes are {images.shape}")
    if labels.max() >= CLASSES:
        raise ValueError(f"{label_path}: labels must be from 0 to {CLASSES - 1}, got {labels.max()}")
    return images, labels


def read_idx(path: Path, dims: int) -> Bytes:
    """The array in an IDX file of unsigned bytes: magic number, `dims` sizes, then the bytes.

    Raises:
        ValueError: naming the file, what it holds and what was expected.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    expected = bytes((0, 0, UNSIGNED_BYTE, dims))
    if content[:4] != expected:
        raise ValueError(f"{path}: the magic number must be 0x{expected.hex()}, got 0x{content[:4].hex()}")
    header = 4 + 4 * dims
    if len(content) < header:
        raise ValueError(f"{path} is truncated: its header has {len(content)} bytes, expected {header}")
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4))
    if len(content) - header != math.prod(shape):
        raise ValueError(
            f"{path}: the sizes {shape} in its header ask for {math.prod(shape)} bytes, but {len(content) - header} "
            "follow: the file is truncated or damaged"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
