"""Clocks and scales: times of calls, replayed CUDA graphs, the copy limit, memory, the machine's name."""

import importlib.metadata
import itertools
import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

PASSES_PER_COPY = 2
COPY_NUMBERS = 1 << 27  # longest array that is copied; far beyond every cache, so longer ones cost in proportion
COPIES = 7  # timed on either side of a round
BATCH_MS = 2.0  # on an accelerator, calls are timed in batches of about this length


# ---- time -----------------------------------------------------------------------------------------------------------


def time_calls(function: Callable[[], Any], count: int, device: str, batch: int = 1) -> list[float]:
    """Milliseconds of one call, `count` times: each the mean of `batch` calls in a row.

    On an accelerator nothing waits between the calls, so that a batch takes what its launches on the host take or what
    the device takes, whichever is longer.
    """
    if device == "cpu":
        marks = [time.perf_counter()]
        for _ in range(count):
            for _ in range(batch):
                function()
            marks.append(time.perf_counter())
        return [1000 * (end - begin) / batch for begin, end in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        for _ in range(batch):
            function()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / batch for begin, end in itertools.pairwise(events)]


def batch_of(call_ms: float, device: str, cycle: int = 1) -> int:
    """How many calls to time together: on an accelerator short ones in batches, of whole cycles."""
    if device == "cpu":
        return 1
    return cycle * math.ceil(min(BATCH_MS / call_ms, 200) / cycle)


def captured(function: Callable[[], Any], pool: Any = None) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call, made after three calls on a side stream.

    Args:
        pool: of the graph's memory, to be shared with graphs that run at other times.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        function()
    return graph


def left_out(error: Exception) -> str:
    """The note on what failed, from its error."""
    return f"left out: {(str(error) or type(error).__name__).splitlines()[0][:100]}"


class CopyProbe:
    """Times the copy limit of networks up to a size."""

    def __init__(self, numbers: int, dtype: torch.dtype, device: str) -> None:
        self.device = device
        # An accelerator copies less than this in the time of a launch or two, and some of it in its cache.
        length = min(numbers, COPY_NUMBERS) if device == "cpu" else COPY_NUMBERS * (numbers > 0)
        self.source = torch.ones(length, dtype=dtype, device=device)
        self.target = torch.zeros_like(self.source)

    def limits(self, numbers: int, passes: int) -> list[float]:
        """Milliseconds of the copy limit for theta of so many numbers, several times."""
        whole = self.device != "cpu"
        source, target = (array if whole else array[:numbers] for array in (self.source, self.target))
        target.copy_(source)
        scale = passes / PASSES_PER_COPY * numbers / source.numel()
        return [scale * ms for ms in time_calls(lambda: target.copy_(source), COPIES, self.device)]


# ---- memory ---------------------------------------------------------------------------------------------------------


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


class PeakMemory:
    """The most bytes that the process, or on an accelerator its tensors, have taken on top of what they took at first.

    On Linux or CUDA. There is one high-water mark, so only the latest of these objects tells the truth.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.before = 0.0
        if device == "cpu":
            self.before = 1024 * proc_kilobytes("/proc/self/status", "VmRSS")
        else:
            one = torch.ones(1, device=device)
            torch.dot(one, one)  # so that the workspace of the linear algebra library does not count
            torch.cuda.synchronize()
            self.before = float(torch.cuda.memory_allocated())
        self.restart()

    def restart(self) -> None:
        """The high-water mark starts again."""
        if self.device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")
        else:
            torch.cuda.reset_peak_memory_stats()

    def bytes(self) -> float:
        if self.device == "cpu":  # not ru_maxrss, which a process inherits from the one that started it
            return 1024 * proc_kilobytes("/proc/self/status", "VmHWM") - self.before
        return float(torch.cuda.max_memory_allocated()) - self.before


# ---- the machine ----------------------------------------------------------------------------------------------------


def device_name(device: str) -> str:
    """What did the work: the model of the processor, or of the accelerator."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    name = found.get("model name", platform.processor() or platform.machine())
    # Virtual machines often say no more than the maker's name, of machines that differ by a factor of two.
    numbers = [f"{key.split()[-1]} {found[key]}" for key in ("cpu family", "model") if key in found]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def device_software(device: str) -> str:
    """The versions that an accelerator's work depends on, beside torch's; empty for a processor."""
    if device == "cpu":
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        driver = done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return f"driver {driver}, triton {triton}"
