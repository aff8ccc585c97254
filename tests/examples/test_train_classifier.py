"""The example that trains a classifier: its outputs, exact resuming, MNIST's files, and refused input."""

import json
import math
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples import image_data, train_classifier
from examples.train_classifier import LABELS, Run, main
from tests.helpers.mnist import write_idx, write_mnist

SHORT = ["--steps", "40", "--batch-size", "32", "--checkpoint-every", "15"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The example sets torch's number of threads for its whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results(out: Path) -> dict[str, dict[str, Any]]:
    return {entry["optimizer"]: entry for entry in json.loads((out / "results.json").read_text())}


def checkpoint(out: Path, name: str) -> dict[str, Any]:
    return torch.load(out / f"{name}.pt", weights_only=True)


def assert_same(left: Any, right: Any) -> None:
    """Equal to the last bit, through dicts, lists and tensors."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    else:
        assert left == right


def assert_same_run(left: dict[str, Any], right: dict[str, Any]) -> None:
    timeless = ("settings", "model", "optimizer", "losses")
    assert_same({key: left[key] for key in timeless}, {key: right[key] for key in timeless})


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_short_run_writes_table_figure_and_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    main(["--out", str(out), *SHORT])
    printed = capsys.readouterr().out
    found = results(out)
    assert list(found) == list(LABELS)
    for name, label in LABELS.items():
        row = next(line for line in printed.splitlines() if line.startswith(label))
        entry = found[name]
        assert row.split()[-5:-2] == [f"{entry['train_loss']:.3g}", f"{entry['test_accuracy']:.2%}", "40"]
        assert 0 < entry["optimizer_seconds"] < entry["seconds"]
        losses = checkpoint(out, name)["losses"]
        assert len(losses) == 40
        assert entry["train_loss"] < 0.75 * losses[0]
        assert entry["test_accuracy"] > 0.5
    starts = {checkpoint(out, name)["losses"][0] for name in LABELS}
    assert len(starts) == 1, "the optimizers must start from the same weights and the same batch"
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("*.part"))


def test_final_loss_is_over_the_whole_training_set(tmp_path: Path) -> None:
    main(["--out", str(tmp_path), "--optimizer", "lodo", *SHORT])
    data = image_data.digits()
    saved = checkpoint(tmp_path, "lodo")
    run = Run("lodo", 64, train_classifier.Settings("digits", (64,), 32, 0, "cpu", 3.0, 3e-3)).load(
        tmp_path / "lodo.pt"
    )
    assert_same(dict(run.model.state_dict()), dict(saved["model"]))
    expected = torch.nn.functional.cross_entropy(run.model(data.train_images), data.train_labels).item()
    assert results(tmp_path)["lodo"]["train_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", LABELS)
def test_killed_and_resumed_equals_uninterrupted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(["--out", str(whole), "--optimizer", name, *SHORT])
    advance = Run.advance

    def killed_at_37(run: Run, images: Tensor, labels: Tensor) -> None:
        if run.step == 37:
            raise KeyboardInterrupt
        advance(run, images, labels)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", killed_at_37)
        with pytest.raises(KeyboardInterrupt):
            main(["--out", str(cut), "--optimizer", name, *SHORT])
    assert len(checkpoint(cut, name)["losses"]) == 30
    main(["--out", str(cut), "--optimizer", name, "--resume", *SHORT])
    assert_same_run(checkpoint(cut, name), checkpoint(whole, name))
    for key in ("train_loss", "test_accuracy", "steps"):
        assert results(cut)[name][key] == results(whole)[name][key]

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", lambda *_: pytest.fail("a finished run was run again"))
        main(["--out", str(cut), "--optimizer", name, "--resume", *SHORT])
    assert "finished before" in capsys.readouterr().out


def test_finished_run_goes_on_to_more_steps(tmp_path: Path) -> None:
    whole, longer = ["--out", str(tmp_path / "whole")], ["--out", str(tmp_path / "longer")]
    shared = ["--optimizer", "lodo", "--batch-size", "100"]
    main([*whole, *shared, "--steps", "33"])  # 14 batches an epoch: into the third
    main([*longer, *shared, "--steps", "20"])
    main([*longer, *shared, "--steps", "33", "--resume"])
    assert_same_run(checkpoint(tmp_path / "longer", "lodo"), checkpoint(tmp_path / "whole", "lodo"))


def test_batches_are_shuffled_epochs() -> None:
    def take(step: int, count: int, seed: int = 3) -> list[list[int]]:
        indices = image_data.batches(10, 3, seed, step)
        return [next(indices).tolist() for _ in range(count)]

    first = take(0, 9)
    for epoch in (first[:3], first[3:6], first[6:]):
        assert len({index for batch in epoch for index in batch}) == 9
    assert first[:3] != first[3:6]
    for step in range(9):
        assert take(step, 9 - step) == first[step:]
    assert take(0, 9, seed=4) != first


def test_divergence_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(tmp_path), "--optimizer", "sgd", "--lr-sgd", "1e30", *SHORT])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("SGD"))
    entry = results(tmp_path)["sgd"]
    assert "diverged" in row
    assert entry["diverged"]
    assert entry["train_loss"] is None
    assert entry["steps"] < 40
    assert not math.isfinite(checkpoint(tmp_path, "sgd")["losses"][-1])


@pytest.mark.parametrize(("subfolder", "ending"), [("", ".gz"), ("MNIST/raw", "")])
def test_mnist_files_are_read(subfolder: str, ending: str, tmp_path: Path) -> None:
    images, labels = write_mnist(tmp_path / subfolder, ending)
    data = image_data.mnist(tmp_path)
    pixels = images.flatten(1).float()
    torch.testing.assert_close(data.train_images, (pixels - pixels.mean()) / pixels.std())
    assert torch.equal(data.train_labels, labels)
    assert data.test_images.shape == (20, 30)


def test_trains_on_mnist_files(tmp_path: Path) -> None:
    write_mnist(tmp_path / "data")
    main(["--data", "mnist", "--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *SHORT])
    assert all(entry["train_loss"] < 2.3 for entry in results(tmp_path / "out").values())


def test_missing_mnist_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)  # as if not installed
    write_mnist(tmp_path / "data")
    (tmp_path / "data" / "t10k-labels-idx1-ubyte.gz").unlink()
    out = tmp_path / "out"
    said = refused(capsys, "--data", "mnist", "--data-root", str(tmp_path / "data"), "--out", str(out))
    assert "put t10k-labels-idx1-ubyte (" in said
    assert f"--data-root: MNIST is not complete in {tmp_path / 'data'}" in said
    assert not out.exists()


def test_missing_mnist_is_downloaded_with_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = types.ModuleType("torchvision.datasets")
    datasets.MNIST = lambda root, download: write_mnist(Path(root) / "MNIST" / "raw")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    assert len(image_data.mnist(tmp_path).train_images) == 60


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("part", "array", "cut", "message"),
    [
        ("train-images-idx3", torch.zeros(60, 6, 5), 7, "ask for 1800 bytes, but 1793 follow"),
        ("train-images-idx3", torch.zeros(60, 6, 5), 1810, "header has 6 bytes, expected 16"),
        ("train-images-idx3", torch.zeros(59, 6, 5), 0, "holds 59 images, but"),
        ("train-images-idx3", torch.zeros(60), 0, "magic number must be 0x00000803, got 0x00000801"),
        ("t10k-images-idx3", torch.zeros(20, 6, 6), 0, "test images (6, 6) pixels"),
        ("t10k-labels-idx1", torch.full((20,), 10), 0, "labels must be from 0 to 9, got 10"),
    ],
)
def test_wrong_mnist_files_are_refused(
    part: str, array: Tensor, cut: int, message: str, ending: str, tmp_path: Path
) -> None:
    write_mnist(tmp_path, ending)
    write_idx(tmp_path / f"{part}-ubyte{ending}", array, cut)
    with pytest.raises(ValueError, match=re.escape(message)):
        image_data.mnist(tmp_path)


def test_truncated_gzip_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    said = refused(capsys, "--data", "mnist", "--data-root", str(tmp_path), "--out", str(tmp_path / "out"))
    assert f"{path} is truncated or damaged" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--optimizer", "adam"], ["--optimizer", "'adam'", "lodo", "untuned", "adamw", "sgd"]),
        (["--data", "cifar"], ["--data", "'cifar'", "digits", "mnist"]),
        (["--steps", "0"], ["--steps", "an integer >= 1", "'0'"]),
        (["--batch-size", "1.5"], ["--batch-size", "an integer >= 1", "'1.5'"]),
        (["--batch-size", "2000"], ["--batch-size", "at most 1437", "2000"]),
        (["--seed", "-1"], ["--seed", "from 0 to", "'-1'"]),
        (["--seed", str(2**63)], ["--seed", "from 0 to", str(2**63)]),
        (["--lr-lodo", "nan"], ["--lr-lodo", "a finite number > 0", "'nan'"]),
        (["--lr-sgd", "-0.1"], ["--lr-sgd", "a finite number > 0", "'-0.1'"]),
        (["--device", "gpu"], ["--device", "a device torch can use here", "'gpu'"]),
        (["--device", "meta"], ["--device", "a device torch can use here", "'meta'"]),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "--out", str(tmp_path / "out"), *arguments)
    assert all(part in message for part in said), message
    assert not (tmp_path / "out").exists()


def test_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out"
    path.write_text("precious")
    assert f"--out: must be a folder or a place for one, got {str(path)!r}" in refused(capsys, "--out", str(path))
    assert path.read_text() == "precious"


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["--out", str(tmp_path), "--optimizer", "sgd"]
    main([*shared, "--steps", "5"])
    before = (tmp_path / "sgd.pt").read_bytes(), (tmp_path / "results.json").read_bytes()
    assert "seed = 0, this run has 1" in refused(capsys, *shared, "--steps", "5", "--resume", "--seed", "1")
    assert "lr = 0.25, this run has 0.5" in refused(capsys, *shared, "--steps", "5", "--resume", "--lr-sgd", "0.5")
    assert "--steps must be at least 5" in refused(capsys, *shared, "--steps", "4", "--resume")
    assert before == ((tmp_path / "sgd.pt").read_bytes(), (tmp_path / "results.json").read_bytes())
    for damaged in (before[0][:500], b"", b"hello"):
        (tmp_path / "sgd.pt").write_bytes(damaged)
        assert "sgd.pt is no checkpoint" in refused(capsys, *shared, "--steps", "5", "--resume")
