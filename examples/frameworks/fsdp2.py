"""FSDP2 on several ranks, with checkpoints that go on with as many ranks bit for bit, and with any other number.

    torchrun --nproc-per-node 2 -m examples.frameworks.fsdp2 [--whole] [--folder FOLDER]

FOLDER is for checkpoints; of several machines it must be one that all see. Without it a temporary one is made.
Nothing of it is LODO's but one line: each rank has eigenbases, scales and momenta for its own shards, and nothing is
communicated for them. With --whole each tensor has an owner among the ranks, and training and checkpoints are those of
one process. What `torchtitan` and loops like it do with AdamW looks like this.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lodo
from examples.frameworks.tiny import network, points

STEPS, BATCH, LONGEST = 120, 64, 10.0


def make(sharding: str = "local") -> tuple[nn.Module, lodo.AutoLODO]:
    """The same on each rank, which then has its shards of it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    model = network().to(device)
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, lodo.AutoLODO(model.parameters(), sharding=sharding)


def train(model: nn.Module, optimizer: lodo.AutoLODO, begin: int, end: int) -> float:
    """Each rank sees its share of every batch; the loss of the last one here."""
    x, y = points().tensors
    loss = torch.zeros(())
    for step in range(begin, end):
        rows = torch.randint(len(x), (BATCH,), generator=torch.Generator().manual_seed(step))
        own = rows[dist.get_rank() :: dist.get_world_size()]
        device = next(model.parameters()).device
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[own].to(device)), y[own].to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), LONGEST)
        optimizer.step()
    return float(loss.detach())


def save(folder: Path, model: nn.Module, optimizer: lodo.AutoLODO) -> None:
    state = get_state_dict(model, optimizer)
    dcp.save({"model": state[0], "optimizer": state[1]}, checkpoint_id=folder)  # type: ignore[attr-defined]


def load(folder: Path, model: nn.Module, optimizer: lodo.AutoLODO) -> None:
    """Partial loading is for another number of ranks, for which the checkpoint of shards has no eigenbases: LODO warns
    then. Whole tensors go on with any number."""
    state: dict[str, Any] = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)  # type: ignore[attr-defined]
    dcp.load(state, checkpoint_id=folder, planner=planner)  # type: ignore[attr-defined]
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """On points that were not trained on."""
    x, y = (tensor.to(next(model.parameters()).device) for tensor in points(2048, seed=1).tensors)
    return float((model(x).argmax(1) == y).float().mean())


def whole(p: Tensor) -> Tensor:
    """A parameter, gathered from all ranks."""
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def run(folder: Path, sharding: str = "local") -> dict[str, float]:
    """Trains, saves half-way, and goes on with what another start of the program would make: accuracies of both, and
    how far they are apart."""
    model, optimizer = make(sharding)
    train(model, optimizer, 0, STEPS // 2)
    save(folder, model, optimizer)
    other_model, other = make(sharding)
    load(folder, other_model, other)
    for each, its in ((model, optimizer), (other_model, other)):
        train(each, its, STEPS // 2, STEPS)
    pairs = zip(model.parameters(), other_model.parameters(), strict=True)
    distance = max(float((whole(p) - whole(q)).abs().max()) for p, q in pairs)
    return {"accuracy": accuracy(model), "resumed": accuracy(other_model), "distance": distance}


def main() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **alone)  # type: ignore[arg-type]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", action="store_true", help="each tensor has an owner")
    parser.add_argument("--folder", type=Path, help="for checkpoints; a temporary one without it")
    options = parser.parse_args()
    shared = [options.folder or Path(tempfile.mkdtemp())]
    dist.broadcast_object_list(shared)
    found = run(shared[0], "whole" if options.whole else "local")
    if dist.get_rank() == 0:
        if options.folder is None:
            shutil.rmtree(shared[0])
        print(f"{dist.get_world_size()} ranks:", ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
