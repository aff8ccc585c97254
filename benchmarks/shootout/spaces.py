"""What is tuned of a contender: ranges that widen where the best setting stands at their end, and choices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

EDGE = 1.12  # a setting within this factor of its range's end stands there
HALF_DECADE = 10**0.5
ROUNDING = 1 + 1e-6


@dataclass(frozen=True)
class Range:
    """Where a hyperparameter is searched, log-uniformly.

    Attributes:
        default: what it is while the learning rate is scanned.
        is_decay: the number is 1 minus what is searched, as for a momentum.
        floor, ceiling: how far the range may be widened.
        is_off_below: at the range's lower end the hyperparameter is 0, so that this end need not be widened.
    """

    low: float
    high: float
    default: float
    is_decay: bool = False
    floor: float = 0.0
    ceiling: float = float("inf")
    is_off_below: bool = False

    def value(self, position: float) -> float:
        if self.is_off_below and position < self.low * EDGE:
            return 0.0
        return 1 - position if self.is_decay else position

    def has(self, value: float) -> bool:
        return self.low / ROUNDING <= self._place(value) <= self.high * ROUNDING

    def position(self, value: float) -> float:
        """Where in the range a value lies; 1 - (1 - x) may be a rounding outside."""
        return min(max(self._place(value), self.low), self.high)

    def _place(self, value: float) -> float:
        return self.low if self.is_off_below and value == 0 else (1 - value if self.is_decay else value)

    def end_of(self, value: float) -> str | None:
        """At which end a value stands that is no end of what is possible: "low", "high" or None."""
        place = self.position(value)
        if place < self.low * EDGE and self.low > self.floor and not self.is_off_below:
            return "low"
        return "high" if place > self.high / EDGE and self.high < self.ceiling else None

    def widened(self, end: str) -> "Range":
        """Half a decade further."""
        if end == "low":
            return replace(self, low=max(self.low / HALF_DECADE, self.floor))
        return replace(self, high=min(self.high * HALF_DECADE, self.ceiling))


@dataclass(frozen=True)
class Choice:
    """A hyperparameter that is one of a few; the first one while the learning rate is scanned."""

    options: tuple[Any, ...]

    @property
    def default(self) -> Any:
        return self.options[0]


Space = Mapping[str, Range | Choice]


def rate(low: float, high: float, default: float) -> Range:
    return Range(low, high, default, floor=1e-8, ceiling=1e4)


def momentum(default: float, low: float = 1e-2, high: float = 0.5, ceiling: float = 0.9) -> Range:
    """A momentum, searched in 1 minus it. Not every optimizer bears a momentum of 0."""
    return Range(low, high, default, is_decay=True, floor=1e-3, ceiling=ceiling)


def second_decay(default: float, low: float = 1e-4, high: float = 0.2) -> Range:
    """The decay of a second moment, searched in 1 minus it."""
    return Range(low, high, default, is_decay=True, floor=1e-4, ceiling=0.5)


def weight_decay(high: float = 1.0) -> Range:
    """Off by default and below 1e-4 of the upper end."""
    return Range(1e-4 * high, high, 0.0, ceiling=1e3 * high, is_off_below=True)


def defaults(space: Space) -> dict[str, Any]:
    return {name: each.default for name, each in space.items()}


def grid(each: Range) -> list[float]:
    """Positions half a decade apart, from the lower to the upper end."""
    positions = [each.low]
    while positions[-1] * HALF_DECADE < each.high * EDGE:
        positions.append(positions[-1] * HALF_DECADE)
    return positions


def widen(space: Space, best: Sequence[Mapping[str, Any]]) -> Space | None:
    """The space with those ranges widened at whose ends one of the best settings stands; None: there are none."""
    wider = dict(space)
    for name, each in space.items():
        if isinstance(each, Range):
            for end in sorted({found for setting in best if (found := each.end_of(setting[name]))}):
                wider[name] = wider[name].widened(end)  # type: ignore[union-attr]
    return wider if wider != dict(space) else None
