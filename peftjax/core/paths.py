"""Module and parameter names: spelling suggestions and patterns."""

import contextlib
import difflib
import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from peftjax.core.errors import UserError
from peftjax.core.time_limit import time_limit

REGEX = set("*+?()[]{}|^$\\")  # the characters that make a text a regular expression


def suggest(word: str, known: Iterable[str]) -> str:
    """Suggest known names similar to `word`, ignoring case.

    Returns:
        " Did you mean 'x' or 'y'?" with up to three suggestions, or "" if no name is similar. If a name differs in case alone,
        it is the only suggestion.
    """
    lower = {name: name.lower() for name in known}
    similar = difflib.get_close_matches(word.lower(), list(dict.fromkeys(lower.values())), n=3, cutoff=0.6)
    wanted = similar[:1] if similar[:1] == [word.lower()] else similar
    near = [name for one in wanted for name in lower if lower[name] == one][:3]
    return f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def matches(name: str, pattern: str | tuple[str, ...]) -> bool:
    """Whether a module name matches a pattern, by the rule of `target_modules` in Hugging Face PEFT.

    Args:
        name: Dotted module name.
        pattern: A string is a regular expression that must match the whole name. A tuple holds names; each matches the
            module of that name and every module whose dotted name ends in it.
    """
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return not _entries(pattern).isdisjoint(_endings(name))


def last_parts(name: str, count: int) -> str:
    """Return the last parts of a dotted name: "experts.down_proj" with 2."""
    return ".".join(name.split(".")[-count:])


def _endings(name: str) -> list[str]:
    """A dotted name, and the part of it after each of its dots."""
    return [name, *(name[dot.end() :] for dot in re.finditer(r"\.", name))]


@functools.lru_cache
def _entries(pattern: tuple[str, ...]) -> frozenset[str]:
    """The entries of a pattern as a set: experts have tens of thousands of names, and a file may list hundreds of them."""
    return frozenset(pattern)


def first_match(name: str, table: Iterable[tuple[str, Any]], default: Any = None) -> Any:
    """The value of the first pattern in a table that matches a module name, by the rule of `rank_pattern` in Hugging Face PEFT.

    Args:
        name: Dotted module name.
        table: (pattern, value) pairs. A pattern is the full name, its last components, or a regular expression for either.
        default: The result if no pattern matches.
    """
    return next((value for key, value in table if re.match(rf"(.*\.)?({key})$", name)), default)


def applies(entry: tuple[str, Any], names: Iterable[str]) -> bool:
    """Whether a (pattern, value) pair of such a table matches any of the names."""
    return any(first_match(name, (entry,)) is not None for name in names)


def unmatched(names: Iterable[str], pattern: str | tuple[str, ...]) -> list[str]:
    """Return the entries of `pattern` that match none of `names`."""
    if isinstance(pattern, str):
        return [] if any(matches(name, pattern) for name in names) else [pattern]
    endings = {ending for name in names for ending in _endings(name)}
    return [entry for entry in pattern if entry not in endings]


@contextlib.contextmanager
def matching(option: str, *patterns: object) -> Iterator[None]:
    """Context manager for matching names against patterns from a user or a file.

    Raises:
        UserError: A pattern is not a regular expression, or matching takes too long.
    """
    given = ", ".join(repr(pattern) for pattern in patterns if pattern)
    try:
        with time_limit(
            f"{option}: matching layer names against {given} takes too long; replace nested repetitions such as (.*)*, "
            "which take exponential time"
        ):
            yield
    except re.error as error:
        raise UserError(f"{option}: {given} is not a regular expression: {error}") from None
