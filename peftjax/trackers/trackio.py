"""Trackio."""

import uuid
from collections.abc import Mapping
from pathlib import Path

from peftjax.trackers.base import PROJECT, Status, Tracking


class Trackio:
    """A run of Trackio. Trackio finds runs by their names, so the name ends with a unique part."""

    def __init__(self, tracking: Tracking, workdir: Path, known: str | None) -> None:
        import trackio

        self.id = known or f"{tracking.name}-{uuid.uuid4().hex[:8]}"
        self._run = trackio.init(
            project=tracking.project or PROJECT,
            name=self.id,
            group=tracking.group or None,
            config=dict(tracking.config),
            resume="allow",
            embed=False,
        )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, status: Status) -> None:
        self._run.finish()
