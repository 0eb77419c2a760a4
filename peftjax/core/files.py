"""Atomic file writes."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace the contents of a file atomically.

    The text is written to a temporary file beside it, synced to disk and renamed. An interrupted or failed write leaves
    the previous file unchanged.

    Args:
        path: File to create or replace.
        text: New contents, written as UTF-8. Characters that cannot be encoded are escaped.

    Raises:
        OSError: The file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
