"""Lists in messages: the first of some names, and how many more there are."""

from collections.abc import Sequence
from pathlib import Path


def enumerate_some(names: Sequence[str], limit: int = 20) -> str:
    """Join the first `limit` names with commas, and say how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def listing(directory: Path) -> str:
    """Name the first entries of a directory, for messages."""
    return enumerate_some(sorted(entry.name for entry in directory.iterdir()), 10) or "no files"
