"""Training steps per second, forward and backward pass included: LODO beside AdamW, SGD with momentum and SOAP.

    python -m benchmarks.training_throughput --device cuda

Two networks of the paper: the 95k-parameter image generator at a batch of 256, and ResNet-18 at a batch of 2048 in
bfloat16 autocast; on random images, for nothing here depends on what the images show. On CUDA each is also run with
the whole training step replayed as a CUDA graph. See README.md.
"""

import argparse
import datetime
import functools
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import lodo
from benchmarks import report
from benchmarks.configs import drawn_on_device, soap
from benchmarks.measuring import PeakMemory, captured, device_name, device_software, left_out, state_bytes, time_calls
from benchmarks.training_report import Row, markdown, write
from examples.image_data import CLASSES
from examples.paper.tasks import image_classification
from examples.paper.tasks.image_generation import SIDE, ImageGenerator, inputs

Batch = tuple[Tensor, Tensor]
BATCHES = 4  # that take turns
TINY_WIDTHS = (4, 4, 8, 8)
EAGER, GRAPH = "eager", "graph"


# ---- what is trained ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A network, and batches for it.

    Attributes:
        make: the network, on the CPU.
        batches: inputs and classes, on a device.
        lrs: for LODO, AdamW, SGD, SOAP: sound ones, not tuned ones.
    """

    name: str
    make: Callable[[], nn.Module]
    batches: Callable[[str], list[Batch]]
    lrs: dict[str, float]
    autocast: bool = False


def workloads(tiny: bool) -> list[Workload]:
    few, many = (8, 4) if tiny else (256, 2048)
    widths = TINY_WIDTHS if tiny else image_classification.WIDTHS
    lrs = {"AdamW": 1e-3, "SGD": 1e-2, "SOAP": 1e-3}
    generator = Workload(
        f"image generator, batch {few}",
        lambda: ImageGenerator(torch.Generator().manual_seed(0)),
        functools.partial(generation_batches, few),
        lrs | {"LODO": 1e-1},
    )
    classifier = Workload(
        f"{'narrow ' * tiny}ResNet-18, batch {many}, bfloat16",
        functools.partial(resnet, widths),
        functools.partial(classification_batches, many),
        lrs | {"LODO": 1e-2},
        autocast=True,
    )
    return [generator, classifier]


def resnet(widths: Sequence[int]) -> nn.Module:
    with mock.patch.object(image_classification, "WIDTHS", widths):
        model = image_classification.ResNet18(torch.Generator().manual_seed(0))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def generation_batches(size: int, device: str) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(BATCHES):
        images = torch.randint(256, (size, SIDE, SIDE), dtype=torch.uint8, generator=generator).to(device)
        positions = torch.randint(SIDE**2, (size,), generator=generator).to(device)
        values = images.flatten(1).gather(1, positions[:, None])[:, 0].long()
        made.append((inputs(images, positions).float(), values))
    return made


def classification_batches(size: int, device: str) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(BATCHES):
        images = torch.randn(size, 3, 32, 32, generator=generator).to(device, memory_format=torch.channels_last)
        made.append((images, torch.randint(CLASSES, (size,), generator=generator).to(device)))
    return made


class Trainer:
    """Training on a few batches in turn, which lie on the device: no step waits for data.

    Attributes:
        loss: of the last step, a tensor on the device.
    """

    def __init__(self, workload: Workload, make: Callable[..., Optimizer], lr: float, device: str) -> None:
        self.model = workload.make().to(device)
        self.optimizer = make(self.model.parameters(), lr=lr)
        self.loss = torch.zeros((), device=device)
        self._autocast = torch.autocast(device, torch.bfloat16, enabled=workload.autocast)
        self._batches = workload.batches(device)
        self._x, self._y = (tensor.clone() for tensor in self._batches[0])  # a graph reads from a fixed place
        self._turn = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def next_batch(self) -> None:
        self._turn = (self._turn + 1) % BATCHES
        x, y = self._batches[self._turn]
        self._x.copy_(x)
        self._y.copy_(y)

    def train(self) -> None:
        """zero_grad, forward, backward, step."""
        self.optimizer.zero_grad()
        with self._autocast:
            logits = self.model(self._x)
        loss = F.cross_entropy(logits.float(), self._y)
        loss.backward()
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def eager(self) -> None:
        self.next_batch()
        self.train()

    def capture(self, pool: Any) -> None:
        self._graph = captured(self.train, pool)

    def replay(self) -> None:
        assert self._graph is not None
        self.next_batch()
        self._graph.replay()


# ---- optimizers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """An optimizer in one setting; `lr` names its learning rate among the workload's."""

    name: str
    lr: str
    make: Callable[..., Optimizer]
    graph: bool = True


