"""What fraction of the copy bandwidth each Triton kernel reaches, and what it would have to move less to be faster.

    python -m benchmarks.kernel_limits                # on a GPU, at the size of ResNet-18: some 30 GB of its memory
    python -m benchmarks.kernel_limits --device cpu   # tries the script out, tiny, in Triton's interpreter

A LODO step is four passes over theta: two vectors up (g and m, for the hypergradient), the learning pass down, one
vector up and one down (G m). For each pass the table gives its time, the bytes that it must move (theta, moments,
vectors, indices, each once), the bandwidth that this makes, as a fraction of a copy's in the same run; and the share of
theta and its moments in those bytes, which is what the limit of the step counts. Memory is read by sectors of 32 bytes,
of which a gather at random uses 4 or 8: `with sectors` is the fraction with gathers counted so.
"""

import argparse
import csv
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from benchmarks.measuring import PASSES_PER_COPY, CopyProbe, device_name, device_software, left_out, time_calls
from lodo import inner_optimizer
from lodo.kernels import gpu

SECTOR = 32
SIZE, TINY = 11_173_962, 60  # ResNet-18


@dataclass(frozen=True)
class Case:
    """A network, and how its kernels are launched."""

    network: str
    permutation: str
    moments: torch.dtype
    is_paired: bool = True
    warps: int = gpu.WARPS

    @property
    def name(self) -> str:
        parts = [self.network, self.permutation, str(self.moments).removeprefix("torch.")]
        if self.permutation == "shuffle" and not self.is_paired:
            parts.append("layer by layer")
        if self.warps != gpu.WARPS:
            parts.append(f"{self.warps} warps")
        return ", ".join(parts)


