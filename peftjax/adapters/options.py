"""Checks and conversions that the options of many methods share; every check raises a `UserError`."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

from peftjax.core.errors import UserError
from peftjax.core.paths import REGEX


class Unusual(float):
    """A number that peft accepts in an adapter file, but that a new adapter may not have: an alpha of 0 or below, or a
    dropout rate of 1."""


def from_file(option: str, value: Any) -> Any:
    """The value of an option in an adapter file, marked where it is `Unusual`.

    For peft a string is always a regular expression for whole names: "q_proj" excludes no layer, but ["q_proj"] does.
    """
    if option in ("exclude", "feedforward") and isinstance(value, str) and value and not REGEX & set(value):
        return f"(?:{value})"
    if option == "alpha_pattern" and isinstance(value, Mapping):
        return {name: from_file("alpha", item) for name, item in value.items()}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and ((option == "alpha" and value <= 0) or (option.endswith("dropout") and value == 1)):
        return Unusual(value)
    return value


def unusual(value: Any) -> bool:
    """Whether the value of an option is `Unusual`, or a table with such a value."""
    return isinstance(value, Unusual) or (isinstance(value, tuple) and any(map(unusual, value)))


def check_type(option: str, annotation: Any, value: Any) -> None:
    """Require the type of an option that is a bool, a string or a number. Whole numbers are checked by their range."""
    if annotation is bool and not isinstance(value, bool):
        raise UserError(f"method.{option} must be True or False, got {value!r}")
    if annotation is str and not isinstance(value, str):
        raise UserError(f"method.{option} must be a string, got {value!r}")
    if annotation in (int, float) and (isinstance(value, bool) or not isinstance(value, Real)):
        raise UserError(f"method.{option} must be a number, got {value!r}")


def positive(**options: float) -> None:
    """Require finite numbers above 0."""
    for option, value in options.items():
        low = -math.inf if isinstance(value, Unusual) else 0
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < math.inf:
            raise UserError(f"method.{option} must be a number above 0, got {value!r}")


def positive_integer(**options: int) -> None:
    """Require whole numbers of at least 1."""
    for option, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"method.{option} must be a positive integer, got {value!r}")


def probability(**options: float) -> None:
    """Require dropout rates: at least 0 and below 1."""
    for option, value in options.items():
        if not 0.0 <= value < 1.0 and not isinstance(value, Unusual):
            raise UserError(f"method.{option} must be at least 0 and below 1, got {value!r}")


def seed(bits: int, **options: int) -> None:
    """Require integers that a random generator takes as a seed of so many bits."""
    for option, value in options.items():
        if not isinstance(value, int) or not 0 <= value < 2**bits:
            raise UserError(f"method.{option} must be an integer from 0 to 2**{bits} - 1, got {value!r}")


def one_of(known: Iterable[str], **options: str) -> None:
    """Require one of the known words."""
    words = tuple(known)
    for option, value in options.items():
        if value not in words:
            raise UserError(f"method.{option} must be one of {', '.join(words)}, got {value!r}")


def either_size(block_size: int, blocks: int) -> None:
    """Require exactly one of two options that give the size of blocks; the other one is 0."""
    if (block_size == 0) == (blocks == 0):
        raise UserError(f"method.block_size={block_size} and method.blocks={blocks}: set one of them, the other to 0")
    positive_integer(**({"block_size": block_size} if block_size else {"blocks": blocks}))


def pattern(
    option: str, value: Any, convert: Callable[[Any], Any] = lambda value: value
) -> tuple[tuple[str, Any], ...]:
    """Exceptions by module name, {name: value}, as a hashable tuple of pairs."""
    items = value.items() if isinstance(value, Mapping) else value
    try:
        pairs = [(str(name), item) for name, item in items]
    except (TypeError, ValueError):
        raise UserError(f"method.{option} must be a table {{name: value}}, got {value!r}") from None
    return tuple((name, convert(item)) for name, item in pairs)


def integers(option: str, value: Any) -> tuple[int, ...]:
    """One integer or several, as a tuple."""
    try:
        return tuple(operator.index(item) for item in (value if isinstance(value, Iterable) else (value,)))
    except TypeError:
        raise UserError(f"method.{option} must be an integer or a tuple of integers, got {value!r}") from None


def names_or_pattern(option: str, value: Any) -> str | tuple[str, ...]:
    """A regular expression or a word such as "all-linear" unchanged; names, also comma-separated ones, as a tuple."""
    if isinstance(value, str) and (value.startswith("all-") or REGEX & set(value)):
        return value
    return split_names(option, value, "a name, a tuple of names or a regular expression")


def split_names(option: str, value: Any, expected: str = "a name or a tuple of names") -> tuple[str, ...]:
    """The names in a comma-separated string or in a sequence."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    names = tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"method.{option} must be {expected}, got {value!r}")
    return names
