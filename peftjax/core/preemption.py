"""Stopping a run between two steps, with its state saved, after SIGTERM or Ctrl-C."""

import os
import signal
import threading
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from peftjax.core.signals import NUMBERS, received


class Preempted(BaseException):  # not an error: like KeyboardInterrupt, `except Exception` must not catch it
    """The run was asked to stop by SIGTERM and has saved its state; the command exits with 75."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop by Ctrl-C and has saved its state; the command exits with 130."""


class Preemption:
    """Context manager that turns SIGTERM, sent by a scheduler before preemption, and Ctrl-C into a stop between two steps.

    In a distributed run, it is enough that one process receives the signal: JAX notifies the others, and all agree on a
    step that none of them has passed. Further SIGTERMs have no effect; a second Ctrl-C ends the process at once. Before the
    first step, a signal ends a single process at once. In the commands a thread does this (core/signals.py). In a user's
    own program, handlers raise `Preempted` and `KeyboardInterrupt`.

    Args:
        checkpoints: The directory of the run's checkpoints, the last of which messages name; None: several runs.
    """

    def __init__(self, checkpoints: Path | None = None) -> None:
        self._steps, self._checkpoints = 0, checkpoints
        self._agreed = False  # whether the processes have reached the step that they agreed on; JAX reports it once
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if self._checkpoints is not None:
            received.saved = partial(_newest, self._checkpoints)
        if jax.distributed.is_initialized():  # JAX handles SIGTERM
            received.forward = lambda: os.kill(os.getpid(), signal.SIGTERM)
        if not received.watching:
            received.asked = 0
            if threading.current_thread() is threading.main_thread():
                numbers = (signal.SIGINT,) if jax.distributed.is_initialized() else NUMBERS
                heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
                self._before = {number: signal.signal(number, _notice) for number in heeded}
        return self

    def __exit__(self, *error: object) -> None:
        received.unsaved, received.forward, received.saved = False, None, None
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """Declare that the next step is the first one of a run: until it is done, there is nothing to save.

        Raises:
            Preempted, Interrupted: The signal came during the last step of the previous run.
        """
        received.unsaved = False
        if self._agreed or (received.asked and not jax.distributed.is_initialized()):
            raise _stopped("between two runs; run the same command to resume")

    def reached(self) -> bool:
        """Whether to save and stop after this step; every process must call this method after every step."""
        self._steps += 1
        received.unsaved = True
        if jax.distributed.is_initialized():
            self._agreed = self._agreed or multihost_utils.reached_preemption_sync_point(self._steps)
            return self._agreed
        return received.asked != 0


def stopped(step: int, steps: int, saved: Path) -> Preempted | Interrupted:
    """What to raise once the state after `step` of `steps` is in `saved`, a checkpoint or the directory of several runs."""
    what = "the trainable parameters, the optimizer state and the position in the data"
    return _stopped(f"after step {step} of {steps}; saved {what}; run the same command to resume from {saved}")


def _newest(checkpoints: Path) -> str:
    """The path of the newest complete checkpoint in a directory; "" if there is none."""
    try:
        steps = [int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal()]
    except OSError:
        return ""
    return str(checkpoints / str(max(steps))) if steps else ""


def _stopped(rest: str) -> Preempted | Interrupted:
    if received.asked == signal.SIGINT:
        return Interrupted(f"interrupted {rest}")
    return Preempted(f"stopped by SIGTERM {rest}")


def _notice(number: int, frame: FrameType | None) -> None:
    del frame
    if why := received.receive(number):
        raise KeyboardInterrupt(why) if number == signal.SIGINT else Preempted(why)
