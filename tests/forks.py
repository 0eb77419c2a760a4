"""Commands in processes that are forked from one that has already imported what they need.

A new process spends most of its time on imports. A forked one has a process ID of its own, its own JAX and its own threads,
and can be killed as any other. What a command does while it imports cannot be seen here: see `tests.runs.start`. Its report
has no charts.
"""

import atexit
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

# Imports only: JAX starts its threads with the first array, and a process with threads must not fork.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "peftjax.train", "peftjax.sweep", "peftjax.evaluate", "peftjax.report.page", "jinja2", "grain", "tensorboardX",
        "transformers.models.auto.tokenization_auto", "transformers.models.llama.configuration_llama",
    ]
)  # fmt: skip


class Fork:
    """A command in a forked process, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, command: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        handle, name = tempfile.mkstemp(prefix="peftjax-test-", suffix=".txt")
        os.close(handle)
        self._output = Path(name)
        self._process = _CONTEXT.Process(target=_run, args=(command, arguments, dict(environment), name))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        with self:
            self.wait(timeout)
            return self._output.read_text(), None

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait()
        self._output.unlink(missing_ok=True)


def _run(command: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    """What the forked process does: `python -m peftjax.COMMAND ARGUMENTS`, with its output in a file."""
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.environ |= environment
    # what is left of a distributed run waits that long for a killed process
    importlib.import_module("peftjax.core.distributed").HEARTBEAT = 10
    importlib.import_module("peftjax.report.page").make_charts = lambda *_: []  # a tenth of the time of a small run
    sys.argv = [f"peftjax.{command}", *arguments]
    try:
        importlib.import_module("peftjax.core.cli").run(importlib.import_module(f"peftjax.{command}").main)
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends a process without them
