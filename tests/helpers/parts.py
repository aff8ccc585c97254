"""Optimizers with parts beside the network, and their state in the coordinates of the parameters."""

import torch
from torch import nn

import lodo

NETWORKS = {
    "block_permutation": {"depth": 3, "block_size": 3},
    "residual": {"depth": 3},
    "diagonal": {},
    "scalar": {},
    "log_diagonal": {},
    "identity": {},
}
SHAPES = ((3, 4), (5,), (), (2, 3, 2), (0, 3), (1,))


def made(shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def loss_of(x):
    """No quadratic, and it couples all coordinates."""
    return (x.sin() * torch.linspace(0.5, 2, len(x), dtype=x.dtype)).sum() + 0.1 * (x.mean() + x).pow(4).mean()


def backward(params):
    """Gives `loss_of` all parameters as one vector; returns its gradient."""
    x = flat(params).requires_grad_()
    loss_of(x).backward()
    for p, part in zip(params, x.grad.split([p.numel() for p in params]), strict=True):
        p.grad = part.view(p.shape).clone()
    return x.grad


def built(kind="identity", shapes=SHAPES, **options):
    params = made(shapes)
    return params, lodo.LODO(params, preconditioner=kind, **{"lr": 0.05, **NETWORKS[kind], **options})


def trained(kind="identity", shapes=SHAPES, steps=12, **options):
    params, optimizer = built(kind, shapes, **options)
    for _ in range(steps):
        backward(params)
        optimizer.step()
    return params, optimizer


def entry_of(optimizer):
    return optimizer.state[optimizer.param_groups[0]["params"][0]]


def rotated_back(optimizer, v):
    """Vectors (..., n) that the optimizer keeps, in the coordinates of the parameters."""
    operator = optimizer.preconditioners[0]
    return torch.stack([operator.rotate_back(row) for row in v]) if v.dim() > 1 else operator.rotate_back(v)


def scales(params, optimizer):
    """S, one number for each element; ones if there are no scales."""
    lengths = torch.tensor([p.numel() for p in params])
    logs = entry_of(optimizer).get("scale", torch.zeros(1, len(params), dtype=torch.float64))[0]
    return logs.exp().repeat_interleave(lengths)
