"""What a preconditioner is: a learned symmetric operator on R^n that stands in for the inverse Hessian."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Container
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from lodo.declarations import Dtype, Kind, Options, Slot
from lodo.inner_optimizer import Moments, Rates
from lodo.scalars import Number


class Operator(ABC):
    """A symmetric operator on R^n, of which the optimizer's G is lr times. `theta` is what a network has learned."""

    theta: Tensor
    size: int

    @abstractmethod
    def apply(self, v: Tensor) -> Tensor:
        """The operator times v, for v of shape (n,), of theta's dtype and on its device, both in the coordinates that
        `rotate` leads to. Returns new memory."""

    def rotate(self, v: Tensor) -> Tensor:
        """A vector of shape (n,), in the orthogonal coordinates in which the optimizer computes."""
        return v

    def rotate_back_(self, v: Tensor) -> Tensor:
        """The inverse of `rotate`; v is used up."""
        return v

    def precondition(self, g: Tensor) -> Tensor:
        """The preconditioned gradient that its parts learn from: the operator times a rotated gradient, without the
        scales of the parameters, if there are any (see `lodo.parts.tensor_scale`)."""
        return self.apply(g)

    @abstractmethod
    def learn_(self, g: Tensor, m: Tensor, lr: Number, moments: Moments | None, rates: Rates) -> None:
        """One inner step of `theta` along h = -d/dtheta <g, G m>, with G = lr times this operator (Algorithm 1).

        Args:
            g, m: gradient and momentum, shape (n,), theta's dtype, rotated.
            lr: of the step that led to where `g` was taken; of elementwise networks it may be of shape (n,).
            moments: of the inner Adam, None for the inner SGD; updated in place.
            rates: of this inner step.
        """

    @abstractmethod
    def bound_condition_(self, largest: float) -> None:
        """Moves `theta` so that all eigenvalues of the network lie in [largest ** -0.5, largest ** 0.5], as they do at
        the start: its condition number is at most `largest` then. What is inside keeps its bits.

        Raises:
            NotImplementedError: if this kind of preconditioner has no such bound.
        """

    @torch.no_grad()
    def matvec(self, v: Tensor) -> Tensor:
        """The operator (the optimizer's G is lr times it) times `v` of shape (n,), in theta's dtype.

        Raises:
            ValueError: if `v` is not of shape (n,).
        """
        if v.shape != (self.size,):
            raise ValueError(f"v must have shape ({self.size},), got {tuple(v.shape)}")
        return self.rotate_back_(self.apply(self.rotate(v.detach().to(self.theta).resolve_neg())))

    def to_dense(self) -> Tensor:
        """The operator as an (n, n) matrix, one matvec per column: for small n."""
        identity = torch.eye(self.size, dtype=self.theta.dtype, device=self.theta.device)
        return torch.stack([self.matvec(column) for column in identity], dim=1)


