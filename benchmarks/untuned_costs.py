"""What a step of the call that wants no tuning costs, beside fused AdamW and SOAP, in one process.

    python -m benchmarks.untuned_costs                          # some ten minutes on two threads
    python -m benchmarks.untuned_costs --only "3,000" --rounds 2

All optimizers step in turn, in rounds of `BATCH` steps, so that each ratio is of times a second apart; a ratio is given
as the median over the rounds, with its 20th and 80th percentiles. Gradients are noise, drawn anew before each step
outside the clock, and a smaller fixed part, so that no basis ever settles and every renewal that may be due is made.
The first `WARM` steps, in which much is done once, do not count. "longest" is the longest step over the median one, of
those that nothing else has disturbed: of each step's place in the cycle of renewals the shortest over the rounds.
Matrices with very long sides are without SOAP, which takes minutes for one of its decompositions there. Last come whole
training steps of GPTs. Writes untuned_costs.md.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import lodo
from benchmarks.configs import shapes_of
from benchmarks.larger.gpt import WIDTHS, make_gpt, standard_library
from benchmarks.measuring import device_name, state_bytes
from benchmarks.meta_options import as_table, percentiles

WARM = 100
BATCH = 40  # steps of a round: a multiple of the interval between two renewals of a basis in the first 500
BATCH_SIZE, CONTEXT = 12, 64  # of the GPTs' training steps
SOAP_NAME = "SOAP, frequency 10"
Make = Callable[[list[Tensor]], Optimizer]
Shapes = Sequence[tuple[int, ...]]


def soap(params: list[Tensor]) -> Optimizer:
    from pytorch_optimizer import SOAP  # a large package, only where it is used

    return SOAP(params, lr=1e-3, precondition_frequency=10)


WAYS: dict[str, Make] = {
    "AdamW, fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    "AutoLODO": lambda params: lodo.AutoLODO(params),
    'AutoLODO, `base="adam"`': lambda params: lodo.AutoLODO(params, base="adam"),
    SOAP_NAME: soap,
}


LONG = {  # a million elements and four
    "a matrix of 4,096 x 256": [(4096, 256)],
    "an embedding of 65,536 x 64": [(65_536, 64)],
}


def models() -> dict[str, Shapes]:
    """Shapes of parameters, by a name."""
    found: dict[str, Shapes] = {
        "3,000 parameters": shapes_of(3_000),
        "95,000 parameters": shapes_of(95_000),
        "three matrices of 577 x 577": [(577, 577)] * 3,
    }
    for width in WIDTHS.values():
        shapes = [tuple(p.shape) for p in gpt(width).params]
        count = sum(torch.Size(shape).numel() for shape in shapes)
        found[f"a GPT of width {width}, {count:,} parameters"] = shapes
    return found | LONG


def gpt(width: int):  # type: ignore[no-untyped-def]
    return make_gpt(
        0, "cpu", standard_library(), width=width, depth=4, context=CONTEXT, batch_size=BATCH_SIZE, is_tied=False
    )


class Stepping:
    """An optimizer of a model, and the times of its steps in milliseconds, by rounds."""

    def __init__(self, make: Make, shapes: Shapes) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(0.02 * torch.randn(shape, generator=self.generator)) for shape in shapes]
        self.fixed = [torch.randn(shape, generator=self.generator) for shape in shapes]
        self.optimizer = make([*self.params])
        self.rounds: list[list[float]] = []

    def step(self) -> float:
        for param, fixed in zip(self.params, self.fixed, strict=True):
            param.grad = torch.randn(param.shape, generator=self.generator).add_(fixed, alpha=0.3)
        begun = time.perf_counter()
        self.optimizer.step()
        return 1000 * (time.perf_counter() - begun)

    def take_round(self) -> None:
        self.rounds.append([self.step() for _ in range(BATCH)])

    @property
    def means(self) -> list[float]:
        return [fmean(own) for own in self.rounds]

    @property
    def longest(self) -> float:
        undisturbed = [min(each) for each in zip(*self.rounds, strict=True)]
        return max(undisturbed) / median(undisturbed)


class Training:
    """The same of whole training steps of a GPT."""

    def __init__(self, make: Make, width: int) -> None:
        self.problem = gpt(width)
        self.optimizer = make([*self.problem.params])
        self.rounds: list[list[float]] = []

    def take_round(self) -> None:
        times = []
        for _ in range(BATCH // 4):
            begun = time.perf_counter()
            self.optimizer.zero_grad()
            self.problem.loss().backward()
            self.optimizer.step()
            times.append(1000 * (time.perf_counter() - begun))
        self.rounds.append(times)

    @property
    def means(self) -> list[float]:
        return [fmean(own) for own in self.rounds]


def ratio(own: Sequence[float], other: Sequence[float]) -> str:
    low, middle, high = percentiles([a / b for a, b in zip(own, other, strict=True)])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def steps_table(shapes: Shapes, rounds: int, has_soap: bool) -> str:
    found = {name: Stepping(make, shapes) for name, make in WAYS.items() if has_soap or name != SOAP_NAME}
    for each in found.values():
        for _ in range(WARM):
            each.step()
    for _ in range(rounds):
        for each in found.values():
            each.take_round()
    size = sum(torch.Size(shape).numel() for shape in shapes)
    adamw = found["AdamW, fused"].means
    lines = []
    for name, each in found.items():
        ratios = [ratio(each.means, adamw), ratio(each.means, found[SOAP_NAME].means) if has_soap else ""]
        memory = state_bytes(each.optimizer) / size
        lines.append((name, f"{median(each.means):.2f}", *ratios, f"{each.longest:.1f}", f"{memory:.1f}"))
    columns = ("", "step, ms", "of AdamW's", "of SOAP's", "longest", "state, bytes per parameter")
    return as_table(columns, lines)


def training_table(width: int, rounds: int) -> str:
    found = {name: Training(make, width) for name, make in WAYS.items()}
    for each in found.values():
        for _ in range(WARM // (BATCH // 4)):
            each.take_round()
        each.rounds.clear()
    for _ in range(rounds):
        for each in found.values():
            each.take_round()
    adamw = found["AdamW, fused"].means
    lines = [(name, f"{median(each.means):.1f}", ratio(each.means, adamw)) for name, each in found.items()]
    return as_table(("", "training step, ms", "of AdamW's"), lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    folder = Path(__file__).parent / "results" / "untuned_costs"
    parser.add_argument("--rounds", type=int, default=7, help="of the timing (default: 7)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--only", default="", metavar="TEXT", help="models with this in their names (default: all)")
    parser.add_argument("--out", type=Path, default=folder, metavar="DIR", help=f"(default: {folder})")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.threads) < 1:
        parser.error("--rounds and --threads must be at least 1")
    chosen = {name: shapes for name, shapes in models().items() if options.only in name}
    if not chosen:
        parser.error(f"--only must be part of one of {', '.join(models())}; got {options.only!r}")
    torch.set_num_threads(options.threads)
    parts = [
        "# What a step of the call without tuning costs",
        f"{device_name('cpu')}, {options.threads} threads, torch {torch.__version__}, {options.rounds} rounds of "
        f"{BATCH} steps after the first {WARM}. Ratios are medians over the rounds, with 20th and 80th percentiles.",
        "## Steps of the optimizer",
    ]
    for name, shapes in chosen.items():
        parts += [f"### {name[0].upper()}{name[1:]}", steps_table(shapes, options.rounds, name not in LONG)]
        print(parts[-2], parts[-1], sep="\n\n", flush=True)
    widths = [width for width in WIDTHS.values() if any(f"of width {width}," in name for name in chosen)]
    if widths:
        parts.append(f"## Training steps of GPTs, {BATCH_SIZE} windows of {CONTEXT} bytes")
    for width in widths:
        parts += [f"### Width {width}", training_table(width, options.rounds)]
        print(parts[-2], parts[-1], sep="\n\n", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "untuned_costs.md").write_text("\n\n".join(parts) + "\n")
    print(f"\nIn {options.out}.")


if __name__ == "__main__":
    main()
