"""Compiles every Triton kernel for a GPU, with or without one at hand, and lists registers, spills and shared memory.

    python -m benchmarks.kernel_resources                  # sm_90: H100, H200

The kernels and their constants are those that lodo launches: its launchers run over tensors without data, with a
recorder in place of the device code. The figures are the assembler's own, read from the machine code.
"""

import argparse
import csv
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lodo import inner_optimizer
from lodo.kernels import gpu

TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
NUMBERS = ("float32", "float64")
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
REGISTERS_PER_SM, MAX_WARPS_PER_SM = 65536, 64  # sm_80, sm_90
BLOCKS = (2, 4, 8, 16)
WIDE, NARROW = 1 << 20, 64  # blocks in a layer: a program per tile, one program for all


@dataclass(frozen=True)
class Launch:
    """A kernel with the types of its arguments, its compile-time constants and its options."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Resources:
    """A line of the table: what a compiled kernel takes."""

    kernel: str
    constants: str
    numbers: str
    moments: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    resident_warps: int


class Recorder:
    """Stands in for the module of the kernels: notes what is launched in place of launching it."""

    def __init__(self, code: Any) -> None:
        self.code = code
        self.launches: dict[Launch, None] = {}

    def __getattr__(self, name: str) -> Any:
        return _Grid(lambda args, kwargs: self._note(name, args, kwargs))

    def _note(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = getattr(self.code, name).arg_names
        given = dict(zip(names, args, strict=False))
        signature = {key: _type_of(value) for key, value in given.items()}
        constants = {key: None for key, kind in signature.items() if kind == "constexpr"}
        constants |= {key: value for key, value in kwargs.items() if key not in OPTIONS}
        signature |= dict.fromkeys(constants, "constexpr")
        options = {key: value for key, value in kwargs.items() if key in OPTIONS}
        ordered = tuple((key, signature[key]) for key in names)
        self.launches[Launch(name, ordered, tuple(constants.items()), tuple(options.items()))] = None


class _Grid:
    """What `kernel[grid](...)` needs."""

    def __init__(self, note: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        self.note = note

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.note(args, kwargs)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    return "constexpr" if value is None else "i32"


def recorded(code: Any, dtypes: Sequence[torch.dtype]) -> list[Launch]:
    """All launches of all preconditioners of these dtypes: block sizes, permutations, inner optimizers."""
    recorder = Recorder(code)
    with mock.patch.object(gpu, "device_code", return_value=recorder):
        for dtype in dtypes:
            for inner in (dtype, torch.bfloat16, None):
                for arguments in _examples(dtype, inner):
                    _run(*arguments)
    return list(recorder.launches)


def _examples(dtype: torch.dtype, inner: torch.dtype | None) -> Iterator[tuple[Any, ...]]:
    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    def moments(theta: Tensor) -> inner_optimizer.Moments | None:
        return None if inner is None else (theta.to(inner), theta.to(inner))

    for block in BLOCKS:
        for width in (WIDE, NARROW) if block == 4 else (WIDE,):
            theta = empty(3, block, block, width)  # a pair of layers and a single one
            indices = empty(3, block * width, kind=torch.int32)
            for permutations in (None, indices):
                yield "network", theta, moments(theta), permutations, empty(block * width)
    theta, indices = empty(2, WIDE), empty(1, WIDE, kind=torch.int32)
    yield "residual", theta, moments(theta), indices, empty(WIDE)
    yield "diagonal", theta[0], moments(theta[0]), None, empty(WIDE)
    yield "rounding", theta[0], None, None, empty(WIDE)


def _run(kind: str, theta: Tensor, moments: inner_optimizer.Moments | None, indices: Any, v: Tensor) -> None:
    rates = inner_optimizer.Rates(*torch.empty(5, device="meta").unbind())
    lr = torch.empty((), dtype=torch.float64, device="meta")
    if kind == "network":
        gpu.matvec(theta, indices, v, indices)
        gpu.learn_(theta, moments, indices, v, v, lr, rates, indices)
    elif kind == "residual":
        gpu.residual_matvec(theta, indices, v)
        gpu.residual_learn_(theta, moments, indices, v, v, lr, rates)
    elif kind == "rounding":
        gpu.round_into_(v.to(torch.bfloat16), v, torch.empty((), dtype=torch.int64, device="meta"))
    else:
        gpu.diagonal_learn_(theta, moments, v, v, lr, rates)


def compiled(code: Any, launch: Launch, capability: int) -> Resources:
    """What a launch takes on a GPU of this compute capability (90 for 9.0)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    function = getattr(code, launch.kernel)
    signature, constants = dict(launch.signature), dict(launch.constants)
    places = {name: place for place, name in enumerate(signature)}
    aligned = {
        (places[name],): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*") and name not in ("weight", "permutation")  # rows, at any address
    }
    source = ASTSource(function, signature, {(places[name],): value for name, value in constants.items()}, aligned)
    built = triton_compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    registers, stack = _usage(built.asm["cubin"])
    warps = dict(launch.options)["num_warps"]
    resident = REGISTERS_PER_SM // (32 * -(-registers // 8) * 8) // warps * warps
    return Resources(
        launch.kernel,
        " ".join(f"{name}={value}" for name, value in constants.items() if name != "EPS" and value is not None),
        next(kind for kind in signature.values() if kind in ("*fp32", "*fp64")).removeprefix("*"),
        signature.get("exp_avg", "").removeprefix("*") if constants.get("ADAM") else "",
        warps,
        registers,
        stack,
        built.metadata.shared,
        min(resident, MAX_WARPS_PER_SM),
    )


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes per thread of what does not fit them."""
    import triton.backends.nvidia as nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(str(nvidia.__file__)).parent / "bin" / "cuobjdump"
        printed = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {printed.stdout!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def table(rows: Sequence[Resources]) -> str:
    names = [field.name.replace("_", " ") for field in fields(Resources)]
    lines = [names, ["---"] * len(names), *([str(value) for value in astuple(row)] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_resources", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--capability", type=int, default=90, help="compute capability, 90 for 9.0 (default)")
    parser.add_argument("--numbers", nargs="+", choices=NUMBERS, default=NUMBERS, help="dtypes of networks (both)")
    parser.add_argument("--only", default="", metavar="NAME", help="kernels with this in their names")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "gpu", help="folder of the table"
    )
    args = parser.parse_args(argv)
    code, dtypes = gpu.code(), [getattr(torch, name) for name in args.numbers]
    if code is None:
        raise SystemExit("Triton is not installed: pip install triton")
    rows = [compiled(code, launch, args.capability) for launch in recorded(code, dtypes) if args.only in launch.kernel]
    import triton

    title = f"The kernels on sm_{args.capability}, compiled by Triton {triton.__version__}"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "kernel_resources.md").write_text(f"# {title}\n\n{table(rows)}\n")
    with (args.out / "kernel_resources.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Resources))
        writer.writerows(astuple(row) for row in rows)
    print(table(rows))
    spilled = [row for row in rows if row.spilled_bytes]
    print(f"\n{title}: {len(rows)} kernels, {len(spilled)} of them spill registers")
    if spilled:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
