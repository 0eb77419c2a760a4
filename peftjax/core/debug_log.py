"""debug.log: what the underlying libraries report about an error that the run itself reports as one line.

When a file of a checkpoint is damaged or a disk is full, orbax and tensorstore log and print a traceback for every array, also
from threads that continue after the error was handled. In the commands, this output goes to a file in the workdir.
"""

import contextlib
import inspect
import logging
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

NAME = "debug.log"
_LOGGERS = ("absl", "asyncio")  # orbax logs with absl


class _Log:
    """The file, once a run has named it; created by the first entry."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._file: TextIO | None = None

    def open(self, path: Path) -> None:
        if path != self.path and self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        self.path = path

    def write(self, text: str) -> bool:
        """Append text; returns False if there is no file. Text that cannot be written, as on a full disk, is lost."""
        self.append(text)
        return self.path is not None

    def append(self, text: str) -> bool:
        """Append text; returns whether it is in the file."""
        if self.path is None:
            return False
        try:
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
            self._file.write(text)
            self._file.flush()
        except OSError:
            return False
        return True


_log = _Log()


def open_in(workdir: Path, process: int) -> None:
    """Set the file for this process of a run. It stays set: threads of the libraries may outlive the run."""
    _log.open(workdir / (NAME if process == 0 else f"debug.{process}.log"))


def record(error: BaseException) -> str:
    """Write the traceback of an error that is reported as one line.

    Returns:
        "; details in PATH" to append to that line, or "" if there is no file or it cannot be written.
    """
    return f"; details in {_log.path}" if _log.append("".join(traceback.format_exception(error))) else ""


def divert() -> None:
    """Send the libraries' log records and stray tracebacks to the file, as soon as there is one. For commands only."""
    if sys.stderr is not None and not isinstance(sys.stderr, _Stderr):
        sys.stderr = _Stderr(sys.stderr)
    if not isinstance(sys.unraisablehook, _UnraisableHook):
        sys.unraisablehook = _UnraisableHook(sys.unraisablehook)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_divert_record)  # has no effect the second time


class _Stderr:
    """stderr without the output of threads that Python did not start, which print the errors of tensorstore's callbacks."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        foreign = isinstance(threading.current_thread(), threading._DummyThread)
        return len(text) if foreign and _log.write(text) else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _UnraisableHook:
    """`sys.unraisablehook`, without the errors of reads that orbax has abandoned."""

    def __init__(self, before: Any) -> None:
        self._before = before

    def __call__(self, unraisable: Any) -> None:
        text = "".join(traceback.format_exception(unraisable.exc_value)) if unraisable.exc_value else "\n"
        if not inspect.iscoroutine(unraisable.object) or not _log.write(f"{unraisable.object!r}: {text}"):
            self._before(unraisable)


def _divert_record(record: logging.LogRecord) -> bool:
    trace = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info and record.exc_info[0] else ""
    return not _log.write(f"{record.name}: {record.getMessage()}\n{trace}")
