"""Weights & Biases."""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from peftjax.trackers.base import PROJECT, Status, Tracking


class Wandb:
    """A run of Weights & Biases. It has one row per step; steps that it has already are not logged again."""

    def __init__(self, tracking: Tracking, workdir: Path, known: str | None) -> None:
        import wandb

        self.id = known or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=tracking.project or os.environ.get("WANDB_PROJECT", PROJECT),
            name=tracking.name,
            group=tracking.group or None,
            dir=os.environ.get("WANDB_DIR", workdir),
            id=self.id,
            resume="allow",
            reinit="create_new",  # other runs of a sweep are active in this process
        )
        self._run.config.update(dict(tracking.config), allow_val_change=True)
        self._first = self._run.step

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if step >= self._first:
            self._run.log(dict(numbers), step=step)

    def close(self, status: Status) -> None:
        if status == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if status == "finished" else 1)
