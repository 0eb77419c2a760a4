"""How busy the machine is with other processes (from /proc, so Linux only)."""

import os
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
LIMIT = 0.05  # share of the machine that other processes may use in a measurement


class Others:
    """The share of the machine's processor time that processes other than some children use.

    Args:
        children: Process ids of the children, which have no children of their own.
    """

    def __init__(self, *children: int) -> None:
        self._children = children
        self._started, self._busy = time.monotonic(), self._others()

    def share(self) -> float:
        """The share since this object was made."""
        seconds = time.monotonic() - self._started
        return max(0.0, self._others() - self._busy) / (seconds * len(os.sched_getaffinity(0)))

    def _others(self) -> float:
        """Seconds of processor time that were not idle and not spent by this process and its children."""
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        total = sum(fields) - fields[3] - fields[4]  # without idle and iowait
        own = sum(_ticks(Path(f"/proc/{process}/stat").read_text()) for process in (os.getpid(), *self._children))
        return (total - own) / TICKS


def _ticks(stat: str) -> int:
    """User and system time of a process with all of its threads."""
    fields = stat.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def before(seconds: float = 1.0) -> float:
    """The share that others use now, while this process waits."""
    others = Others()
    time.sleep(seconds)
    return others.share()