CASES = (
    Case("full", "shuffle", torch.float32),
    Case("full", "shuffle", torch.bfloat16),
    Case("full", "shuffle", torch.float32, is_paired=False),
    Case("full", "shuffle", torch.float32, warps=8),
    Case("full", "random", torch.float32),
    Case("lean", "shuffle", torch.float32),
    Case("lean", "shuffle", torch.bfloat16),
    Case("lean", "random", torch.float32),
)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a pass must move."""

    theta: int  # and moments
    vectors: int
    indices: int
    wasted: int  # by random gathers, which use a part of each sector

    @property
    def needed(self) -> int:
        return self.theta + self.vectors + self.indices


@dataclass(frozen=True)
class Row:
    """A pass of a case: a line of the table."""

    case: str
    pass_: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    gigabytes: float
    theta_share: float
    fraction_of_copy: float
    with_sectors: float


class Bench:
    """The passes of one network, on tensors as an optimizer has them."""

    def __init__(self, case: Case, size: int, device: torch.device) -> None:
        depth, expansion, block = (16, 2, 4) if case.network == "full" else (4, 1, 4)
        self.case, self.size = case, size
        self.width = -(-expansion * size // block)
        self.dim, dim = block * self.width, block * self.width
        generator = torch.Generator(device).manual_seed(0)
        self.theta = torch.randn(depth, block, block, self.width, device=device, generator=generator).mul_(0.5)
        self.moments = (
            torch.zeros_like(self.theta, dtype=case.moments),
            torch.ones_like(self.theta, dtype=case.moments),
        )
        self.permutations, self.inverse = None, None
        if case.permutation == "random":
            rows = [torch.randperm(dim, device=device, dtype=torch.int32, generator=generator) for _ in range(depth)]
            self.permutations = torch.stack(rows)
            self.inverse = gpu.prepare(self.permutations, None)
        self.launches = gpu.Launches(self.theta, self.permutations)
        self.x = self.theta.new_empty(self.launches.slots, 2, dim).normal_(generator=generator)
        self.y = self.theta.new_empty(2, dim, 2).normal_(generator=generator) if self.launches.is_random else self.x
        self.v = torch.randn(size, device=device, generator=generator)
        self.single = self.theta.new_empty(2, dim).normal_(generator=generator)
        # A learning rate so small that theta stays what it is in any number of passes.
        self.rates = inner_optimizer.Rates(
            *(torch.tensor(number, device=device) for number in (1e-9, 0.1, 0.999, 1e-3, 5.0))
        )
        self.lr = torch.tensor(0.1, dtype=torch.float64, device=device)
        self.numbers = gpu.on_device(self.rates, self.lr, device)

    def passes(self) -> Iterator[tuple[str, Callable[[], Any], Traffic]]:
        """Name, call and traffic of each pass, and of the whole of them with what lies around."""
        run = self.launches
        learned = (self.theta, *self.moments)
        yield (
            "two vectors up",
            lambda: run.up(self.theta, self.x, self.y, self.permutations, self.numbers, vectors=2),
            self.traffic(vectors=2, kept=True),
        )
        yield (
            "learning, down",
            lambda: run.learn(learned, self.x, self.y, self.inverse, self.numbers, adam=True),
            self.traffic(vectors=2, kept=True, learning=True),
        )
        yield (
            "one vector up",
            lambda: run.up(self.theta, self.single, self.single, self.permutations, None, vectors=1),
            self.traffic(vectors=1),
        )
        yield (
            "one vector down",
            lambda: run.down(self.theta, self.single, self.inverse),
            self.traffic(vectors=1),
        )
        theta, moments = self.theta.nbytes, sum(moment.nbytes for moment in self.moments)
        yield "all four, and around", self.step, Traffic(5 * theta + 2 * moments, 0, 0, 0)

    def step(self) -> None:
        """The arithmetic of a step. Its needed bytes are those of the copy limit: theta and moments alone."""
        gpu.learn_(self.theta, self.moments, self.permutations, self.v, self.v, self.lr, self.rates, self.inverse)
        gpu.matvec(self.theta, self.permutations, self.v, self.inverse)

    def traffic(self, vectors: int, kept: bool = False, learning: bool = False) -> Traffic:
        """Of a pass: every stage reads its vectors and writes those of the next. A learning pass also reads the inputs
        that were kept on the way up, and writes theta and moments."""
        layers, number, vector = len(self.theta), self.theta.itemsize, self.dim * self.theta.itemsize
        stages = self.launches.pairs + len(self.launches.singles)
        theta = self.theta.nbytes
        if learning:
            theta = 2 * theta + 2 * sum(moment.nbytes for moment in self.moments)
        moved = vectors * vector * stages * (3 if learning else 2)
        if not self.launches.is_random:
            return Traffic(theta, moved, 0, 0)
        if kept and not learning:
            moved += vectors * vector * stages  # the permuted inputs, to be read on the way down
        wasted = stages * self.dim * (SECTOR - vectors * number)
        return Traffic(theta, moved, layers * self.dim * 4, wasted)


def measured(case: Case, size: int, device: torch.device, rounds: int, probe: CopyProbe) -> Iterator[Row]:
    """The rows of a case. Its passes take turns, each next to copies."""
    calls = 5 if rounds > 1 else 1
    paired = gpu.PAIRED if case.is_paired else {}
    with mock.patch.object(gpu, "PAIRED", paired), mock.patch.object(gpu, "WARPS", case.warps):
        passes = list(Bench(case, size, device).passes())
        for _, call, _ in passes:
            call()  # compiles
        times: dict[str, list[float]] = {name: [] for name, _, _ in passes}
        fractions: dict[str, list[float]] = {name: [] for name, _, _ in passes}
        for _ in range(rounds):
            for name, call, traffic in passes:
                ms = median(time_calls(call, calls, device.type))
                numbers = probe.source.numel()
                copy_ms = median(probe.limits(numbers, PASSES_PER_COPY))
                bandwidth = PASSES_PER_COPY * numbers * probe.source.itemsize / copy_ms
                times[name].append(ms)
                fractions[name].append(traffic.needed / ms / bandwidth)
    for name, _, traffic in passes:
        p20, p50, p80 = torch.tensor(times[name]).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        fraction = median(fractions[name])
        sectors = fraction * (traffic.needed + traffic.wasted) / traffic.needed
        share = traffic.theta / traffic.needed
        yield Row(case.name, name, p50, p20, p80, traffic.needed / 1e9, share, fraction, sectors)


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| network | pass | ms | p20 | p80 | GB | of it theta and moments | of copy bandwidth | with sectors |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        times = " | ".join(f"{ms:.3f}" for ms in (row.median_ms, row.p20_ms, row.p80_ms))
        shares = " | ".join(f"{share:.2f}" for share in (row.theta_share, row.fraction_of_copy, row.with_sectors))
        lines.append(f"| {row.case} | {row.pass_} | {times} | {row.gigabytes:.2f} | {shares} |")
    return "\n".join(lines)


def write(rows: Sequence[Row], size: int, device: str, folder: Path) -> None:
    """The table as Markdown and CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    software = " ".join(filter(None, (f"torch {torch.__version__}", device_software(device))))
    whole = [row for row in rows if row.pass_.startswith("all")]
    text = [
        f"# How near the kernels come to the memory's limit, n = {size:,}",
        f"{device_name(device)}, {software}",
        table(rows),
        "## Headlines",
        "\n".join(f"- {row.case}: {1 / row.fraction_of_copy:.2f} times the copy limit of a step" for row in whole),
    ]
    (folder / "kernel_limits.md").write_text("\n\n".join(text) + "\n")
    with (folder / "kernel_limits.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name.rstrip("_") for field in fields(Row))
        writer.writerows(astuple(row) for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    description = str(__doc__).splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_limits", description=description)
    parser.add_argument("--device", default="cuda", help="cuda (default), or cpu to try the script out")
    parser.add_argument("--size", type=lambda text: int(float(text)), help="number of parameters")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each pass gets")
    parser.add_argument("--only", default="", metavar="NAME", help="cases with this in their names")
    folder = Path(__file__).parent / "results" / "gpu"
    parser.add_argument("--out", type=Path, default=folder, help="folder of the table")
    args = parser.parse_args(argv)
    is_trial = args.device == "cpu"
    if is_trial:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    if gpu.code() is None:
        raise SystemExit("Triton is not installed: pip install triton")
    size = args.size or (TINY if is_trial else SIZE)
    rows: list[Row] = []
    probe = CopyProbe(size, torch.float32, args.device)
    for case in CASES:
        if args.only not in case.name:
            continue
        try:
            rows += measured(case, size, torch.device(args.device), 1 if is_trial else args.rounds, probe)
        except Exception as error:  # a compiler's too: the others are to be measured
            print(f"{case.name}: {left_out(error)}", flush=True)
        write(rows, size, args.device, args.out)
    print(table(rows))


if __name__ == "__main__":
    main()
