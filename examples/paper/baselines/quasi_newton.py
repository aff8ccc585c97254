"""Quasi-Newton methods without line search: online L-BFGS and BFGS; and the base class of these baselines."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

SCALINGS = ("average", "last")


class FlatOptimizer(Optimizer):
    """An optimizer of one param group, seen as one vector of size n.

    Raises:
        ValueError: for a second param group; unless all parameters are float32 or all float64, on one device.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)

    @property
    def size(self) -> int:
        """n."""
        return sum(p.numel() for p in self._params)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise ValueError(f"params must make one param group, got a second one for {type(self).__name__}")
        super().add_param_group(param_group)
        kinds = sorted({f"{p.dtype} on {p.device}" for p in self._params})
        if len(kinds) > 1 or self._params[0].dtype not in (torch.float32, torch.float64):
            raise ValueError(f"params must be all float32 or all float64, on one device, got {', '.join(kinds)}")

    @property
    def _params(self) -> list[Tensor]:
        return self.param_groups[0]["params"]

    @property
    def _own(self) -> dict[str, Any]:
        """What is kept from step to step, the whole group's: tensors of the parameters' dtype and Python numbers."""
        return self.state[self._params[0]]

    def gradient(self) -> Tensor:
        """A copy of the gradients, shape (n,); a parameter without one counts as zero gradient."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params]
        return torch.cat([grad.detach().reshape(-1) for grad in grads])

    def move(self, step: Tensor) -> None:
        """Adds a step of shape (n,) to the parameters."""
        params = self._params
        parts = step.split_with_sizes([p.numel() for p in params])
        with torch.no_grad():
            for p, part in zip(params, parts, strict=True):
                p.add_(part.view(p.shape))


class OnlineLBFGS(FlatOptimizer):
    """L-BFGS on samples, without line search: Algorithm oLBFGS of Schraudolph, Yu, Guenter (AISTATS 2007), lambda = 0.

    Step t is s = -lr * tau / (tau + t) * B g with B from the two-loop recursion; the pair is s and y, the difference of
    the gradients at x + s and at x on the same sample. It is stored only if s^T y and y^T y are positive and finite.

    Args:
        lr: eta_0, the rate of the first step.
        tau: steps after which the rate has halved; infinity keeps it.
        epsilon: B as long as no pair is stored.
        history: number of pairs that are kept.
        scaling: the multiple of the identity that the recursion starts from: "average" is the mean of
            s^T y / y^T y over the kept pairs (O-LBFGS), "last" that of the last pair (L-BFGS).

    Raises:
        ValueError: for arguments out of range; for params as `FlatOptimizer`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        tau: float = 1e4,
        epsilon: float = 1e-10,
        history: int = 48,
        scaling: str = "average",
    ) -> None:
        _check("lr", lr, lr >= 0, "at least 0")
        _check("tau", tau, tau > 0, "above 0")
        _check("epsilon", epsilon, epsilon > 0, "above 0")
        _check("history", history, isinstance(history, int) and history >= 1, "an integer of at least 1")
        _check("scaling", scaling, scaling in SCALINGS, f"one of {', '.join(SCALINGS)}")
        defaults = {"lr": lr, "tau": tau, "epsilon": epsilon, "history": history, "scaling": scaling}
        super().__init__(params, defaults)

    def step(self, closure: Callable[[], float | Tensor]) -> float:  # type: ignore[override]
        """Takes one step and returns the loss before it.

        Args:
            closure: evaluates the loss of the current sample at the parameters and writes its gradient to their `grad`,
                without adding to what is there. Called at x and at x + s, so it must not draw a new sample.
        """
        group, own = self.param_groups[0], self._own
        if not own:
            self._start(group["history"])
        loss = float(closure())
        gradient = self.gradient()
        rate = group["lr"] * _decay(group["tau"], own["step"])
        s = self._direction(gradient).mul_(-rate)
        self.move(s)
        closure()
        self._store(s, self.gradient().sub_(gradient))
        own["step"] += 1
        return loss

    def _start(self, history: int) -> None:
        like = self._params[0]
        self._own.update(
            step=0,
            row=0,  # where the next pair goes in the ring buffers
            s=like.new_zeros(history, self.size),
            y=like.new_zeros(history, self.size),
            curvatures=like.new_zeros(history),  # s^T y of each pair
            quotients=[],  # s^T y / y^T y of each pair, floats
            inverse=like.new_zeros(history, history),  # see `_direction`; rows and columns of empty slots are zero
        )

    def _direction(self, g: Tensor) -> Tensor:
        """B g, shape (n,).

        The two loops are triangular systems. With the pairs by age, R_ij = s_i^T y_j for i <= j, D the diagonal of R:
        the first loop's alpha solves R alpha = S g, and q = scale * (g - Y^T alpha). The second loop adds S^T delta to
        q, with R^T delta = D alpha - Y q. The inverse of R is kept, in the order of the ring buffers.
        """
        group, own = self.param_groups[0], self._own
        quotients = own["quotients"]
        if not quotients:
            return g * group["epsilon"]
        scale = sum(quotients) / len(quotients) if group["scaling"] == "average" else quotients[own["row"] - 1]
        alpha = own["inverse"] @ (own["s"] @ g)
        q = torch.addmv(g, own["y"].T, alpha, beta=scale, alpha=-scale)
        delta = own["inverse"].T @ torch.addmv(own["curvatures"] * alpha, own["y"], q, alpha=-1)
        return q.addmv_(own["s"].T, delta)

    def _store(self, s: Tensor, y: Tensor) -> None:
        own, history = self._own, self.param_groups[0]["history"]
        curvature, square = float(s @ y), float(y @ y)
        if not (_is_positive(curvature, s.dtype) and _is_positive(square, s.dtype)):
            return
        row, inverse = own["row"], own["inverse"]
        own["row"] = (row + 1) % history
        own["s"][row] = s
        own["y"][row] = y
        own["curvatures"][row] = curvature
        own["quotients"][row : row + 1] = [curvature / square]
        # R loses its first row and column, and so does its inverse; then both get a new last column.
        inverse[row] = 0
        inverse[:, row] = 0
        inverse[:, row] = (inverse @ (own["s"] @ y)).div_(-curvature)
        inverse[row, row] = 1 / curvature


