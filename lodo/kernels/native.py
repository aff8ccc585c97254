"""The CPU kernels of the .cpp files here: built once per machine with the C++ compiler that is there, if one is.

The library is cached under $XDG_CACHE_HOME/lodo (default ~/.cache/lodo), by source, compiler and processor. Without a
compiler, on Windows, or with the environment variable LODO_NATIVE=0 the reference in torch does the work instead.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lodo import meta

log = logging.getLogger(__name__)

SOURCES = tuple(Path(__file__).with_name(name) for name in ("block_permutation.cpp", "parts.cpp"))
BASE_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
# Tried in this order. OpenMP resolves to the runtime that torch has loaded, so both share one pool of threads.
EXTRA_FLAGS = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())
SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


def available(theta: Tensor) -> bool:
    """Whether the kernels take this network: on the CPU, float32 or float64, with a library that could be built."""
    return theta.device.type == "cpu" and theta.dtype in SUFFIX and library() is not None


def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None where they cannot be had or LODO_NATIVE is 0."""
    return None if os.environ.get("LODO_NATIVE") == "0" else _load()


@functools.cache
def _load() -> ctypes.CDLL | None:
    compiler = _compiler()
    if compiler is None:
        log.info("no C++ compiler found: LODO runs its plain torch kernels")
        return None
    try:
        with tempfile.TemporaryDirectory(prefix="lodo-") as private:  # where the cache cannot be used; gone once loaded
            for folder in filter(None, (_cache_folder(), Path(private))):
                for extra in EXTRA_FLAGS:
                    if loaded := _build_and_load(compiler, (*BASE_FLAGS, *extra), folder):
                        return loaded
    except OSError as error:
        log.info("no temporary folder: %s", error)
    return None


def _build_and_load(compiler: str, flags: tuple[str, ...], folder: Path) -> ctypes.CDLL | None:
    try:
        return _declare(ctypes.CDLL(str(_build(compiler, flags, folder))))
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        log.info("building the CPU kernels in %s with %s failed: %s", folder, flags, error)
        return None


def _declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Tells ctypes the arguments."""
    pointer, size, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
    for suffix in SUFFIX.values():
        for name, types in (
            # Pointers; layers, block, width and size, or size and count; threads; is_bfloat16, lr and rates.
            ("matvec", [pointer] * 5 + [size] * 4 + [integer]),
            ("learn", [pointer] * 7 + [size] * 4 + [integer] * 2 + [number] * 7),
            ("round", [pointer] * 2 + [size] * 2 + [integer]),
            # Pointers; decays and tensors, or tensors; threads; numbers.
            ("judge", [pointer] * 11 + [size] * 2 + [integer] + [number] * 16),
            ("advance", [pointer] * 13 + [size] * 2 + [integer] + [number] * 12),
            ("scale_learn", [pointer] * 5 + [size] + [integer] + [number] * 7),
            ("energies", [pointer] * 3 + [size] + [integer]),
        ):
            function = getattr(loaded, f"lodo_{name}_{suffix}")
            function.argtypes = types
            function.restype = None
    return loaded


def _compiler() -> str | None:
    if sys.platform == "win32":
        return None
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _build(compiler: str, flags: tuple[str, ...], folder: Path) -> Path:
    """Path in `folder` of the library for this source, compiler and processor, compiled now if it is not there."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    sources = [source.read_bytes() for source in SOURCES]
    key = b"\0".join((*sources, version, " ".join(flags).encode(), _processor().encode()))
    path = folder / f"kernels-{hashlib.sha256(key).hexdigest()[:20]}.so"
    if not path.exists():
        handle, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        try:
            command = [compiler, *flags, "-o", temporary, *map(str, SOURCES)]
            subprocess.run(command, capture_output=True, check=True, timeout=300)
            os.replace(temporary, path)  # whole or not at all, whoever else is building
        finally:
            Path(temporary).unlink(missing_ok=True)
    return path


def _processor() -> str:
    """What -march=native depends on, since a cache can be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part", "isa")
    return platform.machine() + "".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _cache_folder() -> Path | None:
    """The folder for built libraries, None where there is none that only this user can write to."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lodo"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):  # no home, or not ours to write to
        return None
    is_private = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if is_private and os.access(folder, os.W_OK) else None


def prepare(theta: Tensor, permutations: Tensor | None, learning: bool, kept: Tensor | None) -> Tensor:
    """Scratch memory of as many numbers as a call needs: `kept` if that is enough."""
    layers, block, _, width = theta.shape
    vectors = 1 if not learning else layers + 1 if permutations is None else layers + 2
    numbers = 2 * block * width * vectors
    return kept if kept is not None and kept.numel() >= numbers else theta.new_empty(numbers)


