"""The parameters of a param group as one flat vector: the R^n that a preconditioner acts on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lodo.parts import Layout
from lodo.state.sharding import (
    Sharding,
    check_sharding,
    is_dtensor,
    is_fsdp1,
    local,
    local_gradient,
    rank_of_fsdp1,
    shapes_on_ranks,
)

SUPPORTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Mesh = tuple[torch.device, Any]
"""A device, and the ranks that parameters there are sharded over: None for none."""


def check_parameters(params: Sequence[Tensor], is_whole: bool = False) -> None:
    """Refuses parameters that LODO cannot flatten: ValueError for sparse, complex or other dtypes, elements that share
    memory, mixed devices and mixed sharding, `is_whole` as for `check_sharding`."""
    for p in params:
        if p.layout != torch.strided:
            raise ValueError(f"LODO does not support sparse parameters, got layout {p.layout}")
        if p.dtype not in SUPPORTED:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED)
            raise ValueError(f"LODO supports parameters of dtype {allowed}, got {p.dtype}")
        # Lazy modules give their parameters a shape later, and the first step looks again.
        if not is_lazy(p) and _overlaps(p):
            raise ValueError(
                "LODO does not support parameters whose elements share memory, "
                f"got shape {tuple(p.shape)} with strides {p.stride()}"
            )
    devices = sorted({str(p.device) for p in params})
    if len(devices) > 1:
        raise ValueError(f"the parameters of one group must be on one device, got {devices}; make one group per device")
    check_sharding(params, is_whole)


def _overlaps(p: Tensor) -> bool:
    """Whether elements may share memory: some stride does not lead past all that the smaller strides reach."""
    reach = 0
    for stride, length in sorted(zip(p.stride(), p.shape, strict=True)):
        if length > 1:
            if stride <= reach:
                return p.numel() > 0
            reach += stride * (length - 1)
    return False


def has_gradients(params: Sequence[Tensor]) -> bool:
    """Whether any parameter with elements has a gradient. Refuses sparse ones, and parameters without data, before
    anything has changed."""
    found = False
    for p in params:
        if p.is_meta:
            raise RuntimeError(
                "LODO cannot step on parameters without data, got device meta; make the optimizer after `to_empty`, "
                "which gives a module new parameters unless FSDP2 has sharded them"
            )
        if p.grad is not None:
            if p.grad.layout != torch.strided:
                raise RuntimeError(f"LODO does not support sparse gradients, got layout {p.grad.layout}")
            found = found or p.numel() > 0
    return found


def is_flattened(params: Sequence[Tensor]) -> bool:
    """Whether this rank has a part of the parameters in which their shapes are lost."""
    return bool(params) and rank_of_fsdp1(params) is not None


def computed_dtype(params: Sequence[Tensor]) -> torch.dtype:
    """The dtype of a group's network: float64 if a parameter is, else float32."""
    return torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32


class FlatParameters:
    """Where each parameter of a group lies in the group's vector, and the copies to and from it.

    Of parameters that are DTensors it takes this rank's parts.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        check_parameters(params)
        self._has_dtensors = any(is_dtensor(p) for p in params)
        self.sharding = Sharding.of(params)
        tensors = self.tensors(params)
        self.size = sum(tensor.numel() for tensor in tensors)
        self.device = params[0].device
        ranks = is_fsdp1(params[0]) or None if self.sharding is None else self.sharding.ranks
        self.mesh: Mesh = (self.device, ranks)
        self._elsewhere = [] if self.sharding is None else shapes_on_ranks(params)
        self.dtype = computed_dtype(params)
        self._made_for = [(tensor.dtype, tensor.shape) for tensor in tensors]
        self.shapes = [tensor.shape for tensor in tensors]
        self.lengths = [tensor.numel() for tensor in tensors]
        self.dtypes = [tensor.dtype for tensor in tensors]
        self.coarsest = max(
            (torch.finfo(dtype).eps for dtype in self.dtypes), default=0.0
        )  # relative spacing of numbers

    @property
    def layout(self) -> Layout:
        """What parts are to know of it."""
        return Layout(self.shapes, self.dtypes, self.dtype, self.device, self._elsewhere)

    def tensors(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """The parameters, or the parts of them that are on this rank."""
        return [local(p) for p in params] if self._has_dtensors else params

    def gradients(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of `tensors(params)`, None where there is none."""
        return [local_gradient(p) for p in params] if self._has_dtensors else [p.grad for p in params]

    def fits(self, params: Sequence[Tensor]) -> bool:
        """Whether the parameters are still what this was made for: number, dtypes, shapes, device."""
        return len(params) == len(self._made_for) and all(
            p.dtype == dtype and p.shape == shape and p.device == self.device
            for p, (dtype, shape) in zip(self.tensors(params), self._made_for, strict=True)
        )

    def new_vector(self) -> Tensor:
        """Zeros of shape (n,)."""
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)

    def views(self, vector: Tensor) -> list[Tensor]:
        """The parts of a vector, each shaped like its parameter."""
        parts = vector.split_with_sizes(self.lengths)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    @staticmethod
    def gather(tensors: Sequence[Tensor | None], views: Sequence[Tensor]) -> None:
        """Copies tensors into the parts of a vector; where there is none the part becomes zero."""
        given = [(view, tensor) for view, tensor in zip(views, tensors, strict=True) if tensor is not None]
        if given:
            torch._foreach_copy_([view for view, _ in given], [tensor for _, tensor in given])
        for view, tensor in zip(views, tensors, strict=True):
            if tensor is None:
                view.zero_()

    @staticmethod
    def mask_(views: Sequence[Tensor], kept: Sequence[bool]) -> None:
        """Zeroes the parts of a vector that are not kept."""
        for view, is_kept in zip(views, kept, strict=True):
            if not is_kept:
                view.zero_()
