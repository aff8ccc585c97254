"""The parts of a step beside the network. To add one: a file here, and a line in PARTS."""

from collections.abc import Container

from lodo.declarations import Options
from lodo.parts.average import Average
from lodo.parts.eigenbasis import Eigenbasis
from lodo.parts.mixture import Mixture
from lodo.parts.momentum import Momentum
from lodo.parts.part import Layout, Part, Undone
from lodo.parts.record import Record
from lodo.parts.second_moment import SecondMoment
from lodo.parts.tensor_scale import TensorScale

PARTS: tuple[type[Part], ...] = (SecondMoment, Eigenbasis, TensorScale, Momentum, Mixture, Average)
"""All there are, in the order in which their hooks are called."""


def parts_of(options: Options, found: Container[str] = ()) -> tuple[type[Part], ...]:
    """Those that the options of a param group ask for: exactly one of them is a `Momentum`.

    Those of which there is state go on to be used: `found` is the names of what there is. One gives way to another that
    is of a kind with it.

    Raises:
        ValueError: if the options no longer ask for such a part, and may not change.
    """
    used = [part for part in PARTS if part.is_used(options)]
    used = [part for part in used if not any(issubclass(other, part) and other is not part for other in used)]
    names = {slot.name for part in used for slot in part.slots(options, found)}
    for part in PARTS:
        has_state, is_wanted = part.mark in found, part.mark in names
        if part.fixed_by is not None and has_state != is_wanted and "step" in found:
            raise ValueError(
                f"{part.fixed_by} must stay what it was for a param group that has state with it, got "
                f"{options[part.fixed_by]!r}"
            )
        if has_state and not is_wanted:
            used.append(part)
    used.sort(key=PARTS.index)
    return (*used, Record) if any(part.needs_record for part in used) else tuple(used)


__all__ = ["PARTS", "Average", "Layout", "Momentum", "Part", "Record", "Undone", "parts_of"]
