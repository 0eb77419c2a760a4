"""TensorBoard, which needs no account and no server."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from peftjax.trackers.base import Status


class TensorBoard:
    """TensorBoard scalars, on disk when `write` returns.

    `SummaryWriter` of tensorboardX writes from a background thread, and its `flush` does not wait for the queue of that
    thread: a killed process loses its last events. `EventsWriter`, on which it is built, writes synchronously.
    """

    def __init__(self, directory: Path, purge: int | None) -> None:
        """purge: the step from which TensorBoard hides the events of earlier files; None for the first file."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._event = event_pb2.Event
        self._writer = EventsWriter(str(directory / "events"), filename_suffix=f".{os.getpid()}.{purge or 0}")
        if purge is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.write_event(self._event(step=purge, wall_time=time.time(), session_log=start))
        self._writer.flush()

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        now = time.time()
        for tag, value in numbers.items():
            self._writer.write_event(self._event(step=step, wall_time=now, summary=scalar(tag, value)))
        self._writer.flush()

    def close(self, status: Status) -> None:
        self._writer.close()