def entries() -> list[Entry]:
    """AdamW first: the others are compared with it."""

    def network(name: str, depth: int, expansion: int, permutation: str, **more: Any) -> Entry:
        options: dict[str, Any] = {
            "depth": depth,
            "expansion": expansion,
            "permutation": permutation,
            "capturable": True,
        }
        return Entry(name, "LODO", functools.partial(lodo.LODO, **options, **more))

    return [
        Entry(report.ADAMW, "AdamW", functools.partial(torch.optim.AdamW, fused=True, capturable=True)),
        Entry("SGD with momentum, fused", "SGD", functools.partial(torch.optim.SGD, momentum=0.9, fused=True)),
        network(report.LEAN_SHUFFLE, 4, 1, "shuffle"),
        network(report.LEAN_SHUFFLE + report.BFLOAT16, 4, 1, "shuffle", meta_state_dtype="bfloat16"),
        network(report.FULL_SHUFFLE, 16, 2, "shuffle"),
        network(report.FULL_RANDOM, 16, 2, "random"),
        network(report.FULL_SHUFFLE + ", meta_every 4", 16, 2, "shuffle", meta_every=4),
        Entry(report.SOAP, "SOAP", soap, graph=False),
    ]


# ---- measuring ------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """An optimizer on a workload, eager or as a graph."""

    entry: Entry
    mode: str
    trainer: Trainer
    device: str
    peak: float | None = None
    first_loss: float = math.nan
    step_ms: float = 0.0
    samples: list[float] = field(default_factory=list)  # milliseconds of a step, one for each round

    def around(self) -> AbstractContextManager[Any]:
        return drawn_on_device() if self.entry.lr == "LODO" else nullcontext()

    @property
    def call(self) -> Callable[[], None]:
        return self.trainer.eager if self.mode == EAGER else self.trainer.replay

    def warm_up(self) -> None:
        with self.around():
            self.call()
            if self.mode == EAGER:
                self.first_loss = float(self.trainer.loss)
            for _ in range(2):
                self.call()
        self.step_ms = median(time_calls(self.call, 3, self.device))

    def round(self, milliseconds: float) -> None:
        """One step that is not timed, then as many as fit into the time."""
        steps = max(1, int(milliseconds / self.step_ms))
        if self.entry.name == report.SOAP:
            steps = 10 * math.ceil(steps / 10)  # its preconditioner's period
        self.call()
        self.samples += time_calls(self.call, 1, self.device, batch=steps)


def start(workload: Workload, entry: Entry, device: str, pool: Any) -> tuple[list[Run], dict[str, str]]:
    """The runs of an optimizer after their warm-up, and why others were left out, by mode."""
    runs: list[Run] = []
    mode = EAGER
    try:
        memory = PeakMemory(device) if device != "cpu" else None
        trainer = Trainer(workload, entry.make, workload.lrs[entry.lr], device)
        runs.append(_warm(Run(entry, mode, trainer, device), memory))
        if memory and entry.graph:
            mode = GRAPH
            memory.restart()
            trainer.capture(pool)
            runs.append(_warm(Run(entry, mode, trainer, device, first_loss=runs[0].first_loss), memory))
    except Exception as error:  # a compiler's too: the others are to be measured
        return runs, {mode: left_out(error)}
    return runs, {}


def _warm(run: Run, memory: PeakMemory | None) -> Run:
    run.warm_up()
    run.peak = memory.bytes() if memory else None
    return run


