"""A limit on the time that a pattern or a template from a file may take."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from peftjax.core.errors import UserError

SECONDS = 10.0


@contextlib.contextmanager
def time_limit(message: str, seconds: float | None = None) -> Iterator[None]:
    """Interrupt the body of a `with` statement that takes too long, also inside `re`.

    The limit needs a signal, which only the main thread can handle: in other threads there is none. A timer that the
    program has set itself is restored.

    Args:
        message: What takes too long, and what to do about it.
        seconds: The limit; default: `SECONDS`.

    Raises:
        UserError: The limit is reached.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    limit = SECONDS if seconds is None else seconds
    began = time.thread_time()

    def stop(number: int, frame: FrameType | None) -> None:
        if (
            left := limit - (time.thread_time() - began)
        ) > 0:  # the process was suspended, or waited for a busy machine
            signal.setitimer(signal.ITIMER_REAL, left)
            return
        raise UserError(f"{message} (stopped after {limit:g} s)")

    handler = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, handler)