class BFGS(FlatOptimizer):
    """BFGS with the dense inverse Hessian B, without line search: x <- x - lr * B g.

    The pair of a step is the move of the step before and the difference of the two gradients, each on its own sample. A
    pair whose s^T y is not positive and finite is skipped: it would cost B its positive definiteness.

    Args:
        lr: rate.
        initial_scale: B starts as this multiple of the identity.

    Raises:
        ValueError: for arguments out of range; for params as `FlatOptimizer`.
    """

    def __init__(self, params: ParamsT, lr: float = 0.01, initial_scale: float = 1.0) -> None:
        _check("lr", lr, lr >= 0, "at least 0")
        _check("initial_scale", initial_scale, initial_scale > 0, "above 0")
        super().__init__(params, {"lr": lr, "initial_scale": initial_scale})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Takes one step on the gradients in `grad`."""
        group, own = self.param_groups[0], self._own
        gradient = self.gradient()
        if own:
            _bfgs_(own["inverse"], own["move"], gradient - own["gradient"])
        else:
            own["inverse"] = torch.eye(self.size, dtype=gradient.dtype, device=gradient.device)
            own["inverse"].mul_(group["initial_scale"])
        own["gradient"] = gradient
        own["move"] = (own["inverse"] @ gradient).mul_(-group["lr"])
        self.move(own["move"])


def _bfgs_(inverse: Tensor, s: Tensor, y: Tensor) -> None:
    """B <- (I - s y^T / c) B (I - y s^T / c) + s s^T / c with c = s^T y, in place; nothing if the pair is skipped.

    Written as B + s w^T + w s^T.
    """
    curvature = float(s @ y)
    if not _is_positive(curvature, s.dtype):
        return
    by = inverse @ y
    w = s * ((1 + (y @ by) / curvature) / 2)
    w.sub_(by).div_(curvature)
    inverse.addr_(s, w).addr_(w, s)


def _is_positive(product: float, dtype: torch.dtype) -> bool:
    """Whether s^T y (or y^T y) is finite and positive; not below the normal numbers, whose inverse may overflow."""
    return torch.finfo(dtype).tiny <= product < math.inf


def _decay(tau: float, step: int) -> float:
    return 1.0 if tau == math.inf else tau / (tau + step)


def _check(name: str, value: Any, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
