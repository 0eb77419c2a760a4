"""Values as text on the page: numbers, percentages, durations, and strings from outside."""

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any


def format_number(value: float) -> str:
    """Format a number with four significant digits: 0.25, 1,000, 7.33e-8."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"
    return re.sub(r"e(-?)\+?0*", r"e\1", text)


def decimals(spread: float) -> int:
    """Return the number of decimals that show a spread to its second digit."""
    return max(1 - math.floor(math.log10(spread)), 0)


def format_spread(values: Sequence[float]) -> str:
    """Format the mean and, of several values that differ, the standard deviation, to its second digit: 1.905 ± 0.015.

    Values that are not all finite have the mean nan; no values give an empty text.
    """
    if not values:
        return ""
    mean = statistics.fmean(values) if all(map(math.isfinite, values)) else math.nan
    deviation = statistics.stdev(values) if len(values) > 1 and math.isfinite(mean) else 0.0
    if not deviation:
        return format_number(mean)
    digits = decimals(deviation)
    if digits > 6:
        return f"{format_number(mean)} ± {deviation:.1e}"
    return f"{mean:,.{digits}f} ± {deviation:,.{digits}f}"


def format_percent(fraction: float) -> str:
    """Format a fraction as a percentage with three significant digits: 93.8%."""
    return f"{100 * fraction:.3g}%"


def format_duration(seconds: float) -> str:
    """Format a duration: 0.8 s, 42 s, 2 min 31 s, 3 h 12 min."""
    if round(seconds) < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def field_title(name: str) -> str:
    """Return a field of metrics.jsonl as a title: tokens_per_second becomes "Tokens per second"."""
    return name.replace("_", " ").capitalize()


def short_name(field: str, fields: Iterable[str]) -> str:
    """The field without its section, unless that is ambiguous."""
    leaf = field.rpartition(".")[2]
    return leaf if [other.rpartition(".")[2] for other in fields].count(leaf) == 1 else field


def value_text(value: Any) -> str:
    """A value of a field as text, also for the name of a directory."""
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def shorten(text: str, most: int) -> str:
    """The text shortened to a number of characters; "…" replaces the middle."""
    if len(text) <= most:
        return text
    return text[: most // 2] + "…" + text[len(text) - (most - 1 - most // 2) :]
