"""The small trainings that faults are injected into, and comparisons of their states bit by bit."""

import copy
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lodo

CASES: dict[str, dict[str, Any]] = {
    "default network": {"depth": 4},
    "lean, shuffle": {"depth": 4, "expansion": 1, "permutation": "shuffle"},
    "two groups": {"depth": 4, "groups": True},
    "bfloat16 state, meta_every 3": {
        "depth": 4,
        "meta_state_dtype": "bfloat16",
        "momentum_dtype": "bfloat16",
        "meta_every": 3,
    },
    "residual, float64, inner SGD": {
        "preconditioner": "residual",
        "depth": 5,
        "meta_optimizer": "sgd",
        "dtype": torch.float64,
    },
    "without tuning": {"auto": True},
}
KERNELS = ("native", "plain torch")


class Training:
    """A small model and its LODO. Gradients depend on the parameters and a step's number alone."""

    def __init__(self, case: str) -> None:
        options = dict(CASES[case])
        dtype, is_split = options.pop("dtype", torch.float32), options.pop("groups", False)
        is_auto = options.pop("auto", False)
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
        self.params = list(self.model.parameters())
        groups: Any = self.params
        if is_split:
            groups = [{"params": self.params[:2]}, {"params": self.params[2:], "preconditioner": "diagonal"}]
        self.optimizer: lodo.LODO
        if is_auto:
            self.optimizer = lodo.AutoLODO(groups, weight_decay=0.01, **options)
        else:
            self.optimizer = lodo.LODO(groups, **{"lr": 0.05, "meta_lr": 1e-2, "weight_decay": 0.01, **options})

    def set_gradients(self, step: int) -> None:
        noise = np.random.default_rng(step)
        for p in self.params:
            offset = torch.from_numpy(noise.standard_normal(p.shape)).to(p.dtype)
            p.grad = p.detach() + 0.3 * (2 * p.detach()).sin() + 0.3 * offset

    def advance(self, begin: int, end: int) -> None:
        for step in range(begin, end):
            self.set_gradients(step)
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """A copy of all that a checkpoint keeps."""
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def is_finite(self) -> bool:
        tensors = [value for entry in self.optimizer.state.values() for value in entry.values()]
        return all(bool(t.isfinite().all()) for t in [*self.params, *tensors] if isinstance(t, Tensor))


def fingerprint(value: Any, without: tuple[str, ...] = ()) -> str:
    """A digest of nested dicts, lists, numbers and tensors, down to the last bit; dict entries called as in `without`
    do not count."""
    digest = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, dict):
            for key in sorted(item, key=repr):
                if key not in without:
                    digest.update(repr(key).encode())
                    add(item[key])
        elif isinstance(item, list | tuple):
            digest.update(b"[")
            for each in item:
                add(each)
            digest.update(b"]")
        elif isinstance(item, Tensor):
            digest.update(f"{item.dtype} {tuple(item.shape)}".encode())
            digest.update(item.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{type(item).__name__} {item!r};".encode())

    add(value)
    return digest.hexdigest()


@contextmanager
def kernels(kind: str) -> Iterator[None]:
    """Runs the block on the compiled kernels or on plain torch."""
    before = os.environ.get("LODO_NATIVE")
    os.environ["LODO_NATIVE"] = "1" if kind == "native" else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LODO_NATIVE"]
        else:
            os.environ["LODO_NATIVE"] = before
