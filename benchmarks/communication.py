"""What ranks send in a training step, in bytes: FSDP2 itself, and AutoLODO in both modes of `sharding`.

    python -m benchmarks.communication [--ranks 2,4,8] [--widths 64,128] [--out FILE]

Counted, not timed: each rank is a process, joined by gloo on this machine, and what it hands to torch.distributed in
one step of a GPT is added up by kind of exchange, as a ring sends it. A minute on two cores.
"""

import argparse
import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import lodo
from benchmarks.environment import source_hash
from benchmarks.larger.gpt import GPT
from lodo.state.owners import costs_of, owners_of

OUT = Path(__file__).parent / "results" / "communication" / "report.md"
CONTEXT, WARM = 16, 2
MODES = ("local", "whole")


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank sends to others: all that goes through torch.distributed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            self.bytes[name] += sent_by(name, args, dist.get_world_size(), dist.get_rank())
        return func(*args, **(kwargs or {}))


def sent_by(name: str, args: Sequence[Any], ranks: int, rank: int) -> int:
    """Bytes that one rank sends in an exchange, of which these are the arguments.

    Raises:
        ValueError: for an exchange that is not known.
    """
    if name == "_allgather_base_":
        return (ranks - 1) * args[1].nbytes
    if name == "allgather_":
        return (ranks - 1) * sum(tensor.nbytes for tensor in args[1])
    if name == "_reduce_scatter_base_":
        return (ranks - 1) * args[1].nbytes // ranks
    if name == "alltoall_base_":
        sizes: Sequence[int] = args[4]
        return sum(size for other, size in enumerate(sizes) if other != rank) * args[1].element_size()
    if name == "allreduce_":
        return 2 * (ranks - 1) * sum(tensor.nbytes for tensor in args[0]) // ranks
    raise ValueError(f"an exchange that is not counted: {name}")


def step_of(rank: int, ranks: int, width: int, store: str, results: Any) -> None:
    """Puts what this rank sends in a step, by mode: outside the optimizer's step, and in it."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    found = {}
    for mode in MODES:
        torch.manual_seed(0)
        model = GPT(width, context=CONTEXT)
        mesh = init_device_mesh("cpu", (ranks,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = lodo.AutoLODO(model.parameters(), sharding=mode)
        for step in range(WARM + 1):
            tokens = torch.randint(256, (2, CONTEXT + 1), generator=torch.Generator().manual_seed(step * ranks + rank))
            with Sent() as outside:
                loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
                loss.backward()
            with Sent() as inside:
                optimizer.step()
            optimizer.zero_grad()
        found[mode] = sum(outside.bytes.values()), sum(inside.bytes.values())
    results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def counted(ranks: int, width: int, folder: Path) -> dict[str, tuple[int, int]]:
    """Of the rank that sends most: bytes outside the optimizer's step, and in it, by mode."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    store = folder / f"{ranks}-{width}"
    arguments = ranks, width, str(store), results
    processes = [context.Process(target=step_of, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return {mode: (max(each[mode][0] for each in found), max(each[mode][1] for each in found)) for mode in MODES}


def busiest(params: Sequence[Tensor], ranks: int) -> float:
    """The work of the rank that has most, over the mean."""
    shapes = [p.shape for p in params]
    loads = [0.0] * ranks
    for owner, cost in zip(owners_of(shapes, ranks), costs_of(shapes), strict=True):
        loads[owner] += cost
    return max(loads) * ranks / sum(loads)


def report(counts: dict[tuple[int, int], dict[str, tuple[int, int]]]) -> str:
    lines = [
        "# Communication on several ranks",
        "",
        f"`python -m benchmarks.communication`, torch {torch.__version__}, lodo source {source_hash()}. Kilobytes "
        "(1,000 bytes) that the rank which sends most sends to others in a training step of a GPT in float32, counted: "
        "FSDP2 itself (parameters gathered for the forward and the backward pass, gradients scattered), and the step "
        "of AutoLODO, local or with whole tensors. Work: that of the busiest owner, as estimated to share tensors "
        "out, over the mean.",
        "",
        "| parameters | ranks | FSDP2 | local | whole | whole / FSDP2 | work |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (width, ranks), found in counts.items():
        params = list(GPT(width, context=CONTEXT).parameters())
        (own, local), (_, whole) = found["local"], found["whole"]
        lines.append(
            f"| {sum(p.numel() for p in params):,} | {ranks} | {own / 1e3:,.0f} | {local / 1e3:,.0f} "
            f"| {whole / 1e3:,.0f} | {whole / own:.2f} | {busiest(params, ranks):.2f} |"
        )
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4,8", help="numbers of processes, separated by commas")
    parser.add_argument("--widths", default="64,128", help="of the GPTs, separated by commas")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the report to write ({OUT.name})")
    options = parser.parse_args(arguments)
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        for width in map(int, options.widths.split(",")):
            for ranks in map(int, options.ranks.split(",")):
                counts[width, ranks] = counted(ranks, width, Path(folder))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(report(counts))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
