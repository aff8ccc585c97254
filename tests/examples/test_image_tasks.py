"""The paper's image tasks: inputs, networks, gradients, batches, resuming, refused images."""

import hashlib
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples import image_data
from examples.cifar import Cifar10
from examples.image_data import ImageBytes
from examples.paper.tasks import image_classification, image_generation
from examples.paper.tasks.base import Task
from examples.paper.tasks.image_classification import ImageClassification, ResNet18, augment, channel_moments
from examples.paper.tasks.image_generation import Block, ImageGeneration, ImageGenerator, inputs
from tests.helpers.mnist import write_idx, write_mnist


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These networks are small: more threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def digits(side: int = 5, train: int = 12, test: int = 3) -> ImageBytes:
    """Random images; the first pixels tell which image it is."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (count, side, side), dtype=np.uint8) for count in (train, test)]
    images[0][:, 0, 0] = np.arange(train)
    return ImageBytes(images[0], np.zeros(train, np.uint8), images[1], np.zeros(test, np.uint8))


def colours(train: int = 10, test: int = 5, side: int = 32) -> Cifar10:
    generator = torch.Generator().manual_seed(0)
    sizes = ((train, 3, side, side), (test, 3, side, side))
    images = [torch.randint(0, 256, size, dtype=torch.uint8, generator=generator) for size in sizes]
    return Cifar10(images[0], torch.arange(train) % 10, images[1], torch.arange(test) % 10)


def generation(seed: int = 0, **options: Any) -> ImageGeneration:
    return ImageGeneration(seed, **{"data": digits(), "batch_size": 4, "validation_images": 2} | options)


def classification(seed: int = 0, **options: Any) -> ImageClassification:
    return ImageClassification(seed, **{"data": colours(side=8), "batch_size": 4} | options)


def in_double(task: Any) -> Any:
    """The task in float64. Its parameters stay the model's, and the leaves are the same objects."""
    task.model.double()
    assert all(a is b for a, b in zip(task.params, task.model.parameters(), strict=True))
    return task


def same_gradients(left: Task, right: list[Tensor], tolerance: float) -> None:
    for param, expected in zip(left.params, right, strict=True):
        assert param.grad is not None
        torch.testing.assert_close(param.grad, expected, rtol=tolerance, atol=tolerance)


# Both tasks


@pytest.mark.parametrize("make", [generation, classification])
def test_gradients_are_those_of_finite_differences(make: Any) -> None:
    task = in_double(make())
    task.draw()
    assert task.backward() == pytest.approx(task.loss(task.params).item(), rel=1e-6)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        along = [
            torch.randn(p.shape, dtype=p.dtype, generator=generator) * p.detach().std().nan_to_num(1)
            for p in task.params
        ]
        step = 1e-6

        def at(distance: float, along: list[Tensor] = along) -> float:
            with torch.no_grad():
                return task.loss([p + distance * d for p, d in zip(task.params, along, strict=True)]).item()

        slope = (at(step) - at(-step)) / (2 * step)
        expected = sum((p.grad * d).sum().item() for p, d in zip(task.params, along, strict=True))
        assert slope == pytest.approx(expected, rel=2e-5, abs=1e-7)


@pytest.mark.parametrize("make", [generation, classification])
def test_backward_is_the_gradient_of_the_loss(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_generation, "GRADIENT_CHUNK", 3)  # of batches of 4
    task = make()
    task.draw()
    task.backward()
    same_gradients(task, list(torch.autograd.grad(task.loss(task.params), task.params)), 1e-4)
    before = [p.grad.clone() for p in task.params]
    task.backward()  # does not add up
    same_gradients(task, before, 1e-4)


