"""Time and memory of one optimizer step against the number of parameters n: LODO, its copy limit, and its peers.

    python -m benchmarks.step_time

The copy limit of a LODO network is what its arithmetic could cost at best: 9 passes over arrays of theta's size (read
and write theta, M and V in the inner update; read theta on the way forward, and in U and U^T of G m) at the bandwidth
of `Tensor.copy_`, which makes 2 passes; with bfloat16 moments, 7. It is measured right before and after each of LODO's
rounds. On CUDA a step is also replayed as a CUDA graph. See README.md.
"""

import argparse
import datetime
import gc
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.optim import Optimizer

import lodo
from benchmarks import report
from benchmarks.configs import FLOAT32, FLOAT64, Config, chosen, compiled, configs
from benchmarks.measuring import (
    COPY_NUMBERS,
    CopyProbe,
    PeakMemory,
    available_bytes,
    batch_of,
    captured,
    device_name,
    device_software,
    left_out,
    parameters_of,
    state_bytes,
    time_calls,
)
from lodo.kernels import gpu, native

SIZES = (100, 1_000, 10_000, 95_000, 100_000, 1_000_000, 10_000_000)
MEMORY_SIZE = 1_000_000  # where peak memory is measured on a CPU: large against what a process uses anyway
MEMORY_SHARE = 0.9  # of the available memory that may be planned for


@dataclass
class Run:
    """A configuration that is being measured.

    Attributes:
        call: takes a step: the optimizer's own, or the replay of a graph of it.
        peak: bytes of memory, where that is known here.
    """

    config: Config
    optimizer: Optimizer
    device: str
    call: Callable[[], Any]
    name: str
    step_ms: float = 0.0
    spent_ms: float = 0.0
    peak: float | None = None
    samples: list[list[float]] = field(default_factory=list)
    limits: list[list[float]] = field(default_factory=list)
    note: str = ""
    failed: bool = False

    @property
    def size(self) -> int:
        return sum(p.numel() for p in parameters_of(self.optimizer))

    @property
    def theta_numbers(self) -> int:
        if not isinstance(self.optimizer, lodo.LODO):
            return 0
        return sum(g.theta.numel() for g in self.optimizer.preconditioners if g is not None)

    def warm_up(self, seconds: float) -> bool:
        """The first step, which makes the state, and one whole cycle; False if the cycle takes longer than allowed."""
        with self.config.around():
            first = sum(time_calls(self.call, 1, self.device))
            if self.device != "cpu":
                self.call()  # kernels may be compiled again where a number has become another
            if self.config.around is compiled:
                self.note = f"first step {first / 1000:.0f} s with its compilation"
            times: list[float] = []
            wanted = max(3, self.config.cycle)
            while len(times) < wanted and sum(times) < 1000 * seconds:
                times += time_calls(self.call, 1, self.device)
        self.step_ms = sum(times) / len(times)
        if len(times) == wanted:
            return True
        self.note = f"left out: {len(times)} of {wanted} warm-up steps took {sum(times) / 1000:.0f} s"
        return False

    def round(self, probe: CopyProbe, repetitions: int, milliseconds: float) -> None:
        """Whole cycles of timed steps, as many as repetitions and time allow, between copies if LODO's."""
        batch = batch_of(self.step_ms, self.device, self.config.cycle)
        cycle = math.ceil(self.config.cycle / batch)  # in timed calls
        count = cycle * max(1, min(repetitions, int(milliseconds / self.step_ms / batch)) // cycle)
        limits = self._limits(probe)
        with self.config.around():
            self.call()
            times = time_calls(self.call, count, self.device, batch)
        self.samples.append(times)
        self.spent_ms += batch * sum(times)
        if self.theta_numbers:
            self.limits.append(limits + self._limits(probe))

    def _limits(self, probe: CopyProbe) -> list[float]:
        return probe.limits(self.theta_numbers, self.config.passes) if self.theta_numbers else []

    def notes(self) -> Iterator[str]:
        """What a reader must know about this run."""
        yield from filter(None, (self.config.note, self.note))
        if self.config.matrices_only:
            yield f"the {self.size:,} in 2-D parameters"
        if isinstance(self.optimizer, lodo.LODO):
            if self.device == "cpu" and self.config.around is nullcontext and native.library() is None:
                yield "no C++ kernels here: plain torch"
            with self.config.around():
                networks = [g for g in self.optimizer.preconditioners if g is not None]
                if self.device != "cpu" and not all(gpu.available(g.theta) for g in networks):
                    yield "plain torch"
            if self.optimizer.skipped_steps:
                yield f"{self.optimizer.skipped_steps} steps skipped"

    def figures(self) -> dict[str, float]:
        """Statistics pooled over the rounds; the ratio is the median of the rounds' own ratios."""
        pooled = torch.tensor([ms for times in self.samples for ms in times], dtype=FLOAT64)
        p20, p50, p80 = pooled.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=FLOAT64)).tolist()
        result = {"median_ms": p50, "p20_ms": p20, "p80_ms": p80, "mean_ms": pooled.mean().item()}
        result["state_bytes_per_param"] = state_bytes(self.optimizer) / self.size
        if self.peak is not None:
            result["peak_bytes_per_param"] = self.peak / self.size
        if self.limits:
            result["limit_ms"] = median(ms for times in self.limits for ms in times)
            pairs = zip(self.samples, self.limits, strict=True)
            result["ratio_to_limit"] = median(median(times) / median(limits) for times, limits in pairs)
            moved = self.config.passes * self.theta_numbers * parameters_of(self.optimizer)[0].element_size()
            result["copy_gb_per_s"] = moved / result["limit_ms"] / 1e6
        return result


