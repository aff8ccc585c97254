"""The configurations and the problem that torch's battery of contracts is held against LODO on."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lodo import LODO, RECOMMENDED

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "meta_lr 0": {"meta_lr": 0.0},
    "residual": {"preconditioner": "residual", "depth": 3},
    "diagonal": {"preconditioner": "diagonal"},
    "scalar": {"preconditioner": "scalar"},
    "depth 0": {"depth": 0},
    "blocks of 3": {"depth": 2, "block_size": 3, "expansion": 1.5, "seed": 1},
    "blocks of 1": {"depth": 2, "block_size": 1, "expansion": 1},
    "shuffle": {"permutation": "shuffle", "depth": 4},
    "inner sgd": {"meta_optimizer": "sgd", "depth": 2},
    "bfloat16 moments": {"meta_state_dtype": "bfloat16"},
    "bfloat16 momentum": {"momentum_dtype": "bfloat16"},
    "every third step": {"meta_every": 3},
    "weight_decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "maximize, weight_decay": {"maximize": True, "weight_decay": 0.1, "lr": 0.5},
    "beta 0": {"beta": 0.0},
    "recommended": {**RECOMMENDED},
    "recommended, with all that bounds": {
        **RECOMMENDED,
        "weight_decay": 0.1,
        "max_step_norm": 0.1,
        "max_condition": 9.0,
    },
    "recommended, with Adam's base": {**RECOMMENDED, "base": "adam"},
    "identity": {"preconditioner": "identity", "base": "adam", "trace_decay": 0.5, "lr": 0.01},
    "adam and blocks": {
        "base": "adam",
        "scale_lr": 0.03,
        "momentum_decays": (0.0, 0.9),
        "lr": 0.01,
        "depth": 2,
        "maximize": True,
    },
    "tensor lr": {"lr": torch.tensor(0.7)},
    "tensor lr, weight_decay": {"lr": torch.tensor([0.7]), "weight_decay": 0.1, "preconditioner": "diagonal"},
}

every_config = pytest.mark.parametrize("kwargs", CONFIGS.values(), ids=CONFIGS)


class Problem:
    """Least squares in a weight and a bias, with curvature at most 1, and a LODO on it."""

    def __init__(self, kwargs, *, dtype=torch.float32, device="cpu", contiguous=True, named=False, groups=None):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Parameter:
            numbers = torch.randn(*shape, 2, generator=generator, dtype=torch.float32).to(device, dtype)[..., 0]
            return Parameter(numbers.contiguous() if contiguous else numbers)

        self.weight, self.bias = self.params = draw(6, 5), draw(6)
        self.input = torch.nn.functional.normalize(draw(5).detach(), dim=0)
        self.contiguous = contiguous
        params: Any = list(zip(("weight", "bias"), self.params, strict=True)) if named else self.params
        if groups is not None:
            params = [{"params": [p], **options} for p, options in zip(params, groups, strict=True)]
        self.optimizer = LODO(params, **copy.deepcopy(kwargs))  # a scheduler may write into a tensor lr

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = (self.weight @ self.input + self.bias).square().sum() / 4
        loss.backward()
        if not self.contiguous:
            for p in self.params:
                p.grad = torch.stack((p.grad, p.grad), dim=-1)[..., 0]
        return loss

    def run(self, steps: int) -> "Problem":
        for _ in range(steps):
            self.closure()
            self.optimizer.step()
        return self

    def values(self) -> Any:
        return plain([p.detach() for p in self.params])

    def saved(self) -> Any:
        return plain(self.optimizer.state_dict())

    def went_right(self, start: Tensor) -> bool:
        return bool(self.closure() > start) is self.optimizer.param_groups[0]["maximize"]


def plain(value: Any) -> Any:
    """A copy of nested state in which tensors are their dtype and numbers, to be compared exactly."""
    if isinstance(value, Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
