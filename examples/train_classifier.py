"""Trains an MLP on handwritten digits with LODO, tuned and untuned, AdamW and SGD with momentum, side by side.

    python -m examples.train_classifier                                  # scikit-learn's digits, about 10 s
    python -m examples.train_classifier --data mnist --data-root data    # MNIST, about 40 s
    python -m examples.train_classifier --resume                         # goes on where the last run was cut off

Every optimizer starts from the same weights and sees the same batches. A table closes the run; --out receives
curves.png, results.json and a checkpoint for each optimizer, which holds its curves too.

The final training loss is the mean over the whole training set after the last step. Seconds are those spent on
batches, losses, gradients and steps; seconds in the optimizer are those within `step()`. Accelerators are
synchronised before the clock is read. What is built at first steps is built before, in a throw-away run.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

if not __package__:  # run as a file, which puts this folder on the path in place of the project's
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lodo
from examples import checkpoints
from examples.image_data import CLASSES, ImageData, batches, digits, mnist

LABELS = {"lodo": "LODO", "untuned": "LODO, untuned", "adamw": "AdamW", "sgd": "SGD with momentum"}
# Told apart by the colour-blind too.
COLORS = {"lodo": "#0072B2", "untuned": "#E69F00", "adamw": "#D55E00", "sgd": "#009E73"}
CHUNK = 10_000  # images evaluated at a time


@dataclass(frozen=True)
class Task:
    """What is trained by default on a dataset."""

    title: str
    hidden: tuple[int, ...]
    steps: int
    batch_size: int
    lr: dict[str, float]


# The learning rates are the best of a grid for each optimizer, by the mean loss over the last tenth of the steps: where
# the loss ends after the last step says less about a rate that is nearly too large. The grids are in README.md. Untuned
# LODO has that of `lodo.AutoLODO`.
TASKS = {
    "digits": Task("scikit-learn's digits", (64,), 1000, 64, lr={"lodo": 3.0, "adamw": 2e-2, "sgd": 0.25}),
    "mnist": Task("MNIST", (128,), 2000, 128, lr={"lodo": 0.5, "adamw": 2e-3, "sgd": 0.05}),
}


@dataclass(frozen=True)
class Settings:
    """Everything a training run depends on besides the number of steps: runs with equal ones can be resumed."""

    data: str
    hidden: tuple[int, ...]
    batch_size: int
    seed: int
    device: str
    lr: float
    meta_lr: float  # 0 where there is no such option


def make_model(pixels: int, settings: Settings) -> nn.Sequential:
    """An MLP with ReLUs; the same weights for the same seed, whatever the device."""
    torch.manual_seed(settings.seed)
    widths = (pixels, *settings.hidden)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES)).to(settings.device)


def make_optimizer(name: str, model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer called `name`, all without weight decay, so that they minimise the same loss."""
    # torch's fastest implementations, where they exist, for a fair comparison of the seconds
    fused = torch.device(settings.device).type in ("cpu", "cuda") or None
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0, fused=fused)
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.9, fused=fused)
    if name == "untuned":
        return lodo.AutoLODO(model.parameters(), lr=settings.lr)
    # A lean network, an eighth of the default one's size, is enough for a small MLP.
    return lodo.LODO(
        model.parameters(),
        lr=settings.lr,
        meta_lr=settings.meta_lr,
        depth=4,
        expansion=1,
        permutation="shuffle",
        seed=settings.seed,
    )


