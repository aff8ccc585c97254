"""Time and memory of one optimizer step against the number of parameters n: LODO, its copy limit, and its peers.

    python -m benchmarks.step_time

The copy limit of a LODO network is what its arithmetic could cost at best: 9 passes over arrays of theta's size (read
and write theta, M and V in the inner update; read theta on the way forward, and in U and U^T of G m) at the bandwidth
of `Tensor.copy_`, which makes 2 passes. It is measured right before and after each of LODO's rounds. See README.md.
"""

import argparse
import datetime
import functools
import gc
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim import Optimizer

import lodo
from benchmarks import report
from lodo import meta
from lodo.kernels import native, reference

SIZES = (100, 1_000, 10_000, 95_000, 100_000, 1_000_000, 10_000_000)
PASSES_PER_STEP, PASSES_PER_COPY = 9, 2
COPY_NUMBERS = 1 << 27  # longest array that is copied; far beyond every cache, so longer ones cost in proportion
COPIES = 7  # timed on either side of a round
MEMORY_SIZE = 1_000_000  # where peak memory is measured: large against what a process uses anyway
MEMORY_SHARE = 0.9  # of the available memory that may be planned for
FLOAT32, FLOAT64 = torch.float32, torch.float64


@dataclass(frozen=True)
class Config:
    """An optimizer in one setting.

    Attributes:
        numbers: estimate of all it needs per parameter, in numbers of the parameter's dtype, to judge what fits.
        cycle: steps after which its cost repeats.
        max_n: largest size at which it runs.
        around: entered around its steps.
    """

    name: str
    make: Callable[[list[Tensor]], Optimizer]
    numbers: float
    cycle: int = 1
    max_n: int = SIZES[-1]
    matrices_only: bool = False
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    note: str = ""

    def parameters(self, n: int, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Fixed parameters and gradients: of a small MLP in float32, of one vector, as in the paper, in float64."""
        shapes = shapes_of(n) if dtype == FLOAT32 else [(n,)]
        generator = torch.Generator().manual_seed(0)
        params = []
        for shape in shapes:
            if len(shape) == 2 or not self.matrices_only:
                p = torch.randn(shape, dtype=dtype, generator=generator).mul_(0.02).to(device).requires_grad_()
                p.grad = torch.randn(shape, dtype=dtype, generator=generator).mul_(0.01).to(device)
                params.append(p)
        return params


def shapes_of(n: int) -> list[tuple[int, ...]]:
    """Exactly n parameters: a classifier of MNIST's 784 pixels at the paper's size, else three nearly square linear
    layers with biases; and a vector for the remainder."""
    if n == report.PAPER_SIZE:
        return [(112, 784), (112,), (56, 112), (56,), (10, 56), (10,), (182,)]
    width = max(1, math.isqrt(n // 3))
    last = (n - 2 * width * (width + 1)) // (width + 1)
    rest = n - 2 * width * (width + 1) - last * (width + 1)
    shapes: list[tuple[int, ...]] = [(width, width), (width,), (width, width), (width,), (last, width), (last,)]
    return shapes + [(rest,)] * (rest > 0)


# ---- the optimizers -------------------------------------------------------------------------------------------------


def lodo_config(name: str, depth: int, expansion: int, permutation: str, **more: Any) -> Config:
    """LODO with its learning rates so small that fixed gradients lead nowhere in any number of steps."""
    make = functools.partial(
        lodo.LODO, lr=1e-4, meta_lr=1e-6, depth=depth, expansion=expansion, permutation=permutation
    )
    theta, padded = 4 * depth * expansion, expansion
    numbers = 3 * theta + 2 * padded * (depth + 2) + padded * depth * (permutation == "random") + 6
    return Config(name, make, numbers + (64 if "around" in more else 0), **more)  # plain torch needs more


def plain_torch() -> AbstractContextManager[Any]:
    return mock.patch.dict(os.environ, LODO_NATIVE="0")


@functools.cache
def compiled_functions() -> dict[str, Any]:
    names = ("learn_", "matvec")
    made = {name: torch.compile(getattr(reference, name), dynamic=False, fullgraph=True) for name in names}

    def learn_(theta: Tensor, moments: Any, indices: Any, g: Tensor, m: Tensor, lr: Any, rates: meta.Rates) -> None:
        # As tensors: a number that changes at every step would be compiled in at every step.
        lr, *numbers = (torch.as_tensor(number, dtype=theta.dtype) for number in (lr, *rates))
        made["learn_"](theta, moments, indices, g, m, lr, meta.Rates(*numbers))

    return made | {"learn_": learn_}


@contextmanager
def compiled() -> Iterator[None]:
    with plain_torch(), mock.patch.multiple(reference, **compiled_functions()):
        yield


def soap(params: list[Tensor]) -> Optimizer:
    from pytorch_optimizer import SOAP

    optimizer: Optimizer = SOAP(params, lr=1e-4, precondition_frequency=10)
    return optimizer


def shampoo(params: list[Tensor]) -> Optimizer:
    from pytorch_optimizer import ScalableShampoo

    # Without shape_interpretation, which would merge the dimensions of small matrices and leave them to plain SGD.
    optimizer: Optimizer = ScalableShampoo(
        params, lr=1e-4, preconditioning_compute_steps=10, shape_interpretation=False
    )
    return optimizer


def configs(compile_too: bool, device: str) -> list[Config]:
    full = [
        lodo_config(report.FULL_SHUFFLE, 16, 2, "shuffle"),
        lodo_config(report.FULL_RANDOM, 16, 2, "random"),
        lodo_config(report.LEAN, 4, 1, "shuffle", note="depth 4, expansion 1, shuffle"),
    ]
    if device == "cpu":  # elsewhere all of LODO runs the plain path
        full.append(lodo_config(report.PLAIN, 16, 2, "random", around=plain_torch, max_n=1_000_000))
    if compile_too:
        more = {"around": compiled, "max_n": report.PAPER_SIZE}
        full.append(lodo_config(report.COMPILED_SHUFFLE, 16, 2, "shuffle", **more))
        full.append(lodo_config(report.COMPILED_RANDOM, 16, 2, "random", **more))
    return [
        *full,
        Config(report.ADAMW, functools.partial(torch.optim.AdamW, lr=1e-4, fused=True), 6),
        Config(report.MUON, functools.partial(torch.optim.Muon, lr=1e-4), 8, matrices_only=True),
        Config(report.SOAP, soap, 20, cycle=10, note="precondition_frequency 10"),
        Config(report.SHAMPOO, shampoo, 20, cycle=10, note="ScalableShampoo, preconditioning_compute_steps 10"),
    ]


def chosen(config: Config, n: int, dtype: torch.dtype) -> bool:
    """Whether a configuration is asked about at a size: torch.compile at two only, the peers in float32."""
    if config.around is compiled:
        return (n, dtype) in ((report.PAPER_SIZE, FLOAT32), (100, FLOAT64))
    return dtype == FLOAT32 or config.name not in (report.MUON, report.SOAP, report.SHAMPOO)


# ---- measuring ------------------------------------------------------------------------------------------------------


def time_calls(function: Callable[[], Any], count: int, device: str) -> list[float]:
    """Milliseconds of each of `count` calls."""
    if device == "cpu":
        marks = [time.perf_counter()]
        for _ in range(count):
            function()
            marks.append(time.perf_counter())
        return [1000 * (end - begin) for begin, end in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]


class CopyProbe:
    """Times the copy limit of networks up to a size."""

    def __init__(self, numbers: int, dtype: torch.dtype, device: str) -> None:
        self.device = device
        self.source = torch.ones(min(numbers, COPY_NUMBERS), dtype=dtype, device=device)
        self.target = torch.zeros_like(self.source)

    def limits(self, numbers: int) -> list[float]:
        """Milliseconds of the copy limit for theta of so many numbers, several times."""
        source, target = self.source[:numbers], self.target[:numbers]
        target.copy_(source)
        scale = PASSES_PER_STEP / PASSES_PER_COPY * numbers / source.numel()
        return [scale * ms for ms in time_calls(lambda: target.copy_(source), COPIES, self.device)]


@dataclass
class Run:
    """A configuration that is being measured."""

    config: Config
    optimizer: Optimizer
    device: str
    step_ms: float = 0.0
    spent_ms: float = 0.0
    samples: list[list[float]] = field(default_factory=list)
    limits: list[list[float]] = field(default_factory=list)
    note: str = ""

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
            first = sum(time_calls(self.optimizer.step, 1, self.device))
            if self.config.around is compiled:
                self.note = f"first step {first / 1000:.0f} s with its compilation"
            times: list[float] = []
            wanted = max(3, self.config.cycle)
            while len(times) < wanted and sum(times) < 1000 * seconds:
                times += time_calls(self.optimizer.step, 1, self.device)
        self.step_ms = sum(times) / len(times)
        if len(times) == wanted:
            return True
        self.note = f"left out: {len(times)} of {wanted} warm-up steps took {sum(times) / 1000:.0f} s"
        return False

    def round(self, probe: CopyProbe, repetitions: int, milliseconds: float) -> None:
        """Whole cycles of timed steps, as many as repetitions and time allow, between copies if LODO's."""
        cycle = self.config.cycle
        count = cycle * max(1, min(repetitions, int(milliseconds / self.step_ms)) // cycle)
        limits = probe.limits(self.theta_numbers) if self.theta_numbers else []
        with self.config.around():
            self.optimizer.step()
            times = time_calls(self.optimizer.step, count, self.device)
        self.samples.append(times)
        self.spent_ms += sum(times)
        if self.theta_numbers:
            self.limits.append(limits + probe.limits(self.theta_numbers))

    def notes(self) -> Iterator[str]:
        """What a reader must know about this run."""
        yield from filter(None, (self.config.note, self.note))
        if self.config.matrices_only:
            yield f"the {self.size:,} in 2-D parameters"
        if isinstance(self.optimizer, lodo.LODO):
            if self.device == "cpu" and self.config.around is nullcontext and native.library() is None:
                yield "no C++ kernels here: plain torch"
            if self.optimizer.skipped_steps:
                yield f"{self.optimizer.skipped_steps} steps skipped"

    def figures(self) -> dict[str, float]:
        """Statistics pooled over the rounds; the ratio is the median of the rounds' own ratios."""
        pooled = torch.tensor([ms for times in self.samples for ms in times], dtype=FLOAT64)
        p20, p50, p80 = pooled.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=FLOAT64)).tolist()
        result = {"median_ms": p50, "p20_ms": p20, "p80_ms": p80, "mean_ms": pooled.mean().item()}
        result["state_bytes_per_param"] = state_bytes(self.optimizer) / self.size
        if self.limits:
            result["limit_ms"] = median(ms for times in self.limits for ms in times)
            pairs = zip(self.samples, self.limits, strict=True)
            result["ratio_to_limit"] = median(median(times) / median(limits) for times, limits in pairs)
        return result


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors that a value holds: in containers, and in the attributes of plain objects."""
    if isinstance(value, Tensor):
        yield value
    elif not isinstance(value, int | type):  # enumerations lead to their types, and types anywhere
        inside = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        for item in value if isinstance(value, list | tuple) else inside.values():
            yield from tensors_in(item)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the state, shared storage counted once, without the parameters that an optimizer may refer to."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(dict(optimizer.state))}
    for p in parameters_of(optimizer):
        storages.pop(p.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


# ---- memory ---------------------------------------------------------------------------------------------------------


def available_bytes(device: str) -> float:
    """Memory that is free to use; infinite where the system does not tell."""
    if device != "cpu":
        return float(torch.cuda.mem_get_info()[0])
    try:
        return 1024 * proc_kilobytes("/proc/meminfo", "MemAvailable")
    except OSError:
        return math.inf


def proc_kilobytes(path: str, name: str) -> float:
    lines = Path(path).read_text().splitlines()
    return float(next(line for line in lines if line.startswith(name + ":")).split()[1])


def peak_per_param(config: Config, n: int, device: str) -> float:
    """Most bytes per parameter that making an optimizer and some steps take on top of what was in use before.

    For a fresh process, on Linux.
    """
    peak_of(config, 100, device)  # what is loaded once, whatever the size, is not counted
    return peak_of(config, n, device)


def peak_of(config: Config, n: int, device: str) -> float:
    """The same for the process as it is."""
    params = config.parameters(n, FLOAT32, device)
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        before = 1024 * proc_kilobytes("/proc/self/status", "VmRSS")
    else:
        torch.cuda.reset_peak_memory_stats()
        before = float(torch.cuda.memory_allocated())
    optimizer = config.make(params)
    with config.around():
        for _ in range(3 if config.cycle == 1 else config.cycle + 2):
            optimizer.step()
    if device == "cpu":  # not ru_maxrss, which a process inherits from the one that started it
        peak = 1024 * proc_kilobytes("/proc/self/status", "VmHWM")
    else:
        peak = float(torch.cuda.max_memory_allocated())
    return (peak - before) / sum(p.numel() for p in params)


def peak_elsewhere(config: Config, n: int, args: argparse.Namespace) -> float | None:
    """`peak_per_param` from a fresh process, None if it fails."""
    command = [sys.executable, "-m", "benchmarks.step_time", "--probe", config.name, "--sizes", str(n)]
    options = ["--threads", str(args.threads), "--device", args.device]
    try:
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=900, check=True)
    except subprocess.SubprocessError:
        return None
    return float(done.stdout.split()[-1])


def room_for_numbers(n: int, dtype: torch.dtype, device: str) -> float:
    """How many numbers the configurations measured at a time may need, beside the arrays that are copied."""
    return MEMORY_SHARE * available_bytes(device) / dtype.itemsize - 2 * min(COPY_NUMBERS, 128 * n)


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


def measure(batch: Sequence[Config], n: int, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Figures and notes of the configurations of one batch, by name. Their rounds take turns."""
    results: dict[str, dict[str, Any]] = {}
    runs: list[Run] = []
    for config in batch:
        try:
            run = Run(config, config.make(config.parameters(n, dtype, args.device)), args.device)
            fits = run.warm_up(args.seconds)
        except (ImportError, RuntimeError) as error:
            results[config.name] = {"note": f"left out: {str(error).splitlines()[0][:100]}"}
            continue
        if fits:
            runs.append(run)
        else:
            results[config.name] = {"note": run.note}
    probe = CopyProbe(max((run.theta_numbers for run in runs), default=0), dtype, args.device)
    for index in range(args.rounds):
        for run in runs:
            left = 1000 * args.seconds - run.spent_ms
            if left > 0:
                run.round(probe, args.repetitions, left / (args.rounds - index))
    return results | {run.config.name: {**run.figures(), "note": "; ".join(run.notes())} for run in runs}


