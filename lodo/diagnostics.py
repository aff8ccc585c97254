"""Figures about a learned preconditioner, and about an optimizer at work. Nothing here runs unless it is asked for."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lodo import inner_optimizer
from lodo.preconditioners import BlockPermutation, Composite, Operator, Preconditioner
from lodo.preconditioners.singular_values import extremes
from lodo.scalars import norm
from lodo.state.group_state import GroupState


def hessian_error(
    preconditioner: Operator,
    hvp: Callable[[Tensor], Tensor],
    *,
    lr: float = 1.0,
    samples: int = 100,
    generator: torch.Generator | None = None,
) -> float:
    """How far G is from the inverse of the Hessian H: ||I - G H||_F / sqrt(n), G = lr * preconditioner (paper,
    section 5.1).

    Estimated as sqrt(mean ||v - G H v||^2) over random unit vectors v.

    Args:
        preconditioner: acts on R^n.
        hvp: maps v of shape (n,), of the preconditioner's dtype and device, to H v.
        lr: the lr of the optimizer, a factor of G.
        samples: number of random vectors, at least 1.
        generator: source of the vectors, on the preconditioner's device; torch's default one if None.

    Raises:
        ValueError: if `samples` is less than 1.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    theta = preconditioner.theta
    total = 0.0
    for _ in range(samples):
        v = torch.randn(preconditioner.size, dtype=theta.dtype, device=theta.device, generator=generator)
        v /= torch.linalg.vector_norm(v)
        residual = v - lr * preconditioner.matvec(hvp(v).detach())
        total += float(torch.dot(residual, residual))
    return (total / samples) ** 0.5