def matvec(theta: Tensor, permutations: Tensor | None, v: Tensor, work: Tensor) -> Tensor:
    """`reference.matvec` with scratch memory `work` of at least 2 n~ numbers."""
    v = v.contiguous()
    out = torch.empty_like(v)
    _call("matvec", theta, v.numel(), (theta, permutations, v, out, work))
    return out


def learn_(
    theta: Tensor,
    moments: meta.Moments | None,
    permutations: Tensor | None,
    g: Tensor,
    m: Tensor,
    lr: float,
    rates: meta.Rates,
    work: Tensor,
) -> None:
    """`reference.learn_` with scratch memory `work` of at least 2 n~ (N + 2) numbers, N + 1 for the shuffle."""
    exp_avg, exp_avg_sq = moments or (None, None)
    is_bfloat16 = exp_avg is not None and exp_avg.dtype == torch.bfloat16
    tensors = (theta, exp_avg, exp_avg_sq, permutations, g, m, work)
    _call("learn", theta, g.numel(), tensors, is_bfloat16, lr, *rates, meta.EPS)


def _call(name: str, theta: Tensor, size: int, tensors: tuple[Tensor | None, ...], *numbers: float) -> None:
    """Calls an entry point for theta's dtype with contiguous tensors, the network's shape, threads and numbers."""
    layers, block, _, width = theta.shape
    function = getattr(_load(), f"lodo_{name}_{SUFFIX[theta.dtype]}")
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    function(*pointers, layers, block, width, size, torch.get_num_threads(), *numbers)


def round_into_(target: Tensor, values: Tensor, count: int) -> None:
    """`reference.round_into_`."""
    function = getattr(_load(), f"lodo_round_{SUFFIX[values.dtype]}")
    function(target.data_ptr(), values.data_ptr(), values.numel(), count, torch.get_num_threads())


def judge_(
    tensors: Sequence[Tensor | None],
    largest: float,
    lr: float,
    steps: float,
    by: meta.Descent,
    rates: meta.Rates | None,
    bound: float,
    network_bound: float,
) -> None:
    """`lodo.fused.Fused.judge_`, with its tensors in the order of `judge` in parts.cpp; `steps` that the momenta were
    made of; bounds of the mixture's table and of the network's logarithms."""
    inner = (0.0,) * 4 if rates is None else rates[:-1]
    tiny = meta.tiny(torch.float64)
    numbers = (largest, lr, steps, *by, tiny, bound, *inner, meta.EPS, network_bound)
    _call_parts("judge", tensors, _sizes(tensors), *numbers)


def advance_(
    tensors: Sequence[Tensor | None],
    largest: float,
    steps: float,
    weight: float,
    bias: float,
    eps: float,
    unit: float,
    longest: float,
    coast: float,
    lr: float = 0.0,
    beta: float = 0.0,
    trace: float = 0.0,
    momentum_bias: float = 1.0,
) -> None:
    """`lodo.fused.Fused.advance_`, with its tensors in the order of `advance` in parts.cpp; without a gradient among
    them the gains alone are brought up to date."""
    numbers = (largest, steps, weight, bias, eps, unit, longest, coast, lr, beta, trace, momentum_bias)
    _call_parts("advance", tensors, _sizes(tensors), *numbers)


def scale_learn_(
    table: Tensor, levels: Tensor, moves: Tensor, g: Tensor, offsets: Tensor, by: meta.Descent, bound: float
) -> None:
    """`lodo.scale.Scale.learn_`."""
    tensors = (g, moves, table, levels, offsets)
    _call_parts("scale_learn", tensors, table.shape[1:], *by, meta.tiny(table.dtype), bound)


def energies(vector: Tensor, offsets: Tensor) -> list[float]:
    """The sum of squares of each tensor's part of a vector, with no overflow in between."""
    count = offsets.numel() - 1
    sums = (ctypes.c_double * count)()
    _function("energies", vector.dtype)(vector.data_ptr(), sums, offsets.data_ptr(), count, torch.get_num_threads())
    return list(sums)


def _sizes(tensors: Sequence[Tensor | None]) -> tuple[int, int]:
    """Number of decays and of tensors in the group, from the last two arguments: decays and offsets."""
    decays, offsets = tensors[-2:]
    assert offsets is not None
    return 0 if decays is None else decays.numel(), offsets.numel() - 1


def _call_parts(name: str, tensors: Sequence[Tensor | None], sizes: Sequence[int], *numbers: float) -> None:
    """Calls an entry point of parts.cpp for the first tensor's dtype: contiguous tensors, sizes, threads, numbers."""
    assert tensors[0] is not None
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    _function(name, tensors[0].dtype)(*pointers, *sizes, torch.get_num_threads(), *numbers)


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Any:
    return getattr(_load(), f"lodo_{name}_{SUFFIX[dtype]}")
