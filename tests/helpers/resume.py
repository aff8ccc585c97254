"""The part of a training that test_checkpoints.py runs in a process of its own: load, go on, save what came out."""

import sys
from typing import Any

import torch
from torch import nn

import lodo

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "shuffle": {"permutation": "shuffle", "block_size": 3},
    "blocks_of_3": {"block_size": 3},
    "inner_sgd": {"meta_optimizer": "sgd"},
    "residual": {"preconditioner": "residual", "depth": 9},
    "diagonal": {"preconditioner": "diagonal"},
    "scalar": {"preconditioner": "scalar"},
    "frozen": {"meta_lr": 0.0},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float64": {"dtype": torch.float64},
    "two_groups": {"groups": True},
    "scheduled": {"scheduled": True},
    "bfloat16_state": {"meta_state_dtype": "bfloat16", "momentum_dtype": "bfloat16"},
    "every_third": {"meta_every": 3, "dtype": torch.float64, "meta_state_dtype": "bfloat16"},  # saved in mid-period
    "adam_scaled": {"base": "adam", "scale_lr": 0.05, "trace_decay": 0.9, "preconditioner": "log_diagonal"},
    "soap_scaled": {"base": "soap", "scale_lr": 0.05, "trace_decay": 0.9, "momentum_dtype": "bfloat16"},
    "identity_bfloat16": {"base": "soap", "preconditioner": "identity", "dtype": torch.bfloat16},
    "bounded": {"max_step_norm": 0.02, "max_condition": 1.2},
    "recommended": {**lodo.RECOMMENDED},
    "adam_and_blocks": {"base": "adam", "scale_lr": 0.03, "momentum_decays": (0.0, 0.9), "max_step_norm": 0.1},
    # Parameters with different counts.
    "gaps": {"gaps": True},
    "gaps_every_third": {"gaps": True, "meta_every": 3, "meta_state_dtype": "bfloat16", "momentum_dtype": "bfloat16"},
    "gaps_log_diagonal": {"gaps": True, "preconditioner": "log_diagonal", "momentum_dtype": "bfloat16"},
    "gaps_identity": {"gaps": True, "preconditioner": "identity", "base": "adam", "scheduled": True},
    "gaps_recommended": {"gaps": True, **lodo.RECOMMENDED},
    "gaps_recommended_adam": {"gaps": True, **lodo.RECOMMENDED, "base": "adam", "meta_state_dtype": "bfloat16"},
    "gaps_and_a_reset": {"gaps": True, "reset": 5, **lodo.RECOMMENDED, "base": "adam"},
}
STEPS = 8
GAPS = {"0.bias": (3, 1), "2.weight": (0, 2), "2.bias": (11, 3)}
"""With gaps, the first step and the interval of steps at which a parameter has a gradient: one joins late, one goes on
joining, one comes to join after the state was saved. The others always have one."""


def build(name: str) -> tuple[nn.Module, lodo.LODO, Any]:
    options = dict(CASES[name])
    dtype = options.pop("dtype", torch.float32)
    groups, scheduled = options.pop("groups", False), options.pop("scheduled", False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).to(dtype)
    model.gaps, model.reset = GAPS if options.pop("gaps", False) else {}, options.pop("reset", None)
    params: Any = model.parameters()
    if groups:
        params = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "preconditioner": "diagonal"}]
    optimizer = lodo.LODO(params, **{"lr": 0.1, "meta_lr": 1e-2, "weight_decay": 0.01, **options})
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) if scheduled else None
    return model, optimizer, scheduler


def run(model: nn.Module, optimizer: lodo.LODO, scheduler: Any, begin: int, steps: int = STEPS) -> None:
    for step in range(begin, begin + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 5, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        (model(x) - x[:, :2].sin()).float().pow(2).mean().backward()
        for name, (first, interval) in model.gaps.items():
            if step < first or (step - first) % interval:
                model.get_parameter(name).grad = None
        if step == model.reset:
            optimizer.reset()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def state_of(model: nn.Module, optimizer: lodo.LODO, scheduler: Any) -> dict[str, Any]:
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return saved if scheduler is None else {**saved, "scheduler": scheduler.state_dict()}


if __name__ == "__main__":
    source, target = sys.argv[1:]
    results = {}
    for name, saved in torch.load(source, weights_only=True).items():
        model, optimizer, scheduler = build(name)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(saved["scheduler"])
        run(model, optimizer, scheduler, begin=STEPS)
        results[name] = state_of(model, optimizer, scheduler)
    torch.save(results, target)