def spectrum(
    preconditioner: Operator, *, probes: int = 4, iterations: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """An estimate of the distribution of the eigenvalues of the operator (the optimizer's G is lr times it).

    Stochastic Lanczos quadrature: from each of `probes` random sign vectors, `iterations` products with the operator.
    The mean of f over the eigenvalues is about `(weights * f(eigenvalues)).sum()`; exactly so for the identity, and for
    every operator once `iterations` reaches n, up to the choice of the probes. The smallest and the largest of the
    returned values lie inside the true spectrum and are close to its ends after a few iterations.

    Args:
        preconditioner: acts on R^n.
        probes, iterations: at least 1; the cost is probes * iterations products and an (iterations, n) workspace.
        seed: of the probes. torch's global generators are left alone.

    Returns:
        eigenvalues, ascending, and their weights, which sum to 1: float64, on the CPU, of equal length, at most
        probes * iterations.

    Raises:
        ValueError: if `probes` or `iterations` is less than 1, or n is 0.
    """
    if preconditioner.size == 0:
        raise ValueError("preconditioner must act on at least one parameter to have a spectrum, got size 0")
    for name, value in (("probes", probes), ("iterations", iterations)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    generator = torch.Generator("cpu").manual_seed(seed)
    found = []
    for _ in range(probes):
        bits = torch.randint(0, 2, (preconditioner.size,), generator=generator, dtype=torch.int8, device="cpu")
        signs = bits * 2 - 1
        found.append(_lanczos(preconditioner, signs.to(preconditioner.theta), iterations))
    eigenvalues = torch.cat([values for values, _ in found])
    weights = torch.cat([weights for _, weights in found]) / probes
    order = eigenvalues.argsort()
    return eigenvalues[order], weights[order]


def _lanczos(operator: Operator, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The eigenvalues of the tridiagonal matrix that Lanczos' method makes, and the squares of the first components of
    its eigenvectors (Golub and Welsch): nodes and weights of the Gauss quadrature for `start`."""
    basis = start.new_empty(min(iterations, operator.size), operator.size)
    basis[0] = start / torch.linalg.vector_norm(start)
    diagonal: list[float] = []
    offdiagonal: list[float] = []
    for i, q in enumerate(basis):
        w = operator.apply(q)
        diagonal.append(float(torch.dot(w, q)))
        for _ in range(2):  # against all earlier ones, twice: rounding would bring copies of eigenvalues back
            w -= basis[: i + 1].T @ (basis[: i + 1] @ w)
        length = float(torch.linalg.vector_norm(w))
        scale = max(map(abs, diagonal))
        if i + 1 == len(basis) or not length > 100 * torch.finfo(w.dtype).eps * scale:
            break  # an invariant subspace: the quadrature is exact
        offdiagonal.append(length)
        basis[i + 1] = w / length
    on_host: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    between = torch.tensor(offdiagonal, **on_host)
    matrix = torch.diag(torch.tensor(diagonal, **on_host)) + torch.diag(between, 1) + torch.diag(between, -1)
    if not matrix.isfinite().all():
        return torch.full((1,), math.nan, **on_host), torch.ones(1, **on_host)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors[0].square()


def figures(group: dict[str, Any], live: GroupState, probes: int, iterations: int) -> dict[str, float]:
    """The figures of `LODO.diagnostics` for one param group."""
    network, operator, flat, params = live.network, live.operator, live.flat, group["params"]
    live.momentum.load_()
    if flat.size == 0:
        return {}  # of a sharded group: this rank has nothing of it
    moves = [p.grad is not None and p.numel() > 0 for p in params]
    moves = moves if any(moves) else [True] * len(moves)
    lr, at = float(group["lr"]), live.resting()
    last_lr = at.per_element(lambda cohort: cohort.last_lr, live.gradient) if network.is_elementwise else at.last_lr
    m, g, x = live.momentum.m, flat.new_vector(), flat.new_vector()
    flat.gather(flat.tensors(params), flat.views(x))
    seconds: dict[str, float] = {}
    with _timed("seconds_gather", seconds, flat.device):
        flat.gather(flat.gradients(params), flat.views(g))
    if group["maximize"]:
        g.neg_()
    with _timed("seconds_apply", seconds, flat.device):
        step = operator.rotate_back_(operator.apply(m).mul_(last_lr * float(live.unit)))
    for vector in (step, x):
        flat.mask_(flat.views(vector), moves)
    eigenvalues, weights = spectrum(operator, probes=probes, iterations=iterations)
    result = {
        "steps": float(live.counts.step.tensor.max()),
        "skipped_steps": float(live.counts.skipped.tensor.max()),
        "lr": lr,
        "step_norm": float(norm(step)),
        "relative_step_norm": _ratio(norm(step), norm(x)),
        "gradient_norm": float(norm(g)),
        "step_gradient_cosine": _cosine(step, g),
        "eigenvalue_min": lr * float(eigenvalues[0]),
        "eigenvalue_max": lr * float(eigenvalues[-1]),
        "trace": lr * flat.size * float((weights * eigenvalues).sum()),
    }
    if isinstance(network, BlockPermutation):
        result["singular_value_min"], result["singular_value_max"] = extremes(network.theta)
    for part in live.parts:
        result.update(part.figures())
    if group["meta_lr"] > 0 and network.theta.numel() > 0:
        e = live.momentum.judged
        if isinstance(operator, Composite):
            e, root = (
                e * float(live.unit),
                operator.root(at),
            )  # gradients of their own size, of what is kept
            g, e = operator.unscale(operator.rotate(g)) * root, e * root
        h = _hypergradient(network, g, e, last_lr, seconds)
        result["hypergradient_norm"] = float(norm(h.flatten()))
    return {**result, **seconds}


def _hypergradient(network: Preconditioner, g: Tensor, m: Tensor, lr: Any, seconds: dict[str, float]) -> Tensor:
    """h = -d/dtheta <g, G(theta) m>, of theta's shape, by the kernels that learn from it: with these rates the inner
    Adam moves nothing, and its first moment becomes h. On a copy, for an h that overflows would still ruin theta."""
    twin = type(network).wrap(network.theta.clone(), network.permutations_stored, network.size)
    moments = inner_optimizer.start_moments(twin.theta)
    rates = inner_optimizer.Rates(step_size=0.0, forget1=1.0, keep2=1.0, forget2=0.0, count=1)
    twin.learn_(g, m, lr, moments, rates)  # makes the memory that kernels keep between calls
    with _timed("seconds_learn", seconds, g.device):
        twin.learn_(g, m, lr, moments, rates)
    return moments[0]


@contextmanager
def _timed(name: str, seconds: dict[str, float], device: torch.device) -> Iterator[None]:
    _synchronize(device)
    begin = time.perf_counter()
    yield
    _synchronize(device)
    seconds[name] = time.perf_counter() - begin


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _ratio(numerator: Any, denominator: Any) -> float:
    return float(numerator) / float(denominator) if denominator > 0 else math.nan


def _cosine(a: Tensor, b: Tensor) -> float:
    value = _ratio(torch.dot(a, b), norm(a) * norm(b))
    return value if math.isnan(value) else max(-1.0, min(value, 1.0))  # rounding may lead out of [-1, 1]