@pytest.mark.parametrize("make", [generation, classification])
def test_resumed_equals_uninterrupted(make: Any) -> None:
    def train(task: Any, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            task.draw()
            losses.append(task.backward())
            with torch.no_grad():
                for param in task.params:
                    param -= 0.01 * param.grad
        return losses

    whole, cut = make(), make()
    expected = train(whole, 5)
    got = train(cut, 3)  # 10 images to draw from: within the second epoch
    saved = io.BytesIO()
    torch.save(cut.state_dict(), saved)
    saved.seek(0)
    train(cut, 1)  # what was saved does not move
    fresh = make()
    fresh.load_state_dict(torch.load(saved, weights_only=True))
    assert got + train(fresh, 2) == expected
    assert fresh.validate() == whole.validate()
    for left, right in zip(fresh.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("make", [generation, classification])
def test_the_sample_itself_is_resumed(make: Any) -> None:
    task, fresh = make(), make()
    task.draw()
    fresh.load_state_dict(task.state_dict())
    assert fresh.loss(fresh.params).item() == task.loss(task.params).item()


@pytest.mark.parametrize("make", [generation, classification])
def test_seed_fixes_the_task_and_nothing_else_changes(make: Any) -> None:
    before = torch.get_rng_state()
    first, same, other = make(0), make(0), make(1)
    for task in (first, same, other):
        task.draw()
    losses = [task.backward() for task in (first, same, other)]
    assert losses[0] == losses[1] != losses[2]
    state = {name: tensor.clone() for name, tensor in first.model.state_dict().items()}
    generator = first.generator.get_state()
    first.validate()
    first.loss(first.params)
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.model.state_dict().items())
    assert torch.equal(generator, first.generator.get_state())
    assert first.model.training
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("make", [generation, classification])
def test_bad_arguments_are_refused(make: Any) -> None:
    with pytest.raises(RuntimeError, match="before the first draw"):
        make().backward()
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        make(batch_size=0)
    with pytest.raises(ValueError, match="data_root or data must be given"):
        make(data=None)
    with pytest.raises(ValueError, match=r"validation_images must be .* 1.*, got 0"):
        make(validation_images=0)


# Image generation


def test_generator_has_the_papers_size() -> None:
    model = ImageGenerator(torch.Generator())
    assert sum(p.numel() for p in model.parameters()) == 94_696


def test_images_are_halved_to_one_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(Block, "forward", lambda _, x: sizes.append(x.shape[2:]) or x)
    model = ImageGenerator(torch.Generator().manual_seed(0))
    x = torch.randn(2, 5, 28, 28)
    found = model(x)
    assert sizes == [(side, side) for side in (28, 14, 7, 4, 2) for _ in range(4)]
    expected = model.stem(x)
    while expected.shape[-1] > 1:  # means over what there is of each square of 2 x 2
        rows = [expected[:, :, at : at + 2].mean(2) for at in range(0, expected.shape[2], 2)]
        rows = [torch.stack([row[:, :, at : at + 2].mean(2) for at in range(0, row.shape[2], 2)], 2) for row in rows]
        expected = torch.stack(rows, 2)
    torch.testing.assert_close(found, model.head(expected[:, :, 0, 0]))


def test_initial_weights_are_lecun_normal() -> None:
    model = ImageGenerator(torch.Generator().manual_seed(0))
    fan_in = {"stem": 5, "expand": 20, "depthwise": 9, "contract": 120, "head": 20}
    for name, tensors in fan_in.items():
        for kind in ("weight", "bias"):
            found = [p.flatten() for key, p in model.named_parameters() if key.endswith(f"{name}.{kind}")]
            values = torch.cat(found) * math.sqrt(tensors + 1)
            assert len(found) == (1 if name in ("stem", "head") else 20)
            error = 4 / math.sqrt(2 * len(values))  # 4 standard errors of a standard deviation
            assert values.std().item() == pytest.approx(1, abs=error), (name, kind)
            assert abs(values.mean().item()) < 4 / math.sqrt(len(values))


def test_block_computes_plain_convolutions() -> None:
    block = Block().double()
    x = torch.randn(3, 20, 7, 6, dtype=torch.float64, requires_grad=True)
    plain = x + block.contract(torch.atan(block.depthwise(torch.atan(block.expand(x)))))
    torch.testing.assert_close(block(x), plain)
    leaves = (x, *block.parameters())
    along = torch.randn_like(plain)
    for found, expected in zip(
        torch.autograd.grad(block(x), leaves, along), torch.autograd.grad(plain, leaves, along), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_inputs_follow_the_description() -> None:
    rows, columns = 4, 7
    images = torch.randint(1, 256, (rows * columns, rows, columns), dtype=torch.uint8)
    found = inputs(images, torch.arange(rows * columns))
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    for index in range(rows * columns):
        for row in range(rows):
            for column in range(columns):
                visible = (row, column) < (index // columns, index % columns)
                expected = [
                    images[index, row, column].item() / 256 if visible else 0.0,
                    1.0 if column <= index % columns else -1.0,
                    1.0 if visible else -1.0,
                    -1 + 2 * row / rows,
                    -1 + 2 * column / columns,
                ]
                assert found[index, :, row, column].tolist() == pytest.approx(expected)


def test_logits_depend_on_the_pixels_before_alone() -> None:
    model = ImageGenerator(torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 13, 24])
    images = torch.randint(0, 256, (4, 5, 5), dtype=torch.uint8)
    before = model(inputs(images, positions))
    later, earlier = images.flatten(1).clone(), images.flatten(1).clone()
    for index, position in enumerate(positions):
        later[index, position:] ^= 255
        earlier[index, :position] ^= 255
    assert torch.equal(before, model(inputs(later.view_as(images), positions)))
    changed = (before != model(inputs(earlier.view_as(images), positions))).any(1)
    assert changed.tolist() == [False, True, True, True]


def test_loss_is_that_of_the_queried_pixels() -> None:
    task = generation()
    task.draw()
    images, positions = task.batch()
    chances = task.model(inputs(images, positions)).softmax(1)
    expected = []
    for index, position in enumerate(positions.tolist()):
        value = images[index].flatten()[position].item()
        expected.append(-math.log(chances[index, value].item()))
    assert task.loss(task.params).item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_held_out_images_are_not_drawn() -> None:
    task = generation(batch_size=100)
    seen, positions = set(), set()
    for _ in range(20):
        task.draw()
        images, queried = task.batch()
        seen |= set(images[:, 0, 0].tolist())
        positions |= set(queried.tolist())
    assert seen == set(range(10))  # of 12
    assert positions == set(range(25))
    assert task.validation_images[:, 0, 0].tolist() == [10, 11]


def test_validation_is_over_all_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    task = generation(data=digits(side=3, test=2))

    def slow(images: Tensor) -> float:
        losses = []
        for image in images:
            for position in range(9):
                logits = task.model(inputs(image[None], torch.tensor([position])))[0]
                losses.append(-logits.log_softmax(0)[image.flatten()[position].long()].item())
        return float(np.mean(losses))

    monkeypatch.setattr(image_generation, "CHUNK", 7)
    with torch.no_grad():
        assert task.validate() == {"validation_loss": pytest.approx(slow(task.validation_images), rel=1e-5)}
        assert task.test_loss(1) == pytest.approx(slow(task.test_images[:1]), rel=1e-5)
        assert task.test_loss() == pytest.approx(slow(task.test_images), rel=1e-5)


def test_generated_images_follow_the_model() -> None:
    task = generation()
    images = task.generate(3, seed=1)
    assert images.shape == (3, 5, 5)
    assert images.dtype == torch.uint8
    assert torch.equal(images, task.generate(3, seed=1))
    assert not torch.equal(images, task.generate(3, seed=2))
    with torch.no_grad():
        task.model.head.weight.zero_()
        task.model.head.bias.fill_(-math.inf)
        task.model.head.bias[[7, 200]] = 0.0
    values, counts = task.generate(8, seed=0).unique(return_counts=True)
    assert values.tolist() == [7, 200]
    assert abs(counts[0].item() - 100) < 30  # of 200, at even chances


def test_finish_tests_and_samples(tmp_path: Path) -> None:
    task = generation(data=digits(side=5), test_images=3)
    figures = task.finish(tmp_path / "samples" / "LODO.npy")
    assert figures == {"test_loss": task.test_loss(3)}
    assert np.array_equal(np.load(tmp_path / "samples" / "LODO.npy"), task.generate(16, seed=0).numpy())


def test_sizes_of_images_are_checked() -> None:
    with pytest.raises(ValueError, match="squares of at most 32 x 32"):
        generation(data=digits(side=33))
    with pytest.raises(ValueError, match="from 1 to 11, got 12"):
        generation(validation_images=12)


def test_raw_mnist_is_read(tmp_path: Path) -> None:
    images, labels = write_mnist(tmp_path)
    data = image_data.mnist_bytes(tmp_path)
    assert data.train_images.dtype == np.uint8
    assert np.array_equal(data.train_images, images.numpy())
    assert np.array_equal(data.train_labels, labels.numpy())
    assert data.test_images.shape == (20, 6, 5)


def test_paper_needs_all_of_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path)
    with pytest.raises(ValueError, match="training images must be 60000 x 28 x 28, they are 60 x 6 x 5"):
        image_generation.load(tmp_path)
    monkeypatch.setattr(image_generation, "COUNTS", (60, 20))
    for part, count in (("train", 60), ("t10k", 20)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", torch.ones(count, 28, 28))
    with pytest.raises(ValueError, match=r"train-images.* is not MNIST's file: its MD5 is .*, expected f68b3c2d"):
        image_generation.load(tmp_path)
    sums = {
        path.name.removesuffix(".gz"): hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        for path in tmp_path.glob("*.gz")
    }
    monkeypatch.setattr(image_data, "MNIST_MD5", sums)
    task = ImageGeneration(0, data_root=tmp_path, batch_size=2, validation_images=1)
    assert task.train_images.shape == (59, 28, 28)
    task.draw()
    assert math.isfinite(task.backward())


# Image classification


def test_resnet_has_the_usual_size() -> None:
    model = ResNet18(torch.Generator().manual_seed(0))
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    sizes = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: sizes.append(tuple(output.shape[1:])))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(width, side, side) for width, side in ((64, 32), (128, 16), (256, 8), (512, 4)) for _ in "ab"]
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.out_channels * layer.kernel_size[0] ** 2
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.06)


