"""Scales: where the values of a field are on an axis."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from peftjax.core.terminal import printable
from peftjax.report.text import format_number, value_text


class Scale(NamedTuple):
    """Where values are on an axis.

    Attributes:
        kind: "linear", "logarithmic" or "categorical".
        places: The place of each value.
        ticks: Places with their labels.
    """

    kind: str
    places: list[float]
    ticks: list[tuple[float, str]]

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last place."""
        ticks = [place for place, _ in self.ticks] if self.kind == "categorical" else []
        return min([*self.places, *ticks]), max([*self.places, *ticks])

    @property
    def padded(self) -> tuple[float, float]:
        """The ends with a margin."""
        low, high = self.ends
        margin = 0.5 if self.kind == "categorical" else 0.06 * (high - low) or 1.0
        return low - margin, high + margin

    def height(self, place: float) -> float:
        """A place as a fraction of the axis."""
        low, high = self.ends
        return (place - low) / (high - low) if high > low else 0.5


def make_scale(values: Sequence[Any]) -> Scale:
    """The axis of the values of a field.

    It is categorical if they are not all finite numbers: numbers in ascending order, then the others in the order of their
    first occurrence. It is logarithmic if they are positive, span a factor of 10 or more, and are not more evenly spread on a
    linear axis.
    """
    if not all(map(_is_number, values)):
        ordered = sorted(values, key=lambda value: (0, value) if _is_number(value) else (1, 0))
        names = list(dict.fromkeys(printable(value_text(value)) for value in ordered))
        places = [float(names.index(printable(value_text(value)))) for value in values]
        return Scale("categorical", places, list(enumerate(names)))
    low, high = min(values), max(values)
    log = low > 0 and high >= 10 * low and _skew([*map(math.log, values)]) <= _skew(values)
    place = math.log10 if log else float
    marked = sorted(set(values))
    if len(marked) > 6:
        marked = _decades(low, high) if log else _round_values(low, high)
    ticks = [(place(value), format_number(value)) for value in marked]
    return Scale("logarithmic" if log else "linear", [place(value) for value in values], ticks)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _skew(values: Sequence[float]) -> float:
    """The distance of the median from the middle of the range, as a fraction of the range, to six digits."""
    low, high = min(values), max(values)
    return round(abs(statistics.median(values) - (low + high) / 2) / (high - low), 6)


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten in a range; if it spans less than a factor of 1000, also three times these."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 3) if high < 1000 * low else (1,)
    return [value for power in powers for factor in factors if low <= (value := float(f"{factor}e{power}")) <= high]


def _round_values(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    return [value for value in MaxNLocator(5).tick_values(low, high) if low <= value <= high]
