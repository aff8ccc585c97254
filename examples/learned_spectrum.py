"""Draws how the eigenvalues of the learned G change while LODO trains.

    python -m examples.learned_spectrum

On the left the paper's noisy bowl (section 5.1), whose inverse Hessian is known: all eigenvalues of G, exactly. On the
right a classifier of handwritten digits, with the distribution of G's eigenvalues as `lodo.spectrum` estimates it.
Writes learned_spectrum.png, and the figures behind it as learned_spectrum.json.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import lodo
from examples.checkpoints import write_whole
from examples.image_data import batches, digits
from examples.paper.tasks.bowl import NoisyBowl
from examples.train_classifier import number

LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # quantiles that are drawn
COLOR = "#0072B2"


def bowl(steps: int) -> Iterator[lodo.LODO]:
    """LODO on the noisy bowl, at the rates that the paper's search found here; yields after every step."""
    task = NoisyBowl(seed=0)
    optimizer = lodo.LODO(task.params, lr=0.108, meta_lr=6.7e-4, beta=0.116)
    for _ in range(steps):
        task.draw()
        task.backward()
        optimizer.step()
        yield optimizer


def classifier(steps: int) -> Iterator[lodo.LODO]:
    """LODO with a lean network on a classifier of handwritten digits; yields after every step."""
    torch.manual_seed(0)
    data = digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = lodo.LODO(model.parameters(), lr=3.0, meta_lr=3e-3, depth=4, expansion=1, permutation="shuffle")
    for _, picked in zip(range(steps), batches(len(data.train_images), 64, seed=0, step=0), strict=False):
        optimizer.zero_grad()
        cross_entropy(model(data.train_images[picked]), data.train_labels[picked]).backward()
        optimizer.step()
        yield optimizer


def exact(optimizer: lodo.LODO) -> tuple[Tensor, Tensor]:
    """All eigenvalues of G, ascending, and their equal weights."""
    (preconditioner,) = optimizer.preconditioners
    assert preconditioner is not None
    eigenvalues = optimizer.param_groups[0]["lr"] * torch.linalg.eigvalsh(preconditioner.to_dense())
    return eigenvalues, torch.full_like(eigenvalues, 1 / len(eigenvalues))


def estimated(optimizer: lodo.LODO) -> tuple[Tensor, Tensor]:
    """The same from products with G."""
    (preconditioner,) = optimizer.preconditioners
    assert preconditioner is not None
    eigenvalues, weights = lodo.spectrum(preconditioner, probes=8, iterations=32)
    return optimizer.param_groups[0]["lr"] * eigenvalues, weights


def quantiles(eigenvalues: Tensor, weights: Tensor) -> list[float]:
    """The eigenvalues at LEVELS of the distribution."""
    below = weights.cumsum(0) / weights.sum()
    at = torch.searchsorted(below, torch.tensor(LEVELS, dtype=below.dtype) - 1e-9).clamp(max=len(below) - 1)
    return [float(value) for value in eigenvalues[at]]


def record(
    run: Iterator[lodo.LODO], steps: int, measure: Callable[[lodo.LODO], tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """The quantiles of the spectrum at about 60 steps, evenly spaced in their logarithms."""
    wanted = set(np.unique(np.geomspace(1, steps, 60).round().astype(int)).tolist())
    at, found = [], []
    for step, optimizer in enumerate(tqdm(run, total=steps, unit="step"), start=1):
        if step in wanted:
            at.append(step)
            found.append(quantiles(*measure(optimizer)))
    return {"steps": at, "levels": LEVELS, "eigenvalues": found}


def draw(axes: Axes, recorded: dict[str, Any], title: str) -> None:
    values = np.array(recorded["eigenvalues"])
    middle = len(LEVELS) // 2
    for lower, upper, alpha in ((0, -1, 0.12), (1, -2, 0.2), (2, -3, 0.3)):
        share = LEVELS[upper] - LEVELS[lower]
        label = "all" if share == 1 else f"middle {share:.0%}"
        axes.fill_between(
            recorded["steps"], values[:, lower], values[:, upper], color=COLOR, alpha=alpha, linewidth=0, label=label
        )
    axes.plot(recorded["steps"], values[:, middle], color=COLOR, linewidth=2, label="median")
    axes.set(xscale="log", yscale="log", xlabel="step", title=title, xlim=(1, recorded["steps"][-1]))
    decades = np.log10(values.max() / values.min())
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2 else (1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, results["bowl"], "the noisy bowl, n = 100 (all eigenvalues)")
    draw(right, results["digits"], "a classifier of digits, n = 4,810 (estimated)")
    inverse = 1 / NoisyBowl().eigenvalues
    ends = float(inverse.min()), float(inverse.max())
    for end in ends:
        left.axhline(end, color="0.3", linestyle="--", linewidth=1)
    left.text(1.1, ends[1] * 0.6, "largest and smallest eigenvalue of the inverse Hessian", fontsize=9, va="top")
    left.set_ylabel("eigenvalues of G", fontsize=11)
    right.legend(frameon=False, loc="upper left")
    figure.suptitle("What LODO learns: the spectrum of G over training", fontsize=13)
    FigureCanvasAgg(figure).print_figure(path, dpi=150, format="png")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    count = number(int, 0, 2**63, "an integer >= 1")
    parser.add_argument("--bowl-steps", type=count, default=20_000, help="(default: 20000, some 20 s)")
    parser.add_argument("--digits-steps", type=count, default=1000, help="(default: 1000)")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="(default: out)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    results = {
        "bowl": record(bowl(options.bowl_steps), options.bowl_steps, exact),
        "digits": record(classifier(options.digits_steps), options.digits_steps, estimated),
    }
    write_whole(options.out / "learned_spectrum.json", lambda part: part.write_text(json.dumps(results) + "\n"))
    write_whole(options.out / "learned_spectrum.png", lambda part: plot(results, part))
    print(f"The picture and its figures are in {options.out}.")


if __name__ == "__main__":
    main()
