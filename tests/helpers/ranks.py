"""Runs a function on several processes that are joined by gloo: the ranks of the distributed tests."""

import io
import multiprocessing
import queue
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT = 120  # seconds
PRELOADED = [
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.parallel",
    "pytest",
]


def run(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns on each of `world` ranks, in order of rank.

    The processes are forked from a server that has imported what takes long, and find each other through a file.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or that did not end in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        common = (world, Path(folder, "store").as_uri(), results, function, args)
        processes = [context.Process(target=_rank, args=(rank, *common), daemon=True) for rank in range(world)]
        for process in processes:
            process.start()
        try:
            found = dict(_receive(results) for _ in processes)
            for process in processes:
                process.join(10)
        finally:
            for process in processes:
                process.kill()
    return [found[rank] for rank in range(world)]


def _receive(results: Any) -> tuple[int, Any]:
    try:
        rank, value, failure = results.get(timeout=LIMIT)
    except queue.Empty:
        raise AssertionError(f"a rank did not end within {LIMIT} seconds") from None
    assert failure is None, f"rank {rank}:\n{failure}"
    return rank, torch.load(io.BytesIO(value), weights_only=True)


def _rank(rank: int, world: int, store: str, results: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    limit = timedelta(seconds=LIMIT / 2)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=limit)
    try:
        saved = io.BytesIO()
        torch.save(function(*args), saved)  # a tensor sent as it is would be gone with the process that owns its memory
        results.put((rank, saved.getvalue(), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    else:
        dist.barrier()  # the store's file must outlive everyone's last word
    finally:
        dist.destroy_process_group()
