"""What each part of `lodo.AutoLODO` costs: time of a step and bytes of state with all of them, and without each.

    python -m benchmarks.part_costs    # some three minutes on one thread

Times are of `step()` alone, on fixed gradients, in rounds in which all take turns; ratios are to the step with all
parts in the same round. Calls are timed in whole cycles of the base, which renews its bases every tenth step in the
first 1,000, and less often later. Writes part_costs.md.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import lodo
from benchmarks.configs import shapes_of
from benchmarks.measuring import device_name, state_bytes, time_calls
from benchmarks.meta_options import as_table, percentiles
from lodo.parts.eigenbasis import BASIS_EVERY

SIZES = (3_000, 95_000, 1_000_000)

Make = Callable[[list[Tensor]], Optimizer]


def without(**options: Any) -> Make:
    return lambda params: lodo.AutoLODO(params, **options)


def without_gains(params: list[Tensor]) -> Optimizer:
    return lodo.LODO(params, **{**lodo.RECOMMENDED, "preconditioner": "identity", "trace_decay": 0.0})


WAYS: dict[str, Make] = {
    "all parts": without(),
    'no gains: `preconditioner="identity"`': without_gains,
    "no trace: `trace_decay=0.0`": without(trace_decay=0.0),
    "no scales: `scale_lr=0.0`": without(scale_lr=0.0),
    "one momentum: `momentum_decays=None`": without(momentum_decays=None),
    'no eigenbases: `base="adam"`': without(base="adam"),
    "AdamW, fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
}


def made(n: int, make: Make) -> Optimizer:
    """On parameters of a small network, with gradients that stay."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes_of(n)]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return make([*params])


def measured(n: int, rounds: int) -> list[tuple[str, ...]]:
    """A row of cells for each way: milliseconds, ratio with its spread, bytes of state for each parameter."""
    optimizers = {name: made(n, make) for name, make in WAYS.items()}
    for optimizer in optimizers.values():
        time_calls(optimizer.step, 2 * BASIS_EVERY, "cpu")
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            times[name] += time_calls(optimizer.step, 1, "cpu", batch=BASIS_EVERY)
    rows: list[tuple[str, ...]] = []
    for name, optimizer in optimizers.items():
        ratios = [one / full for one, full in zip(times[name], times["all parts"], strict=True)]
        low, middle, high = percentiles(ratios)
        size = state_bytes(optimizer) / n
        rows.append(
            (name, f"{percentiles(times[name])[1]:.3f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}", f"{size:.1f}")
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    folder = Path(__file__).parent / "results" / "part_costs"
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of parameters")
    parser.add_argument("--rounds", type=int, default=20, help="of the timing (default: 20)")
    parser.add_argument("--out", type=Path, default=folder, metavar="DIR", help=f"(default: {folder})")
    options = parser.parse_args(arguments)
    if min(options.rounds, *options.sizes) < 1:
        parser.error("--rounds and --sizes must be at least 1")
    torch.set_num_threads(1)
    parts = [
        "# What each part of `lodo.AutoLODO` costs",
        f"{device_name('cpu')}, one thread, torch {torch.__version__}, {options.rounds} rounds.",
    ]
    for n in options.sizes:
        columns = ("", "step, ms (median)", "of all parts'", "20 to 80 %", "state, bytes per parameter")
        parts += [f"## {n:,} parameters", as_table(columns, measured(n, options.rounds))]
        print(parts[-2], parts[-1], sep="\n\n", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "part_costs.md").write_text("\n\n".join(parts) + "\n")
    print(f"\nIn {options.out}.")


if __name__ == "__main__":
    main()