class Preconditioner(Operator):
    """A learned G / lr, (n, n): it starts, applies itself, learns from its hypergradient and shows itself dense.

    `theta` holds everything that is learned, in the layout that the kernels like; the public attributes of the
    subclasses give copies in the layout of the paper. `permutations_stored` holds fixed int32 indices where a
    subclass has any. A preconditioner read from an optimizer is the optimizer's own and goes on learning:
    `copy.deepcopy` keeps a snapshot.
    """

    kind: ClassVar[str]
    is_elementwise: ClassVar[bool] = False
    """Whether it is diagonal, and so consists of what belongs to one parameter each: it is kept there."""
    learns: ClassVar[bool] = True
    has_bound: ClassVar[bool] = True
    """Whether there is `bound_condition_`."""
    bound: ClassVar[float] = 0.0
    """Of the logarithms of one that is a diagonal of exponentials."""
    rate_cap: ClassVar[float | None] = None
    """What meta_lr is capped by (`lodo.inner_optimizer.capped`)."""

    def __init__(self, theta: Tensor, permutations: Tensor | None, size: int) -> None:
        """Wraps tensors in storage layout without a copy."""
        self.theta = theta
        self.permutations_stored = permutations
        self.size = size

    @classmethod
    def wrap(cls, theta: Tensor, permutations: Tensor | None, size: int) -> Self:
        """A preconditioner over stored tensors, which it shares."""
        self = cls.__new__(cls)
        Preconditioner.__init__(self, theta, permutations, size)
        return self

    @classmethod
    @abstractmethod
    def start(cls, size: int, options: Options, dtype: torch.dtype, device: torch.device) -> Self:
        """The initial preconditioner on R^size that the options of a param group ask for."""

    @classmethod
    @abstractmethod
    def theta_shape(cls, size: int, options: Options) -> tuple[int, ...]:
        """The shape of `theta` that `start` would give."""

    @classmethod
    def permutations_shape(cls, size: int, options: Options) -> tuple[int, int] | None:
        """The shape of `permutations_stored` that `start` would give, None if it stores no indices."""
        return None

    @classmethod
    def slots(cls, options: Options, found: Container[str] = ()) -> tuple[Slot, ...]:
        """What is kept of it, and of its inner optimizer, for a group with these options, where `found` is the names
        of what there is already."""
        kind = Kind.ELEMENTS if cls.is_elementwise else Kind.NETWORK
        counts = Kind.TABLE if cls.is_elementwise else Kind.NETWORK
        uses_adam = options["meta_lr"] > 0 and options["meta_optimizer"] == "adam"
        slots = []
        if cls.learns:
            slots.append(Slot("theta", kind, network_shape=cls.theta_shape))
            slots.append(Slot("meta_step", counts, network_shape=_scalar, dtype=Dtype.COUNT, low=0.0))
        if cls.permutations_shape(1, options) is not None:
            shape = cls.permutations_shape
            slots.append(Slot("permutations", kind, network_shape=shape, dtype=Dtype.INDEX, low=0.0))
        if cls.learns and (uses_adam or "theta_exp_avg" in found):
            mean = Slot("theta_exp_avg", kind, network_shape=cls.theta_shape, dtype=Dtype.MOMENTS, powers=(1,))
            slots += [mean, replace(mean, name="theta_exp_avg_sq", low=0.0, powers=(2,))]
        slots.append(Slot("last_lr", counts, network_shape=_scalar, dtype=Dtype.WIDE))
        if not cls.is_elementwise:  # what belongs to parameters goes by their steps
            slots.append(Slot("network_step", counts, network_shape=_scalar, dtype=Dtype.COUNT, low=0.0))
        return tuple(slots)

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The options of a param group that describe this preconditioner."""

    def bound_condition_(self, largest: float) -> None:
        raise NotImplementedError(f"{type(self).__name__} has no bound on its condition")

    def learn_logarithms_(self, response: Tensor, m: Tensor, lr: Number, moments: Moments | None, rates: Rates) -> None:
        """`learn_` of an elementwise network from G g / lr, in place of g, which it overwrites: h = -lr * response * m.

        That is what its hypergradient is where it is one factor of many of a diagonal G, and learns its logarithm.
        """
        raise NotImplementedError(f"{type(self).__name__} is no diagonal of exponentials")

    def to(self, dtype: torch.dtype, device: torch.device) -> Self:
        """A copy with theta in `dtype`, on `device`."""
        indices = self.permutations_stored
        indices = None if indices is None else indices.to(device, copy=True)
        return type(self).wrap(self.theta.to(device, dtype, copy=True), indices, self.size)

    def __repr__(self) -> str:
        described = ", ".join(f"{name}={value!r}" for name, value in self.options.items() if name != "preconditioner")
        return f"{type(self).__name__}(size={self.size}{', ' if described else ''}{described}, {self.theta.dtype})"


def _scalar(size: int, options: Options) -> tuple[int, ...]:
    return ()


def as_tensor(name: str, value: Any) -> Tensor:
    """What a user gives for a tensor, as a dense one; itself if it is one."""
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a tensor, got {value!r}") from error
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    return tensor


def as_theta(name: str, value: Any, dims: int) -> Tensor:
    """A detached copy of a learned tensor that a user gives, checked: `dims` dimensions, float32 or float64."""
    tensor = as_tensor(name, value).detach().clone(memory_format=torch.contiguous_format)
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64, got {tensor.dtype}")
    return tensor


def as_permutations(value: Any, layers: int, padded: int, device: torch.device) -> Tensor:
    """A checked int32 copy of index permutations of shape (layers, padded)."""
    tensor = as_tensor("permutations", value).to(device)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"permutations must be integers, got {tensor.dtype}")
    if tensor.shape != (layers, padded):
        raise ValueError(f"permutations must have shape ({layers}, {padded}), got {tuple(tensor.shape)}")
    tensor = tensor.to(torch.int64)  # torch sorts and compares no unsigned numbers of more than 8 bits
    if not torch.equal(tensor.sort(dim=1).values, torch.arange(padded, device=device).expand(layers, padded)):
        raise ValueError(f"every row of permutations must hold each of 0 .. {padded - 1} once")
    return tensor.to(torch.int32, copy=True)


def random_permutations(layers: int, padded: int, generator: np.random.Generator) -> Tensor:
    """Uniformly random permutations, int32 of shape (layers, padded), on the CPU."""
    if padded >= 2**31:
        raise ValueError(f"random permutations reach 2**31 - 1 coordinates, got {padded}; use permutation='shuffle'")
    rows = torch.empty(layers, padded, dtype=torch.int32, device="cpu")
    for row in rows:
        row.copy_(torch.from_numpy(generator.permutation(padded)))
    return rows


def check_size(size: Any, padded: int) -> int:
    """`size` as an int, checked: 1 <= size <= padded."""
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= padded:
        raise ValueError(f"size must be an int with 1 <= size <= {padded}, got {size!r}")
    return size


def padded_size(size: int, expansion: float, block: int) -> int:
    """n~, the smallest multiple of `block` that is at least expansion * size."""
    if not expansion * size < sys.float_info.max:
        raise ValueError(f"expansion times the number of parameters must be finite, got {expansion!r} times {size}")
    # A ratio n~ / n is a legal expansion and must give n~ back in spite of rounding.
    return block * max(1, -int(-(expansion * size * (1 - 1e-12)) // block))
