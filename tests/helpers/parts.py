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

ELEMENTS = ("momentum", "momentum_trace", "exp_avg_sq", "seen", "step_trace", "momenta", "written")
TABLES = (
    *("step", "skipped_steps", "unit", "scheduled_lr", "reset_at"),
    *("scale", "scale_peak", "trace_peak", "progress", "mixture", "recent_energy"),
)
PACKED = ("factors", "eigenbasis")
OF_NETWORKS = (
    *("theta", "theta_exp_avg", "theta_exp_avg_sq", "permutations"),
    *("meta_step", "network_step", "last_lr"),
)

POWERS = {  # of the unit, by which what is kept of gradients has been divided; of tables, in each row
    **dict.fromkeys(("momentum", "momentum_trace", "momenta", "theta_exp_avg"), (1,)),
    **dict.fromkeys(("exp_avg_sq", "factors", "recent_energy", "theta_exp_avg_sq"), (2,)),
    "scale": (0, 1, 2),
    "mixture": (0, 2, 4),
}


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


def state_of(optimizer, group=0):
    """Copies of what `optimizer.state` has for a group, by name: for all of its parameters together, of shape (*, n),
    of tables with a column for each parameter; of a network that acts on the whole group, itself."""
    params, found = optimizer.param_groups[group]["params"], {}
    entries = [optimizer.state[p] for p in params]
    is_elementwise = optimizer.param_groups[group]["preconditioner"] in ("log_diagonal", "identity")
    for name in dict.fromkeys(name for entry in entries for name in entry):
        if name == "shards":
            (marks,) = {tuple(entry[name].tolist()) for entry in entries}
            found[name] = torch.tensor(marks)
        elif name in OF_NETWORKS and not is_elementwise:
            (found[name],) = (entry[name].clone() for entry in entries if name in entry)
        elif name in PACKED:
            found[name] = torch.cat([entry[name] for entry in entries])
        elif name in TABLES or name in ("meta_step", "last_lr"):
            found[name] = torch.stack([entry[name] for entry in entries], -1)
        else:
            assert name in ELEMENTS or name in OF_NETWORKS, name
            own = [(entry[name], p) for entry, p in zip(entries, params, strict=True)]
            assert all(value.shape[value.dim() - p.dim() :] == p.shape for value, p in own), name
            found[name] = torch.cat([value.reshape(*value.shape[: value.dim() - p.dim()], -1) for value, p in own], -1)
    return found


def rotated_back(optimizer, v):
    """Vectors (..., n) that the optimizer keeps, in the coordinates of the parameters."""
    operator = optimizer.preconditioners[0]
    return (
        torch.stack([operator.rotate_back_(row.clone()) for row in v])
        if v.dim() > 1
        else operator.rotate_back_(v.clone())
    )


def scales(params, optimizer):
    """S, one number for each element; ones if there are no scales."""
    lengths = torch.tensor([p.numel() for p in params])
    logs = state_of(optimizer).get("scale", torch.zeros(1, len(params), dtype=torch.float64))[0]
    return logs.exp().repeat_interleave(lengths)
