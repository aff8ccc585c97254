"""The ways of executing a step, with one interface, that of `Plain`; chosen here and nowhere else."""

from typing import Any

from lodo.update.fused import Fused
from lodo.update.plain import Plain


def update_for(*arguments: Any) -> Plain:
    """The fastest there is for a group; arguments as for `Plain`."""
    plain = Plain(*arguments)
    return Fused(*arguments) if Fused.can_run(plain) else plain


__all__ = ["Fused", "Plain", "update_for"]