def test_l2_counts_the_weights_of_convolutions_and_the_linear_layer() -> None:
    plain, penalised = classification(l2=0.0), classification(l2=1e-3)
    plain.draw()
    penalised.load_state_dict(plain.state_dict())
    layers = [layer for layer in plain.model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    expected = 1e-3 * sum(layer.weight.square().sum().item() for layer in layers)
    difference = penalised.loss(penalised.params).item() - plain.loss(plain.params).item()
    assert difference == pytest.approx(expected, rel=1e-4)
    images, labels = plain.batch()
    logits = plain.model((images - plain.mean) / plain.deviation)
    assert plain.loss(plain.params).item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


def test_windows_and_mirrors_follow_a_slow_loop() -> None:
    images = torch.randint(1, 256, (40, 3, 5, 6), dtype=torch.uint8)
    top, left = torch.randint(9, (2, 40))
    flip = torch.arange(40) % 2 == 0
    found = augment(images, top, left, flip)
    for index in range(40):
        for row in range(5):
            for column in range(6):
                at = row + int(top[index]) - 4
                across = (5 - column if flip[index] else column) + int(left[index]) - 4
                inside = 0 <= at < 5 and 0 <= across < 6
                expected = images[index, :, at, across] if inside else torch.zeros(3, dtype=torch.uint8)
                assert torch.equal(found[index, :, row, column], expected)
    middle = torch.full((40,), 4)
    assert torch.equal(augment(images, middle, middle, torch.zeros(40, dtype=torch.bool)), images)


def test_all_shifts_and_mirrors_are_drawn() -> None:
    task = classification(batch_size=1000)
    task.draw()
    _, top, left, flip = task.state_dict()["picked"]
    assert set(top.tolist()) == set(left.tolist()) == set(range(9))
    assert 0.4 < flip.double().mean() < 0.6
    assert (top != left).any()


def test_epochs_hold_every_image_once() -> None:
    task = classification(batch_size=4)
    drawn: list[int] = []
    for _ in range(10):  # 4 epochs of 10 images
        task.draw()
        drawn += task.state_dict()["picked"][0].tolist()
    epochs = [drawn[at : at + 10] for at in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_images_are_scaled_by_channel() -> None:
    images = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
    images[:, 1] //= 4
    mean, deviation = channel_moments(images)
    pixels = images.double()
    torch.testing.assert_close(mean.flatten(), pixels.mean((0, 2, 3)).float())
    torch.testing.assert_close(deviation.flatten(), pixels.std((0, 2, 3), correction=0).float())


def test_validation_uses_running_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_classification, "CHUNK", 3)
    task = classification(validation_images=4)
    for _ in range(2):
        task.draw()
        task.backward()
    assert task.model.norm.num_batches_tracked.item() == 2
    found = task.validate()
    task.model.eval()
    for part, images, labels in (("test", task.test_images, task.test_labels), ("train", task.images, task.labels)):
        logits = task.model((images[:4] - task.mean) / task.deviation)
        assert found[f"{part}_loss"] == pytest.approx(F.cross_entropy(logits, labels[:4]).item(), rel=1e-4)
        assert found[f"{part}_accuracy"] == (logits.argmax(1) == labels[:4]).double().mean().item()


def test_autocast_is_close() -> None:
    losses = []
    for autocast in (False, True):
        task = classification(autocast=autocast)
        task.draw()
        losses.append(task.backward())
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in task.params)
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
