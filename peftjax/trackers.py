"""Experiment trackers: TensorBoard, Weights & Biases, MLflow and Trackio.

Each training run is one run in every tracker. Resumed training continues that run: trackers.json in the workdir holds its id in
each tracker. Trackers read servers, accounts and offline modes from their own environment variables.
"""

import dataclasses
import importlib.util
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from peftjax.core.config import field
from peftjax.core.errors import UserError
from peftjax.core.files import write_atomically
from peftjax.core.output import say
from peftjax.core.paths import suggest

IDS = "trackers.json"
PROJECT = "peftjax"

Status = Literal["finished", "failed", "stopped"]

# How to install a tracker. Trackio 0.43 asks for pillow<13, so that it cannot be an extra; it runs with pillow 13.
_INSTALL = {
    "wandb": 'pip install "peftjax[wandb]"',
    "mlflow": 'pip install "peftjax[mlflow]"',
    "trackio": 'pip install trackio, then pip install "pillow>=13,<14"',
}


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where metrics are logged in addition to metrics.jsonl and TensorBoard events."""

    trackers: tuple[str, ...] = field((), "Experiment trackers: wandb, mlflow, trackio")
    project: str = field(
        "", "Project of the trackers; empty: WANDB_PROJECT, MLFLOW_EXPERIMENT_ID or MLFLOW_EXPERIMENT_NAME, or peftjax"
    )
    run_name: str = field("", "Name of the run in the trackers; in a sweep, of the group; empty: that of the workdir")

    def __post_init__(self) -> None:
        for name in self.trackers:
            if name not in _TRACKERS:
                known = ", ".join(_TRACKERS)
                raise UserError(f"log.trackers={name!r} is not one of {known}.{suggest(name, _TRACKERS)}")


def check_installed(names: Iterable[str]) -> None:
    """Check that the packages of trackers are installed, without importing them.

    Raises:
        UserError: A package is missing.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # wandb leaves a folder wandb/, which Python takes for a package
            raise UserError(f"log.trackers={name!r} needs a package that is not installed: {_INSTALL[name]}")


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
        project: Project; empty for that of the environment.
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

    def start(self, workdir: Path, *, resume: bool) -> list[Tracker]:
        """Start a run in each tracker, or continue it.

        Args:
            workdir: Directory of the run.
            resume: Continue the runs whose ids are in the workdir. A tracker that cannot be reached is then left out with a
                warning, since nobody may be there to start the run again.

        Raises:
            UserError: A new run cannot be started, and it is required.
        """
        path, started = workdir / IDS, list[Tracker]()
        if not resume:
            path.unlink(missing_ok=True)
        ids: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        for name in self.trackers:
            try:
                tracker = _TRACKERS[name](self, workdir, ids.get(name))
            except Exception as error:
                if self.required and not resume:
                    Trackers(started).close("failed")
                    raise UserError(
                        f"log.trackers={name!r}: the run cannot be started: {_text(error)}; fix this, or remove "
                        f"{name} from log.trackers"
                    ) from error
                say(f"warning: {name} cannot {'continue' if resume else 'start'} the run: {_text(error)}")
                continue
            ids[name] = tracker.id
            started.append(tracker)
        if ids:
            write_atomically(path, json.dumps(ids) + "\n")
        return started


class Trackers:
    """Several trackers as one. A tracker that fails is left out from then on, with a warning; the training continues."""

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self._trackers = list(trackers)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.write(step, numbers))

    def close(self, status: Status) -> None:
        self._each(lambda tracker: tracker.close(status))
        self._trackers.clear()

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._trackers):
            try:
                action(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                say(f"warning: {type(tracker).__name__} failed and receives no more metrics: {_text(error)}")


class TensorBoard:
    """TensorBoard scalars, on disk when `write` returns.

    `SummaryWriter` of tensorboardX writes from a background thread, and its `flush` does not wait for the queue of that
    thread: a killed process loses its last events. `EventsWriter` beneath it writes synchronously.
    """

    def __init__(self, directory: Path, purge: int | None) -> None:
        """
        Args:
            directory: Directory of the event file, which is created.
            purge: Step from which TensorBoard hides the events of earlier files; None for the first file.
        """
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


class Mlflow:
    """A run of MLflow. Its parameters are those of the config with which it was started: MLflow cannot change them."""

    def __init__(self, tracking: Tracking, workdir: Path, known: str | None) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = client = MlflowClient()
        if known:
            self.id = known
            client.update_run(known, status="RUNNING")
            return
        experiment = None if tracking.project else os.environ.get("MLFLOW_EXPERIMENT_ID")
        if experiment is None:
            name = tracking.project or os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else client.create_experiment(name)
        tags = {"sweep": tracking.group} if tracking.group else None
        self.id = client.create_run(experiment, tags=tags, run_name=tracking.name).info.run_id
        params = [Param(name, str(value)) for name, value in tracking.config.items()]
        for start in range(0, len(params), 100):  # as many as a request may have
            client.log_batch(self.id, params=params[start : start + 100])

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(re.sub(r"[^/\w.\- ]", "_", tag), value, now, step) for tag, value in numbers.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self, status: Status) -> None:
        names = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
        self._client.set_terminated(self.id, names[status])


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


_TRACKERS: dict[str, Callable[[Tracking, Path, str | None], Wandb | Mlflow | Trackio]] = {
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


def _text(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
