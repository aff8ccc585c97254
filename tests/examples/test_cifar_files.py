"""CIFAR-10's files: read, downloaded and refused."""

import hashlib
import pickle
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples import cifar
from examples.cifar import Cifar10, cifar10
from examples.paper.tasks.image_classification import ImageClassification


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """Files of 20 records in place of 10,000, and no torchvision."""
    monkeypatch.setattr(cifar, "RECORDS", 20)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    return 20


def records(count: int = 120) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 3072), dtype=np.uint8), rng.integers(0, 10, count, dtype=np.uint8)


def write_binary(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = records()
    for index, name in enumerate(cifar.NAMES):
        part = slice(20 * index, 20 * index + 20)
        np.hstack([labels[part, None], images[part]]).tofile(folder / f"{name}.bin")
    return images, labels


def write_pickled(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    """Pickled files, which are made the official ones."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = records()
    for index, name in enumerate(cifar.NAMES):
        part = slice(20 * index, 20 * index + 20)
        batch = {"batch_label": name, "data": images[part], "labels": labels[part].tolist()} | changes
        content = pickle.dumps(batch, protocol=2)
        (folder / name).write_bytes(content)
        monkeypatch.setitem(cifar.MD5, name, hashlib.md5(content).hexdigest())
    return images, labels


def assert_cifar(data: Cifar10, images: np.ndarray, labels: np.ndarray) -> None:
    assert data.train_images.shape == (100, 3, 32, 32)
    assert data.test_images.shape == (20, 3, 32, 32)
    assert data.train_images.dtype == data.test_images.dtype == torch.uint8
    found = torch.cat([data.train_images, data.test_images]).flatten(1)
    assert np.array_equal(found.numpy(), images)
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert torch.cat([data.train_labels, data.test_labels]).tolist() == labels.tolist()


@pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-bin"])
@pytest.mark.usefixtures("small")
def test_binary_cifar_is_read(subfolder: str, tmp_path: Path) -> None:
    images, labels = write_binary(tmp_path / subfolder)
    assert_cifar(cifar10(tmp_path), images, labels)
    task = ImageClassification(0, data_root=tmp_path, batch_size=2, validation_images=1)
    assert (len(task.images), len(task.test_images)) == (100, 1)


@pytest.mark.usefixtures("small")
def test_wrong_binary_cifar_is_refused(tmp_path: Path) -> None:
    write_binary(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=re.escape(f"{path} must have 61460 bytes (20 records of 3073), it has 61459")):
        cifar10(tmp_path)
    path.write_bytes(bytes([10]) + content[1:])
    with pytest.raises(ValueError, match=re.escape(f"{path}: labels must be from 0 to 9, got ") + r"\d to 10"):
        cifar10(tmp_path)


@pytest.mark.usefixtures("small")
def test_pickled_cifar_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = write_pickled(tmp_path / "cifar-10-batches-py", monkeypatch)
    assert_cifar(cifar10(tmp_path), images, labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": np.zeros((20, 3071), np.uint8)}, r"must hold 20 labels .* it holds \(20,\) labels .* \(20, 3071\)"),
        ({"data": np.zeros((20, 3072), np.int64)}, "int64 images"),
        ({"labels": [0] * 19}, r"it holds \(19,\) labels"),
        ({"labels": [0] * 19 + [-1]}, "labels must be from 0 to 9, got -1 to 0"),
        ({"labels": [0] * 19 + [256]}, "labels must be from 0 to 9, got 0 to 256"),
    ],
)
@pytest.mark.usefixtures("small")
def test_wrong_pickled_cifar_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pickled(tmp_path / "cifar-10-batches-py", monkeypatch, **changes)
    with pytest.raises(ValueError, match=f"data_batch_1.*{message}"):
        cifar10(tmp_path)


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "harm")


@pytest.mark.usefixtures("small")
def test_foreign_pickle_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pickled(tmp_path / "cifar-10-batches-py", monkeypatch)
    path, harm = tmp_path / "cifar-10-batches-py" / "data_batch_2", tmp_path / "harm"
    official = cifar.MD5["data_batch_2"]
    content = pickle.dumps(Harmful(harm))
    path.write_bytes(content)
    found = hashlib.md5(content).hexdigest()
    with pytest.raises(ValueError, match=re.escape(str(path)) + f".*not opened.* {found}, expected {official}"):
        cifar10(tmp_path)
    assert not harm.exists()
    pickle.loads(content)
    assert harm.exists()  # it would have


@pytest.mark.usefixtures("small")
def test_missing_cifar_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_binary(tmp_path)
    (tmp_path / "test_batch.bin").unlink()
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        cifar10(tmp_path)
    said = str(caught.value)
    assert f"not complete in {tmp_path}: put data_batch_4.bin, test_batch.bin into it or" in said
    assert (
        f"or data_batch_1, data_batch_2, data_batch_3, data_batch_4, data_batch_5, test_batch into {tmp_path}" in said
    )
    assert "with torchvision installed" in said

    def offline(root: str, download: bool) -> None:
        raise OSError("no network")

    datasets = types.ModuleType("torchvision.datasets")
    datasets.CIFAR10 = offline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    with pytest.raises(FileNotFoundError, match=r"downloading the latter failed \(no network\)"):
        cifar10(tmp_path)


@pytest.mark.usefixtures("small")
def test_missing_cifar_is_downloaded_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    datasets = types.ModuleType("torchvision.datasets")
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    datasets.CIFAR10 = lambda root, download: write_pickled(Path(root) / folder.name, monkeypatch)  # type: ignore[attr-defined]
    assert_cifar(cifar10(tmp_path), *records())
    (folder / "test_batch").write_bytes(b"hello")
    with pytest.raises(ValueError, match="test_batch is not CIFAR-10's file"):
        cifar10(tmp_path)