# ---- memory ---------------------------------------------------------------------------------------------------------


def peak_per_param(config: Config, n: int, device: str) -> float:
    """Most bytes per parameter that making an optimizer and some steps take on top of what was in use before.

    For a fresh process, on Linux.
    """
    peak_of(config, 100, device)  # what is loaded once, whatever the size, is not counted
    return peak_of(config, n, device)


def peak_of(config: Config, n: int, device: str) -> float:
    """The same for the process as it is."""
    params = config.parameters(n, FLOAT32, device)
    memory = PeakMemory(device)
    optimizer = config.make(params)
    with config.around():
        for _ in range(3 if config.cycle == 1 else config.cycle + 2):
            optimizer.step()
    return memory.bytes() / sum(p.numel() for p in params)


def peak_elsewhere(config: Config, n: int, args: argparse.Namespace) -> float | None:
    """`peak_per_param` from a fresh process, None if it fails."""
    command = [sys.executable, "-m", "benchmarks.step_time", "--probe", config.name, "--sizes", str(n)]
    options = ["--threads", str(args.threads), "--device", args.device, *["--every-network"] * args.every_network]
    try:
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=900, check=True)
    except subprocess.SubprocessError:
        return None
    return float(done.stdout.split()[-1])


def room_for_numbers(n: int, dtype: torch.dtype, device: str) -> float:
    """How many numbers the configurations measured at a time may need, beside the arrays that are copied."""
    copied = min(COPY_NUMBERS, 128 * n) if device == "cpu" else COPY_NUMBERS
    return MEMORY_SHARE * available_bytes(device) / dtype.itemsize - 2 * copied


def batches(wanted: Sequence[Config], n: int, dtype: torch.dtype, device: str) -> Iterator[list[Config]]:
    """Groups of configurations that fit into memory together. The estimate is compared again for each."""
    waiting = list(wanted)
    while waiting:
        room = room_for_numbers(n, dtype, device)
        batch = [waiting.pop(0)]
        while waiting and n * sum(config.numbers for config in (*batch, waiting[0])) <= room:
            batch.append(waiting.pop(0))
        yield batch


# ---- the run --------------------------------------------------------------------------------------------------------


def start(config: Config, n: int, dtype: torch.dtype, args: argparse.Namespace) -> tuple[list[Run], dict[str, Any]]:
    """The runs of a configuration after their warm-up, and notes on those left out, by name."""
    runs: list[Run] = []
    name = config.name
    graphs = config.graph and args.device != "cpu"
    try:
        params = config.parameters(n, dtype, args.device)
        memory = PeakMemory(args.device) if args.device != "cpu" else None
        optimizer = config.make(params)
        run = Run(config, optimizer, args.device, optimizer.step, name)
        fits = run.warm_up(args.seconds)
        run.peak = memory.bytes() if memory else None
        if not fits:
            return [], {name: {"note": run.note}}
        runs.append(run)
        if graphs and memory:
            name += report.GRAPH
            memory.restart()
            with config.around():
                graph = captured(optimizer.step)
            replayed = Run(config, optimizer, args.device, graph.replay, name)
            replayed.warm_up(args.seconds)
            replayed.peak = memory.bytes()
            runs.append(replayed)
    except Exception as error:  # a compiler's too: the others are to be measured
        return runs, {name: {"note": left_out(error)}}
    return runs, {}


