"""Names of modules and parameters: near-name suggestions, and patterns that must match something."""

import difflib
import re
from collections.abc import Iterable


def suggest(word: str, known: Iterable[str]) -> str:
    """' Did you mean "x" or "y"?' for the known names nearest to `word`, or '' when none is near."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def matches(name: str, pattern: str | tuple[str, ...]) -> bool:
    """Whether a module's name is meant: a string is a regular expression for the whole name; a tuple holds names, each
    of which means the modules called so or whose dotted name ends so (the rule of Hugging Face PEFT's target_modules).
    """
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == end or name.endswith("." + end) for end in pattern)


def first_match(name: str, table: Iterable[tuple[str, object]]) -> object | None:
    """The value of the table's first key that names the module: an exact name, its ending, or a regular expression for
    such an ending (the rule of Hugging Face PEFT's rank_pattern and alpha_pattern)."""
    for key, value in table:
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return None


def unmatched(names: Iterable[str], pattern: str | tuple[str, ...]) -> list[str]:
    """The entries of `pattern` that match none of `names`."""
    names = list(names)
    entries = (pattern,) if isinstance(pattern, str) else pattern
    return [
        entry
        for entry in entries
        if not any(matches(n, pattern if isinstance(pattern, str) else (entry,)) for n in names)
    ]
