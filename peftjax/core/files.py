"""Durable and atomic file writes: after a power cut, a file that was reported as written is complete."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a file in an OSError that names none, such as from a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def scratch_beside(directory: Path) -> Iterator[Path]:
    """Create a directory beside another, to be filled and moved there. What is left of it is removed at the end."""
    scratch = directory.with_name(f".{directory.name}.peftjax-tmp")
    shutil.rmtree(scratch, ignore_errors=True)  # left behind by a process that was killed
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace the contents of a file atomically.

    The text is written to a temporary file beside it, synced to disk and renamed. An interrupted or failed write leaves
    the previous file unchanged. Characters that cannot be encoded as UTF-8 are escaped.

    Raises:
        OSError: The file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    with naming(partial), partial.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Write a directory's entries to disk. Without this, a power cut can undo the creation or the renaming of a file."""
    with contextlib.suppress(OSError):  # file systems that cannot do this
        _sync(path)


def sync_files(directory: Path) -> None:
    """Write the files in a directory and its entries to disk, without its subdirectories."""
    for path in directory.iterdir():
        if path.is_file():
            _sync(path)
    sync_directory(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