def measure(batch: Sequence[Config], n: int, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Figures and notes of the configurations of one batch, by name. Their rounds take turns."""
    results: dict[str, dict[str, Any]] = {}
    runs: list[Run] = []
    for config in batch:
        started, notes = start(config, n, dtype, args)
        runs += started
        results |= notes
    probe = CopyProbe(max((run.theta_numbers for run in runs), default=0), dtype, args.device)
    for index in range(args.rounds):
        for run in runs:
            left = 1000 * args.seconds - run.spent_ms
            if left > 0 and not run.failed:
                try:
                    run.round(probe, args.repetitions, left / (args.rounds - index))
                except Exception as error:
                    run.failed, run.note = True, left_out(error)
    for run in runs:
        results[run.name] = {"note": run.note} if run.failed else {**run.figures(), "note": "; ".join(run.notes())}
    return results


def measure_size(n: int, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Figures and notes of all configurations at one size, by name, in their order."""
    wanted = [config for config in configs(args.compile, args.device, args.every_network) if chosen(config, n, dtype)]
    wanted = [config for config in wanted if any(name in config.name for name in args.only)]
    suffixes = ("", report.GRAPH)  # for an order in which graphs follow what they are of
    results: dict[str, dict[str, Any]] = {config.name + suffix: {} for config in wanted for suffix in suffixes}
    runnable = []
    for config in wanted:
        needed, room = config.numbers * n, room_for_numbers(n, dtype, args.device)
        if n > config.max_n:
            results[config.name] = {"note": f"left out: measured up to n = {config.max_n:,} only"}
        elif needed > room:
            needed_gb, room_gb = (numbers * dtype.itemsize / 1e9 for numbers in (needed, room))
            results[config.name] = {"note": f"left out: needs about {needed_gb:.1f} GB, {room_gb:.1f} GB are free"}
        else:
            runnable.append(config)
    for batch in batches(runnable, n, dtype, args.device):
        results |= measure(batch, n, dtype, args)
        gc.collect()
        torch.cuda.empty_cache()
    if args.device == "cpu" and dtype == FLOAT32 and n == MEMORY_SIZE:
        for config in runnable:
            if "median_ms" in results[config.name]:
                results[config.name]["peak_bytes_per_param"] = peak_elsewhere(config, n, args)
    return {name: figures for name, figures in results.items() if figures}


def rows_at(n: int, dtype: torch.dtype, args: argparse.Namespace) -> list[report.Row]:
    machine: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "cpu": device_name(args.device),
        "software": device_software(args.device),
        "threads": args.threads,
        "n": n,
        "dtype": str(dtype).removeprefix("torch."),
    }
    results = measure_size(n, dtype, args)
    return [report.Row(optimizer=name, **machine, **figures) for name, figures in results.items()]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_time", description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--sizes", type=lambda text: int(float(text)), nargs="+", default=list(SIZES), help="numbers of parameters"
    )
    parser.add_argument("--max-n", type=lambda text: int(float(text)), default=None, help="leave out larger sizes")
    parser.add_argument("--rounds", type=int, default=7, help="turns that each optimizer gets")
    parser.add_argument("--repetitions", type=int, default=30, help="timed steps per round, at most")
    parser.add_argument("--seconds", type=float, default=30.0, help="time budget of one optimizer at one size")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no further size is begun")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--compile", action="store_true", help="add LODO's plain path under torch.compile (slow)")
    parser.add_argument(
        "--every-network",
        action="store_true",
        help="full and lean, either permutation, either kind of moments; always on cuda",
    )
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="optimizers with these in their names")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--probe", help=argparse.SUPPRESS)  # prints `peak_per_param` of this optimizer
    args = parser.parse_args(argv)
    args.every_network |= args.device != "cpu"
    args.max_n = args.max_n or (max(args.sizes) if args.every_network else SIZES[-1])
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    begin = time.monotonic()
    torch.set_num_threads(args.threads)
    if args.probe:
        known = configs(True, args.device, args.every_network)
        config = next(config for config in known if config.name == args.probe)
        print(peak_per_param(config, args.sizes[0], args.device))
        return
    kinds = [(100, FLOAT64)] * (100 in args.sizes) + [(n, FLOAT32) for n in args.sizes if n <= args.max_n]
    rows: list[report.Row] = []
    for n, dtype in kinds:
        if time.monotonic() - begin > args.budget:
            print(f"n = {n:,}, {dtype} left out: {args.budget:g} seconds have passed", file=sys.stderr)
            continue
        print(f"n = {n:,}, {dtype} ...", file=sys.stderr, flush=True)
        rows += rows_at(n, dtype, args)
        rows.sort(key=lambda row: row.n)
        report.write(rows, report.command_of(args), args.out)
    print(report.table(rows), "", *report.headlines(rows), sep="\n")


if __name__ == "__main__":
    main()
