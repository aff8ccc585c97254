"""The CPU kernels of the .cpp files here: built once per machine with the C++ compiler that is there, if one is.

The library is cached under $XDG_CACHE_HOME/lodo (default ~/.cache/lodo), by source, compiler and processor. Without a
compiler, on Windows, or with the environment variable LODO_NATIVE=0 the reference in torch does the work instead.
"""

import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lodo import inner_optimizer
from lodo.kernels.structures import Cohort, Group, Network

log = logging.getLogger(__name__)

SOURCES = tuple(Path(__file__).with_name(name) for name in ("networks.cpp", "parts.cpp"))
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
    """Tells ctypes the arguments, and looks whether both sides declare the same structures."""
    for structure in (Cohort, Group, Network):
        size = getattr(loaded, f"lodo_size_of_{structure.__name__.lower()}")
        size.restype = ctypes.c_int64
        if size() != ctypes.sizeof(structure):
            raise AttributeError(f"{structure.__name__} has another size in C++")
    pointer, size, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for suffix in SUFFIX.values():
        for name, types in (
            ("matvec", [ctypes.POINTER(Network), pointer, pointer]),  # v, out
            ("learn", [ctypes.POINTER(Network), pointer, pointer]),  # g, m
            ("residual_matvec", [ctypes.POINTER(Network), pointer, pointer]),  # v, out
            ("residual_learn", [ctypes.POINTER(Network), pointer, pointer, size]),  # g, m, stretch
            ("round", [pointer, pointer, size, size, integer]),  # target, values, their number, count, threads
            ("learn_all", [ctypes.POINTER(Group), ctypes.POINTER(Cohort), pointer, pointer]),  # g, judged
            ("advance", [ctypes.POINTER(Group), ctypes.POINTER(Cohort)]),
            ("learn_parts", [ctypes.POINTER(Group), ctypes.POINTER(Cohort), pointer]),  # g
            ("learn_step", [ctypes.POINTER(Group), ctypes.POINTER(Cohort), pointer, pointer]),  # g, step
            ("energies", [ctypes.POINTER(Group), pointer, pointer]),  # g, sums
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
    network = _network(theta, _shape(theta), permutations, work, v.numel())
    function("matvec", theta.dtype)(network, v.data_ptr(), out.data_ptr())
    return out


def learn_(
    theta: Tensor,
    moments: inner_optimizer.Moments | None,
    permutations: Tensor | None,
    g: Tensor,
    m: Tensor,
    lr: float,
    rates: inner_optimizer.Rates,
    work: Tensor,
) -> None:
    """`reference.learn_` with scratch memory `work` of at least 2 n~ (N + 2) numbers, N + 1 for the shuffle."""
    network = _network(theta, _shape(theta), permutations, work, g.numel())
    _prepare_inner_step_(network, moments, lr, rates)
    function("learn", theta.dtype)(network, g.data_ptr(), m.data_ptr())


def residual_matvec(theta: Tensor, indices: Tensor, v: Tensor) -> Tensor:
    """`reference.residual_matvec`."""
    v = v.contiguous()
    out, work = torch.empty_like(v), theta.new_empty(2, theta.shape[1])
    network = _network(theta, (len(indices), 1, theta.shape[1]), indices, work, v.numel())
    function("residual_matvec", theta.dtype)(network, v.data_ptr(), out.data_ptr())
    return out


def residual_learn_(
    theta: Tensor,
    moments: inner_optimizer.Moments | None,
    indices: Tensor,
    g: Tensor,
    m: Tensor,
    lr: float,
    rates: inner_optimizer.Rates,
) -> None:
    """`reference.residual_learn_`."""
    layers = len(indices)
    stretch = max(1, math.isqrt(layers))  # inputs of layers that are kept at a time, and stretches: few of each
    work = theta.new_empty(layers // stretch + stretch + 2, 2, theta.shape[1])
    network = _network(theta, (layers, 1, theta.shape[1]), indices, work, g.numel())
    _prepare_inner_step_(network, moments, lr, rates)
    function("residual_learn", theta.dtype)(network, g.data_ptr(), m.data_ptr(), stretch)


def _shape(theta: Tensor) -> tuple[int, int, int]:
    """N, k and w of a network of blocks, (N, k, k, w)."""
    layers, block, _, width = theta.shape
    return layers, block, width


def _network(
    theta: Tensor, shape: tuple[int, int, int], permutations: Tensor | None, work: Tensor, size: int
) -> Network:
    layers, block, width = shape
    return Network(
        theta=theta.data_ptr(),
        permutations=None if permutations is None else permutations.data_ptr(),
        work=work.data_ptr(),
        layers=layers,
        block=block,
        width=width,
        size=size,
        threads=torch.get_num_threads(),
    )


def _prepare_inner_step_(
    network: Network, moments: inner_optimizer.Moments | None, lr: float, rates: inner_optimizer.Rates
) -> None:
    if moments is not None:
        network.mean, network.square = (moment.data_ptr() for moment in moments)
        network.is_bfloat16 = moments[0].dtype == torch.bfloat16
    network.lr, network.inner, network.count, network.eps = lr, rates[:4], rates.count, inner_optimizer.EPS


def round_into_(target: Tensor, values: Tensor, count: int) -> None:
    """`reference.round_into_`."""
    threads = torch.get_num_threads()
    function("round", values.dtype)(target.data_ptr(), values.data_ptr(), values.numel(), int(count), threads)


@functools.cache
def function(name: str, dtype: torch.dtype) -> Any:
    """The entry point for vectors of a dtype."""
    return getattr(_load(), f"lodo_{name}_{SUFFIX[dtype]}")
