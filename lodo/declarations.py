"""What networks (`lodo.preconditioners`) and parts (`lodo.parts`) declare of themselves: their options and their state.

An option is an argument of the optimizer that each param group has its own value of. A slot is one kind of tensor in
the state. The slots that a group's options ask for (`lodo.state.layout.slots_of`) are the one source of truth: shapes
and dtypes, what is saved, what is checked when it is loaded and how it lies on shards all follow from them.
"""

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

Options = Mapping[str, Any]
"""The options of a param group."""


class Kind(Enum):
    """Whose a slot is, and how its tensors lie in memory; n elements, k parameters in a group."""

    ELEMENTS = "a number for each element of a parameter: (*lead, *shape), views of one (*lead, n) tensor"
    TABLE = "a few numbers for each parameter: views of one (k, ...) tensor"
    PACKED = "so many numbers for a parameter as follow from its shape: views of one (total,) tensor"
    NETWORK = "of the whole group, in the state of one of its parameters"


class Dtype(Enum):
    """What a slot is kept in."""

    COMPUTED = "float32, or float64 for groups with a float64 parameter"
    MOMENTUM = "as the option `momentum_dtype` has it"
    MOMENTS = "as the option `meta_state_dtype` has it"
    WIDE = "float64 where the device has it"
    COUNT = "int64"
    INDEX = "int32"
    FLAG = "uint8"


@dataclass(frozen=True)
class Slot:
    """One kind of tensor in the state.

    Attributes:
        name: its key in the state of a parameter.
        kind: whose it is.
        shape: the leading dimensions of ELEMENTS, the shape of a TABLE.
        sizes: of PACKED: numbers for each parameter, from the shapes of all.
        network_shape: of NETWORK: from the number of parameters and the options.
        dtype: what it is kept in.
        low, high: between which its numbers lie.
        may_be_infinite: it is made of parameters, which may hold infinity, as masks do.
        outlives_shards: it goes on with another number of shards; a TABLE as one rank has it.
        squares: which rows of a table hold second moments, which are not negative.
        powers: it is multiplied by factor ** power when the unit of gradients changes; for a TABLE with rows, theirs.
    """

    name: str
    kind: Kind = Kind.ELEMENTS
    shape: tuple[int, ...] = ()
    sizes: Callable[[Sequence[torch.Size]], list[int]] | None = None
    network_shape: Callable[[int, Options], tuple[int, ...] | None] | None = None
    dtype: Dtype = Dtype.COMPUTED
    low: float = -math.inf
    high: float = math.inf
    may_be_infinite: bool = False
    outlives_shards: bool = False
    squares: tuple[int, ...] = ()
    powers: tuple[int, ...] = (0,)

    @property
    def is_whole(self) -> bool:
        """Whether it holds whole numbers."""
        return self.dtype in (Dtype.COUNT, Dtype.INDEX, Dtype.FLAG)

    def room(self, ranks: Iterable[Sequence[torch.Size]]) -> list[int]:
        """How many numbers each parameter has of a PACKED slot: as many as on the rank that needs most, for that is how
        they lie in a DTensor of all ranks (`lodo.state.sharding`).

        Args:
            ranks: the shapes of all parameters, or of their shards, on each rank.
        """
        assert self.sizes is not None
        return [max(numbers) for numbers in zip(*map(self.sizes, ranks), strict=True)]


class Role(Enum):
    """When an option may change."""

    CHANGEABLE = "at any step, by a schedule for example"
    FIXED = "not for a param group that has state with it"
    START = "at any time, but it matters only when state is made"


Check = Callable[[str, Any], None]
"""Raises a ValueError that names the option, its value and what is allowed."""


@dataclass(frozen=True)
class Option:
    """An argument of the optimizer.

    Attributes:
        default: that of `lodo.LODO`.
        check: what values are allowed.
        role: when it may change.
        shapes_state: whether the slots depend on it.
        plain: what makes a plain number or string of an allowed value, as param groups hold them.
    """

    default: Any
    check: Check
    role: Role = Role.CHANGEABLE
    shapes_state: bool = False
    plain: Callable[[Any], Any] = lambda value: value


def number(low: float, high: float = math.inf, or_none: bool = False) -> Check:
    """Numbers >= low and < high."""

    def check(name: str, value: Any) -> None:
        if or_none and value is None:
            return
        try:
            found = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
        except OverflowError:
            found = math.inf
        if not low <= found < high:
            upper = "finite" if high == math.inf else f"< {high}"
            raise ValueError(
                f"{name} must be a number >= {low} and {upper}{' or None' if or_none else ''}, got {value!r}"
            )

    return check


def integer(low: int, or_none: bool = False) -> Check:
    """Integers of at most 63 bits >= low."""

    def check(name: str, value: Any) -> None:
        if or_none and value is None:
            return
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**63:
            raise ValueError(f"{name} must be an int >= {low}, got {value!r}")

    return check


def one_of(*allowed: str | None) -> Check:
    """One of these strings (or None)."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, str | None) or value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")

    return check


def flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be a bool, got {value!r}")


def as_float(value: Any) -> Any:
    """A float of any number: NumPy's would not pass `torch.load(weights_only=True)`."""
    return value if isinstance(value, torch.Tensor | int | None) else float(value)
