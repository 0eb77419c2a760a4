"""SIGINT (Ctrl-C) and SIGTERM, handled from the first import to the end of a run.

The commands `train` and `sweep` watch for signals in a thread, which starts when this module is imported:
`peftjax/__init__.py` imports it first. A thread answers while the main thread imports, compiles or waits for a file, where a
handler of Python would not run. It decides by what there is to lose:

- Before the first step there is nothing to save, and the process exits.
- Between the first step and the end, the signal is noted. The training loop saves and stops (core/preemption.py).
- A second SIGINT ends the process. Checkpoints are complete or absent, so that the last complete one remains.

This module imports little more than the standard library, so that it is loaded at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from peftjax.core.command import command

PREEMPTED = 75  # exit code after SIGTERM: EX_TEMPFAIL of sysexits.h, "try again"
INTERRUPTED = 130  # exit code after SIGINT, as shells report it
NUMBERS = (signal.SIGINT, signal.SIGTERM)
_RUNS = ("train", "sweep")


class Signals:
    """The signals that this process has received.

    Attributes:
        asked: The first signal, by which the process was asked to stop; 0: none.
        unsaved: Whether a run is under way that can save its state.
        watching: Whether a thread watches for signals.
        forward: What else to do when SIGINT is noted.
        tell: Prints that the run will stop, where progress bars are shown; otherwise, stderr has it.
        saved: The path of the run's last complete checkpoint, or "" if it has none; None: several runs, or none yet.
        finishing: What the run finishes before it saves; empty: the current step.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.unsaved = False
        self.watching = False
        self.forward: Callable[[], None] | None = None
        self.tell: Callable[[str], None] | None = None
        self.saved: Callable[[], str] | None = None
        self.finishing = ""

    def receive(self, number: int) -> str:
        """Note a signal; returns why the process must stop at once, or "" if it does not have to."""
        again, self.asked = self.asked, self.asked or number
        if again:
            # An impatient scheduler repeats SIGTERM; an impatient user knows what a second Ctrl-C does.
            stop = number == signal.SIGINT
            return f"interrupted again; exiting at once. {self._intact()}" if stop else ""
        if not self.unsaved:
            why = "interrupted" if number == signal.SIGINT else "stopped by SIGTERM"
            return f"{why} {self._unchanged()}"
        if number == signal.SIGINT:
            if self.forward:
                self.forward()
            with contextlib.suppress(OSError):  # the terminal is gone
                first = f"finishing {self.finishing}, then " if self.finishing else ""
                (self.tell or _tell)(f"{first}saving and stopping; press Ctrl-C again to exit at once")
        return ""

    def _intact(self) -> str:
        """The part of a message that says which checkpoint remains when a run exits without saving."""
        if self.saved is None:
            return "The last complete checkpoint is intact"
        path = self.saved()
        return f"The last complete checkpoint is intact: {path}" if path else "There is no complete checkpoint yet"

    def _unchanged(self) -> str:
        """The part of a message that says how to continue a run that stops before the end of its first step."""
        if self.saved is None:
            return "with nothing to save; run the same command again to start or resume"
        if path := self.saved():
            return f"with nothing to save since the last checkpoint; run the same command again to resume from {path}"
        return "before the end of the first step, with nothing to save; run the same command again to start"

    def watch(self) -> None:
        """Watch for signals in a thread from now on. A signal that the process was started to ignore stays ignored."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in NUMBERS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _leave_to_thread)
        os.register_at_fork(after_in_child=_forget)
        self.watching = True
        threading.Thread(target=self._watch, args=(reading,), daemon=True, name="signals").start()

    def _watch(self, reading: int) -> NoReturn:
        while True:
            for number in os.read(reading, 64):
                if number in NUMBERS and (why := self.receive(number)):
                    _exit(why, INTERRUPTED if number == signal.SIGINT else PREEMPTED)


received = Signals()


def restore() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, in commands that have nothing to save."""
    if signal.getsignal(signal.SIGINT) is _quit and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _forget() -> None:
    """Handle signals as usual in a forked process, which has no such thread and shares the pipe."""
    signal.set_wakeup_fd(-1)
    for number in NUMBERS:
        if signal.getsignal(number) is _leave_to_thread:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    del number, frame


def _quit(number: int, frame: FrameType | None) -> None:
    del number, frame
    _exit("interrupted", INTERRUPTED)


def _exit(why: str, code: int) -> NoReturn:
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h\n")  # a progress bar hides the cursor
    _tell(why)
    os._exit(code)  # the kernel releases the lock of the workdir


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal is gone, or what reads the output has been interrupted too
        os.write(2, f"{text}\n".encode())  # not print: the main thread may be in the middle of one


def _start() -> None:
    """Handle signals if this process runs one of our commands."""
    name = command()
    if name in _RUNS:
        received.watch()
    elif name is not None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _quit)


_start()
