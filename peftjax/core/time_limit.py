"""A limit on the time and the memory that a pattern or a template from a file may take."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from peftjax.core.errors import UserError
from peftjax.core.units import format_bytes

SECONDS = 10.0
MEMORY = 2 * 2**30  # bytes by which the process may grow in a body that takes a while
_INTERVAL = 0.1  # seconds between two looks at the memory


@contextlib.contextmanager
def time_limit(message: str) -> Iterator[None]:
    """Interrupt the body of a `with` statement that takes `SECONDS` or grows by `MEMORY`, also inside `re`.

    The limit needs a signal, which only the main thread can handle: in other threads there is none. Training therefore reads the
    first record of every source in the main thread. A timer that the program has set itself is restored.

    Raises:
        UserError: The limit is reached. `message` says what takes too long, and what to do about it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    limit, began, memory = SECONDS, time.thread_time(), _resident()

    def stop(number: int, frame: FrameType | None) -> None:
        used = time.thread_time() - began  # less than the wall time if the process is suspended or the machine is busy
        if used >= limit:
            raise UserError(f"{message} (stopped after {limit:g} s)")
        if used >= _INTERVAL / 2 and (grown := _resident() - memory) > MEMORY:
            raise UserError(f"{message} (stopped after it took {format_bytes(grown)} of memory)")
        signal.setitimer(signal.ITIMER_REAL, min(_INTERVAL, limit - used))

    handler = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, min(_INTERVAL, limit))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, handler)


def _resident() -> int:
    """The bytes of memory that this process has in use; 0 where unknown."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        return 0