class Run:
    """The training of one model with one optimizer, and its curves: the loss and the seconds so far, by step."""

    def __init__(self, name: str, pixels: int, settings: Settings) -> None:
        self.name = name
        self.settings = settings
        self.device = torch.device(settings.device)
        self.model = make_model(pixels, settings)
        self.optimizer = make_optimizer(name, self.model, settings)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.optimizer_seconds = 0.0

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def has_diverged(self) -> bool:
        return self.step > 0 and not math.isfinite(self.losses[-1])

    def advance(self, images: Tensor, labels: Tensor) -> None:
        """Takes one training step, unless the loss is not finite any more: then it is recorded and nothing changes."""
        begin = self._now()
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(images), labels)
        self.losses.append(loss.item())
        if not self.has_diverged:
            loss.backward()
            before = self._now()
            self.optimizer.step()
            self.optimizer_seconds += self._now() - before
        self.seconds.append((self.seconds[-1] if self.seconds else 0.0) + self._now() - begin)

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """Mean loss and accuracy over a whole dataset."""
        loss = correct = 0.0
        for x, y in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
            outputs = self.model(x)
            loss += cross_entropy(outputs, y, reduction="sum").item()
            correct += (outputs.argmax(1) == y).sum().item()
        return loss / len(images), correct / len(images)

    def save(self, path: Path) -> None:
        content = {
            "settings": {"optimizer": self.name, **asdict(self.settings)},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
            "optimizer_seconds": self.optimizer_seconds,
        }
        checkpoints.save(path, content)

    def load(self, path: Path) -> Self:
        """Takes up the state in a checkpoint, all of it or nothing.

        Raises:
            ValueError: if it cannot be read, is damaged, or was written with other settings.
        """
        content = checkpoints.load(path, self.device)
        saved: dict[str, Any] = content.get("settings", {})
        losses, seconds, total = (content.get(name) for name in ("losses", "seconds", "optimizer_seconds"))
        if not isinstance(saved, dict) or not is_curve(losses) or not is_curve(seconds) or not isinstance(total, float):
            raise ValueError(f"{path} is no checkpoint of this program")
        for key, value in {"optimizer": self.name, **asdict(self.settings)}.items():
            if saved.get(key) != value:
                raise ValueError(f"{path} was written with {key} = {saved.get(key)!r}, this run has {value!r}")
        has_diverged = len(losses) > 0 and not math.isfinite(losses[-1])
        parts: list[checkpoints.Part] = [(self.model, content.get("model"))]
        if not has_diverged:  # else it takes no more steps, and LODO refuses a state with NaN
            parts.append((self.optimizer, content.get("optimizer")))
        checkpoints.load_together(path, parts)
        self.losses, self.seconds, self.optimizer_seconds = losses, seconds, total
        return self


def is_curve(value: Any) -> TypeGuard[list[float]]:
    return isinstance(value, list) and all(isinstance(number, float) for number in value)


def warm_up(run: Run, data: ImageData) -> None:
    """Two steps of a throw-away twin, so that the seconds do not count kernels being built at the first one."""
    twin = Run(run.name, data.train_images.shape[1], run.settings)
    for _ in range(2):
        twin.advance(data.train_images[: run.settings.batch_size], data.train_labels[: run.settings.batch_size])


def train(run: Run, data: ImageData, steps: int, checkpoint: Path, checkpoint_every: int) -> None:
    """Brings a run to `steps` steps, or to its first loss that is not finite."""
    indices = batches(len(data.train_images), run.settings.batch_size, run.settings.seed, run.step)
    with tqdm(total=steps, initial=run.step, desc=LABELS[run.name], unit="step") as bar:
        while run.step < steps and not run.has_diverged:
            picked = next(indices).to(run.device)
            run.advance(data.train_images[picked], data.train_labels[picked])
            bar.update()
            if run.step % 50 == 0:
                bar.set_postfix(loss=f"{np.mean(run.losses[-50:]):.4f}", refresh=False)
            if run.step % checkpoint_every == 0:
                run.save(checkpoint)
    run.save(checkpoint)


