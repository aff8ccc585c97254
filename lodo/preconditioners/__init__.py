"""The four preconditioners of the paper, and two more, by name."""

from lodo.preconditioners.base import Operator, Preconditioner
from lodo.preconditioners.block_permutation import BlockPermutation
from lodo.preconditioners.composite import Composite
from lodo.preconditioners.diagonal import Diagonal
from lodo.preconditioners.identity import Identity
from lodo.preconditioners.log_diagonal import LogDiagonal
from lodo.preconditioners.residual import Residual
from lodo.preconditioners.scalar import Scalar

BY_NAME: dict[str, type[Preconditioner]] = {
    cls.kind: cls for cls in (BlockPermutation, Residual, Diagonal, Scalar, LogDiagonal, Identity)
}

__all__ = [
    "BY_NAME",
    "BlockPermutation",
    "Composite",
    "Diagonal",
    "Identity",
    "LogDiagonal",
    "Operator",
    "Preconditioner",
    "Residual",
    "Scalar",
]
