"""Small losses without noise: what the call without tuning makes of them, beside AdamW at its best rate.

    python -m benchmarks.noise_free [--out DIR] [--seeds N]

Quadratics, powers, valleys and full-batch trainings, each for 2,000 steps from some seeds. AdamW is given the best of
eight rates, each constant and with a warm-up and a cosine to zero, for each problem: by the loss at the end, geometric
mean over the seeds, and where several end at the limit of float32 that along the whole run.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lodo
from benchmarks.environment import environment
from benchmarks.schedules import factor_at

STEPS = 2000
SHOWN = (100, 300, 1000, 2000)
RATES = tuple(10 ** (exponent / 2) for exponent in range(-6, 2))  # 1e-3 to 3.2
SMALLEST = 1e-12  # what is below counts as this: the limit of float32 on problems of ordinary size
OUT = Path(__file__).parent / "results" / "noise_free"

Problem = Callable[[], tuple[list[nn.Parameter], Callable[[], Tensor]]]
"""Draws a start, and returns its parameters and the loss of them."""


def vector(size: int, loss: Callable[[Tensor], Tensor]) -> Problem:
    """A loss of one vector, from a standard normal start."""

    def problem() -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
        x = nn.Parameter(torch.randn(size))
        return [x], lambda: loss(x)

    return problem


def quadratic(size: int, decades: float) -> Problem:
    """Of eigenvalues from 1 down by so many decades."""
    curvatures = 10 ** torch.linspace(-decades, 0, size)
    return vector(size, lambda x: curvatures @ x.square())


def sparse_quadratic(size: int, every: int) -> Problem:
    """Of which only some coordinates have a curvature, over two decades."""
    curvatures = torch.zeros(size)
    curvatures[::every] = 10 ** torch.linspace(-2, 0, len(curvatures[::every]))
    return vector(size, lambda x: curvatures @ x.square())


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def regression(inputs: int, directions: int, outputs: int) -> Problem:
    """Linear, of inputs that lie in few directions, from far away."""

    def problem() -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
        x = torch.randn(512, directions) @ torch.randn(directions, inputs) * torch.logspace(0, -1, inputs)
        y, model = x @ torch.randn(inputs, outputs), nn.Linear(inputs, outputs)
        return list(model.parameters()), lambda: F.mse_loss(model(x), y)

    return problem


def factorisation() -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """Of a matrix of rank 4, from near zero."""
    target = torch.randn(30, 4) @ torch.randn(4, 20)
    a, b = nn.Parameter(0.1 * torch.randn(30, 4)), nn.Parameter(0.1 * torch.randn(4, 20))
    return [a, b], lambda: F.mse_loss(a @ b, target)


def network() -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """Of two layers, all data at once."""
    x = torch.randn(256, 10)
    y, model = torch.sin(x @ torch.randn(10, 1)), nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
    return list(model.parameters()), lambda: F.mse_loss(model(x), y)


PROBLEMS: dict[str, Problem] = {
    "mean square of 16 numbers": vector(16, lambda x: x.square().mean()),
    "mean square of 1,024 numbers": vector(1024, lambda x: x.square().mean()),
    "quadratic, 2 numbers, condition 100": quadratic(2, 2),
    "quadratic, 16 numbers, condition 100": quadratic(16, 2),
    "quadratic, 128 numbers, condition 10,000": quadratic(128, 4),
    "sparse quadratic, 52 of 512 numbers": sparse_quadratic(512, 10),
    "sum of fourth powers of 16 numbers": vector(16, lambda x: x.pow(4).sum()),
    "sum of absolute values of 8 numbers": vector(8, lambda x: x.abs().sum()),
    "Rosenbrock's function of 2 numbers": vector(2, rosenbrock),
    "Rosenbrock's function of 10 numbers": vector(10, rosenbrock),
    "linear regression, 160 inputs in 12 directions": regression(160, 12, 30),
    "linear regression, 20 inputs": regression(20, 20, 5),
    "factorisation of rank 4": factorisation,
    "network of two layers": network,
}


def losses_of(
    problem: Problem,
    make: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer],
    schedule: str,
    seed: int,
    steps: int,
) -> list[float]:
    """The loss before each step; infinity from where it is no longer finite."""
    torch.manual_seed(seed)
    params, loss_of = problem()
    optimizer, losses = make(params), []
    rate = optimizer.param_groups[0]["lr"]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * factor_at(schedule, step, steps)
        optimizer.zero_grad()
        loss = loss_of()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            return losses[:-1] + [math.inf] * (steps - step)
        loss.backward()
        optimizer.step()
    return losses


def typical(losses: Sequence[float]) -> float:
    """Their geometric mean, each at least SMALLEST."""
    return math.exp(sum(math.log(max(loss, SMALLEST)) for loss in losses) / len(losses))


def best_adamw(problem: Problem, seeds: Sequence[int], steps: int) -> tuple[str, list[list[float]]]:
    """Its name and the losses at each seed. Of settings that all end at SMALLEST, the lowest along the run."""
    found = {}
    for schedule, words in (("constant", "constant"), ("warmup_cosine", "cosine")):
        for rate in RATES:

            def make(params: Sequence[nn.Parameter], rate: float = rate) -> torch.optim.Optimizer:
                return torch.optim.AdamW(params, lr=rate, weight_decay=0.0)

            runs = [losses_of(problem, make, schedule, seed, steps) for seed in seeds]
            found[f"{rate:.2g}, {words}"] = runs

    def ends(name: str) -> tuple[float, float]:
        runs = found[name]
        return typical([run[-1] for run in runs]), typical([loss for run in runs for loss in run])

    name = min(found, key=ends)
    return name, found[name]


def report(seeds: Sequence[int], steps: int = STEPS) -> str:
    """The table, in Markdown."""
    machine, shown = environment(), [step for step in SHOWN if step <= steps]
    heads = [f"{step:,}" for step in shown]
    lines = [
        "# Small losses without noise",
        "",
        f"`python -m benchmarks.noise_free`, {machine['processor']}, torch {machine['torch']}, lodo source "
        f"{machine['lodo_source']}, {len(seeds)} seeds. Losses that these steps are taken at, geometric means over the "
        f"seeds; {SMALLEST:.0e} stands for that and less. AdamW has the best of {len(RATES)} rates, constant or with a "
        "warm-up and a cosine, for each problem by itself.",
        "",
        f"| problem | {' | '.join(f'{name}, {head}' for name in ('AutoLODO', 'AdamW') for head in heads)} | its rate |",
        f"|:--|{'--:|' * (2 * len(heads))}:--|",
    ]
    for title, problem in PROBLEMS.items():
        ours = [losses_of(problem, lambda params: lodo.AutoLODO(params), "constant", seed, steps) for seed in seeds]
        name, theirs = best_adamw(problem, seeds, steps)
        cells = [f"{typical([run[step - 1] for run in runs]):.1e}" for runs in (ours, theirs) for step in shown]
        lines.append(f"| {title} | {' | '.join(cells)} | {name} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the report")
    parser.add_argument("--seeds", type=int, default=3, help="number of starts of each problem")
    parser.add_argument("--steps", type=int, default=STEPS)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    text = report(range(chosen.seeds), chosen.steps)
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "report.md").write_text(text)


if __name__ == "__main__":
    main()