def measure_size(n: int, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Figures and notes of all configurations at one size, by name, in their order."""
    wanted = [config for config in configs(args.compile, args.device) if chosen(config, n, dtype)]
    wanted = [config for config in wanted if any(name in config.name for name in args.only)]
    results: dict[str, dict[str, Any]] = {config.name: {} for config in wanted}
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
    if dtype == FLOAT32 and n == MEMORY_SIZE:
        for config in runnable:
            if "median_ms" in results[config.name]:
                results[config.name]["peak_bytes_per_param"] = peak_elsewhere(config, n, args)
    return results


def rows_at(n: int, dtype: torch.dtype, args: argparse.Namespace) -> list[report.Row]:
    machine: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "cpu": report.device_name(args.device),
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
    parser.add_argument("--max-n", type=lambda text: int(float(text)), default=SIZES[-1], help="leave out larger sizes")
    parser.add_argument("--rounds", type=int, default=7, help="turns that each optimizer gets")
    parser.add_argument("--repetitions", type=int, default=30, help="timed steps per round, at most")
    parser.add_argument("--seconds", type=float, default=30.0, help="time budget of one optimizer at one size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--compile", action="store_true", help="add LODO's plain path under torch.compile (slow)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="optimizers with these in their names")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--probe", help=argparse.SUPPRESS)  # prints `peak_per_param` of this optimizer
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if args.probe:
        config = next(config for config in configs(True, args.device) if config.name == args.probe)
        print(peak_per_param(config, args.sizes[0], args.device))
        return
    kinds = [(100, FLOAT64)] * (100 in args.sizes) + [(n, FLOAT32) for n in args.sizes if n <= args.max_n]
    rows: list[report.Row] = []
    for n, dtype in kinds:
        print(f"n = {n:,}, {dtype} ...", file=sys.stderr, flush=True)
        rows += rows_at(n, dtype, args)
        report.write(rows, report.command_of(args), args.out)
    print(report.table(rows), "", *report.headlines(rows), sep="\n")


if __name__ == "__main__":
    main()
