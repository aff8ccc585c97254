"""LODO: a PyTorch optimizer that learns its inverse Hessian while it optimizes."""

from lodo.auto_lodo import AutoLODO
from lodo.diagnostics import hessian_error, spectrum
from lodo.optimizer import LODO
from lodo.options import RECOMMENDED
from lodo.preconditioners import BlockPermutation, Diagonal, Identity, LogDiagonal, Residual, Scalar
from lodo.schedules import cooldown

__all__ = [
    "LODO",
    "RECOMMENDED",
    "AutoLODO",
    "BlockPermutation",
    "Diagonal",
    "Identity",
    "LogDiagonal",
    "Residual",
    "Scalar",
    "cooldown",
    "hessian_error",
    "spectrum",
]
__version__ = "0.1.0"