def measure(workload: Workload, args: argparse.Namespace, seconds: float) -> list[Row]:
    """All optimizers on one network. Their rounds take turns, as many as the time allows."""
    begin = time.monotonic()
    pool = torch.cuda.graph_pool_handle() if args.device != "cpu" else None
    runs: list[Run] = []
    notes: dict[tuple[str, str], str] = {}
    for entry in entries():
        if any(name in entry.name for name in args.only):
            started, missing = start(workload, entry, args.device, pool)
            runs += started
            notes |= {(entry.name, mode): note for mode, note in missing.items()}
            gc.collect()
            torch.cuda.empty_cache()
    rounds = 0
    while runs and rounds < args.rounds and (rounds < 1 or time.monotonic() - begin < seconds):
        left = max(0.0, seconds - (time.monotonic() - begin)) / (args.rounds - rounds)
        for run in list(runs):
            try:
                run.round(min(1000 * left / len(runs), args.milliseconds))
            except Exception as error:
                runs.remove(run)
                notes[run.entry.name, run.mode] = left_out(error)
        rounds += 1
    params = sum(p.numel() for p in runs[0].trainer.model.parameters()) if runs else 0
    return list(rows_of(workload, params, runs, notes, args))


def rows_of(
    workload: Workload, params: int, runs: Sequence[Run], notes: dict[tuple[str, str], str], args: argparse.Namespace
) -> Iterator[Row]:
    made = functools.partial(
        Row,
        datetime.datetime.now(datetime.UTC).date().isoformat(),
        torch.__version__,
        device_name(args.device),
        device_software(args.device),
        workload.name,
        params,
    )
    for mode in (EAGER, GRAPH):
        reference = next((run for run in runs if (run.entry.name, run.mode) == (report.ADAMW, mode)), None)
        for entry in entries():
            for run in runs:
                if (run.entry.name, run.mode) == (entry.name, mode):
                    yield made(entry.name, mode, **figures(run, reference, params))
            if (entry.name, mode) in notes:
                yield made(entry.name, mode, note=notes[entry.name, mode])


def figures(run: Run, reference: Run | None, params: int) -> dict[str, Any]:
    """Medians and spreads over the rounds; a ratio is to AdamW in the same round and mode."""
    result: dict[str, Any] = {}
    speeds = [1000 / ms for ms in run.samples]
    result["p20_steps_per_s"], result["steps_per_s"], result["p80_steps_per_s"] = quantiles(speeds)
    if reference:
        ratios = [other / ms for ms, other in zip(run.samples, reference.samples, strict=True)]
        result["p20_ratio"], result["ratio_to_adamw"], result["p80_ratio"] = quantiles(ratios)
    result["state_bytes_per_param"] = state_bytes(run.trainer.optimizer) / params
    result["peak_mb"] = None if run.peak is None else run.peak / 1e6
    result["first_loss"], result["last_loss"] = run.first_loss, float(run.trainer.loss)
    notes = [] if math.isfinite(result["last_loss"]) else ["the loss is not finite"]
    optimizer = run.trainer.optimizer
    if isinstance(optimizer, lodo.LODO) and optimizer.skipped_steps:
        notes.append(f"{optimizer.skipped_steps} steps skipped")
    return result | {"note": "; ".join(notes)}


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    at = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(at).tolist()
    return low, middle, high


# ---- the run --------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    description = str(__doc__).splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_throughput", description=description)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--rounds", type=int, default=9, help="turns that each optimizer gets, at least 3")
    parser.add_argument("--seconds", type=float, default=120.0, help="time for all, shared by the networks")
    parser.add_argument("--milliseconds", type=float, default=500.0, help="longest turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true", help="small batches and a narrow ResNet, to try this out")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="optimizers with these in their names")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    begin = time.monotonic()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # as one does in training; it falls into the warm-up
    command = f"python -m benchmarks.training_throughput --device {args.device} --seconds {args.seconds:g}"
    command += f" --rounds {args.rounds} --milliseconds {args.milliseconds:g}" + " --tiny" * args.tiny
    rows: list[Row] = []
    waiting = workloads(args.tiny)
    while waiting:
        workload = waiting.pop(0)
        print(f"{workload.name} ...", file=sys.stderr, flush=True)
        left = args.seconds - (time.monotonic() - begin)
        rows += measure(workload, args, left / (len(waiting) + 1))
        gc.collect()
        torch.cuda.empty_cache()
        write(rows, command, args.out)
    print(markdown(rows, command))


if __name__ == "__main__":
    main()
