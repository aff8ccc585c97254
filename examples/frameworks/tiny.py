"""What the examples train: a network on points, and a GPT-2 of some thousand parameters on sequences that count."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lodo

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

LEAN: dict[str, Any] = {"depth": 4, "expansion": 1, "permutation": "shuffle"}
"""The lean network of LODO: 16 numbers per parameter instead of 128."""

TOKENS = 16
FEATURES, CLASSES = 20, 4


def points(count: int = 512, seed: int = 0) -> TensorDataset:
    """(x, class): points in space and the class that a random network puts them in; seeds differ in the points only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))
        torch.manual_seed(seed + 1)
        x = torch.randn(count, FEATURES)
        return TensorDataset(x, teacher(x).argmax(1))


def network(seed: int = 0, batch_norm: bool = False) -> nn.Sequential:
    """A classifier of `points`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = [nn.Linear(FEATURES, 32), *([nn.BatchNorm1d(32)] if batch_norm else [])]
        return nn.Sequential(*first, nn.Tanh(), nn.Linear(32, CLASSES))


def sequences(count: int = 256, length: int = 12, stride: int = 1) -> list[dict[str, Tensor]]:
    """Tokens that count up by `stride`, modulo `TOKENS`, from a random start: items as Trainer takes them."""
    starts = torch.randint(TOKENS, (count, 1), generator=torch.Generator().manual_seed(0))
    tokens = (starts + stride * torch.arange(length)) % TOKENS
    return [{"input_ids": row, "labels": row} for row in tokens]


def gpt2(seed: int = 0) -> "GPT2LMHeadModel":
    """A language model of one layer, with its dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=TOKENS, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The memory that an optimizer's state takes."""
    entries = [value for entry in optimizer.state.values() for value in entry.values()]
    return sum(value.nbytes for value in entries if isinstance(value, Tensor))


def lean_lodo(params: Any, lr: float, meta_lr: float = 3e-3) -> lodo.LODO:
    """The optimizer of all examples."""
    return lodo.LODO(params, lr=lr, meta_lr=meta_lr, **LEAN)
