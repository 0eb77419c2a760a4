"""The wall time of a sweep, in sweep_time.json: the sum over all commands that have trained its runs."""

import contextlib
import time
from pathlib import Path

import jax

from peftjax.core import workdir as workdirs
from peftjax.core.files import write_atomically
from peftjax.core.json_numbers import to_json
from peftjax.report.data import read_recorded_object

FILE = "sweep_time.json"


class WallTime:
    """The clock of a command that trains runs of a sweep, from its creation.

    Args:
        workdir: The directory of the sweep.
        shared: Whether other commands may train runs of this sweep at the same time.
    """

    def __init__(self, workdir: Path, *, shared: bool) -> None:
        self._workdir, self._shared, self._since = workdir, shared, time.perf_counter()

    def save(self) -> None:
        """Add the time since the last call to the sweep's wall time, from one process."""
        if jax.process_index() == 0:
            with workdirs.turn(self._workdir) if self._shared else contextlib.nullcontext():
                now = time.perf_counter()
                seconds = read_wall_time(self._workdir) + now - self._since
                write_atomically(self._workdir / FILE, to_json({"seconds": seconds}) + "\n")
                self._since = now


def read_wall_time(workdir: Path) -> float:
    """The wall time of a sweep in seconds; 0 if none is recorded."""
    file = workdir / FILE
    return float(read_recorded_object(file).get("seconds", 0.0)) if file.exists() else 0.0