def summarise(run: Run, data: ImageData) -> dict[str, Any]:
    """The figures of a run for the table and results.json; None where it diverged."""
    loss, _ = run.evaluate(data.train_images, data.train_labels)
    _, accuracy = run.evaluate(data.test_images, data.test_labels)
    has_diverged = run.has_diverged or not math.isfinite(loss)
    return {
        "optimizer": run.name,
        "train_loss": None if has_diverged else loss,
        "test_accuracy": None if has_diverged else accuracy,
        "steps": run.step,
        "seconds": run.seconds[-1],
        "optimizer_seconds": run.optimizer_seconds,
        "diverged": has_diverged,
        "settings": asdict(run.settings),
    }


def table(results: list[dict[str, Any]]) -> str:
    """The closing table, one row for each optimizer."""
    rows = [("optimizer", "train loss", "test accuracy", "steps", "seconds", "in optimizer")]
    for result in results:
        loss = "diverged" if result["diverged"] else f"{result['train_loss']:.3g}"
        accuracy = "-" if result["diverged"] else f"{result['test_accuracy']:.2%}"
        times = f"{result['seconds']:.2f}", f"{result['optimizer_seconds']:.2f}"
        rows.append((LABELS[result["optimizer"]], loss, accuracy, str(result["steps"]), *times))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def running_mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Mean of each value and those before it: a fifth of them early on, so that the first fall stays, later 2.5 %."""
    ends = np.arange(1, len(values) + 1)
    starts = ends - np.clip(ends // 5, 1, max(1, len(values) // 40))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot(runs: list[Run], title: str, path: Path) -> None:
    """Training loss by step and by seconds: batch losses faint, their running mean on top."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    lowest = math.inf
    for run in runs:
        losses, color = np.array(run.losses), COLORS[run.name]
        smooth = running_mean(losses)
        lowest = min(lowest, smooth.min(initial=math.inf, where=smooth > 0))
        label = LABELS[run.name] + (f" (diverged at step {run.step})" if run.has_diverged else "")
        for axes, x in zip(panels, (np.arange(1, run.step + 1), np.array(run.seconds)), strict=True):
            axes.plot(x, losses, color=color, alpha=0.12, linewidth=0.5)
            axes.plot(x, smooth, color=color, linewidth=2, label=label, zorder=3)
    for axes, name in zip(panels, ("step", "seconds of training"), strict=True):
        axes.set_xlabel(name, fontsize=11)
        axes.set_yscale("log")
        axes.set_xlim(left=0)
        axes.grid(color="0.9", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    if math.isfinite(lowest):
        panels[0].set_ylim(bottom=lowest / 4)  # single batches may lie orders of magnitude below
    panels[0].set_ylabel("training loss of the batches\nand its running mean", fontsize=11)
    panels[1].legend(frameon=False, fontsize=11)
    figure.suptitle(title, fontsize=13)
    FigureCanvasAgg(figure).print_figure(path, dpi=150, format="png")


def number(kind: type[float] | type[int], low: float, high: float, allowed: str) -> Callable[[str], Any]:
    """A converter for argparse: numbers between `low` and `high`, both excluded; what is `allowed` goes into errors."""

    def convert(text: str) -> float | int:
        try:
            value = kind(text)
        except ValueError:
            value = kind(low)
        if not low < value < high:
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")
        return value

    return convert


def usable_device(text: str) -> str:
    """A converter for argparse: devices that compute here."""
    try:
        probe = torch.zeros((), device=text)
        probe.item()
        return str(probe.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        allowed = "must be a device torch can use here"
        raise argparse.ArgumentTypeError(f"{allowed}, got {text!r} ({checkpoints.headline(error)})") from error


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    count = number(int, 0, math.inf, "an integer >= 1")
    rate = number(float, 0, math.inf, "a finite number > 0")
    seed = number(int, -1, 2**63, "an integer from 0 to 2**63 - 1")
    add = parser.add_argument
    add("--data", choices=TASKS, default="digits", help="dataset (default: scikit-learn's digits)")
    add("--data-root", type=Path, default=Path("data"), metavar="DIR", help="where MNIST's files are (default: data)")
    add("--optimizer", nargs="+", choices=LABELS, default=list(LABELS), help="which to run (default: all)")
    for name, label in LABELS.items():
        default = lodo.RECOMMENDED["lr"] if name == "untuned" else "tuned for the dataset"
        add(f"--lr-{name}", type=rate, metavar="LR", help=f"learning rate of {label} (default: {default})")
    add("--meta-lr", type=rate, default=3e-3, metavar="LR", help="of LODO's inner optimizer (default: 3e-3)")
    add("--steps", type=count, help="training steps (default: 1000 for digits, 2000 for MNIST)")
    add("--batch-size", type=count, help="images a step (default: 64 for digits, 128 for MNIST)")
    add("--device", type=usable_device, default="cpu", help="cpu, cuda, ... (default: cpu)")
    # These models gain little from more threads, and lose much to waiting where other programs want the cores.
    add("--threads", type=count, default=1, help="CPU threads (default: 1)")
    add("--seed", type=seed, default=0, help="of weights and batches (default: 0)")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where results go, over old ones (default: out)")
    add("--checkpoint-every", type=count, default=250, metavar="STEPS", help="(default: 250)")
    add("--resume", action="store_true", help="go on from the checkpoints in --out, up to --steps")
    return parser


def prepare(options: argparse.Namespace, data: ImageData) -> list[Run]:
    """The runs asked for, resumed where there is something to resume.

    Raises:
        ValueError: for options that do not fit the data or the checkpoints.
    """
    task = TASKS[options.data]
    count, pixels = data.train_images.shape
    if options.batch_size > count:
        raise ValueError(
            f"--batch-size must be at most {count}, the number of training images, got {options.batch_size}"
        )
    runs = []
    for name in dict.fromkeys(options.optimizer):
        lr = vars(options)[f"lr_{name}"] or task.lr.get(name, lodo.RECOMMENDED["lr"])
        meta_lr = options.meta_lr if name == "lodo" else 0.0
        shared = (options.data, task.hidden, options.batch_size, options.seed, options.device)
        run = Run(name, pixels, Settings(*shared, lr, meta_lr))
        checkpoint = options.out / f"{name}.pt"
        if options.resume and checkpoint.exists():
            run.load(checkpoint)
        if run.step > options.steps:
            raise ValueError(f"--steps must be at least {run.step} to resume {checkpoint}, got {options.steps}")
        runs.append(run)
    return runs


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    task = TASKS[options.data]
    torch.set_num_threads(options.threads)
    options.steps = options.steps or task.steps
    options.batch_size = options.batch_size or task.batch_size
    try:
        data = (digits() if options.data == "digits" else mnist(options.data_root)).to(torch.device(options.device))
    except (OSError, ValueError) as error:
        parser.error(f"argument --data-root: {error}")
    try:
        runs = prepare(options, data)
    except ValueError as error:
        parser.error(str(error))
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: must be a folder or a place for one, got {str(options.out)!r} ({error})")
    for run in runs:
        if run.step == options.steps or run.has_diverged:
            print(f"{LABELS[run.name]}: finished before, not run again")
            continue
        if options.resume and run.step == 0:
            print(f"{LABELS[run.name]}: no checkpoint in {options.out}, starts from the beginning")
        checkpoint = options.out / f"{run.name}.pt"
        checkpoints.remove_parts(checkpoint)
        warm_up(run, data)
        train(run, data, options.steps, checkpoint, options.checkpoint_every)
    results = [summarise(run, data) for run in runs]
    text = json.dumps(results, indent=2) + "\n"
    checkpoints.write_whole(options.out / "results.json", lambda part: part.write_text(text))
    title = f"An MLP on {task.title}, {options.batch_size} images a step"
    checkpoints.write_whole(options.out / "curves.png", lambda part: plot(runs, title, part))
    print(f"\n{table(results)}\n\nCurves, results and checkpoints are in {options.out}.")


if __name__ == "__main__":
    main()
