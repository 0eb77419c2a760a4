"""The interface of trackers, and what they are told about a run."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Protocol

PROJECT = "peftjax"

Status = Literal["finished", "failed", "stopped"]


class Tracker(Protocol):
    """A run in a tracker."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log numbers by tag, such as "train/loss", at a step. Steps do not decrease."""

    def close(self, status: Status) -> None:
        """End the run."""


@dataclasses.dataclass(frozen=True)
class Tracking:
    """The name, group and config of a run in its trackers.

    Attributes:
        trackers: Names of the trackers.
        project: Project; empty for the environment's.
        name: Name of the run.
        group: Name of the sweep that the run belongs to; empty for none.
        config: {"section.field": value}.
        required: Whether a new run that cannot be started in a tracker is an error; otherwise it is a warning.
    """

    trackers: tuple[str, ...]
    project: str
    name: str
    group: str
    config: Mapping[str, Any]
    required: bool = True
