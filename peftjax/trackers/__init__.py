"""Experiment trackers, one per file, and the registry of their names.

Each training run is one run in every tracker. Resumed training continues that run: trackers.json in the workdir holds its id in
each tracker. Trackers read servers, accounts and offline modes from their own environment variables.
"""

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from peftjax.core.config import field
from peftjax.core.errors import UserError
from peftjax.core.files import write_atomically
from peftjax.core.output import say
from peftjax.core.paths import suggest
from peftjax.trackers.base import Status, Tracker, Tracking
from peftjax.trackers.mlflow import Mlflow
from peftjax.trackers.trackio import Trackio
from peftjax.trackers.wandb import Wandb

IDS = "trackers.json"

_TRACKERS: dict[str, Callable[[Tracking, Path, str | None], Wandb | Mlflow | Trackio]] = {
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where metrics are logged in addition to metrics.jsonl and TensorBoard events."""

    trackers: tuple[str, ...] = field((), "Experiment trackers: wandb, mlflow, trackio")
    project: str = field(
        "", "Project of the trackers; empty: WANDB_PROJECT, MLFLOW_EXPERIMENT_ID or MLFLOW_EXPERIMENT_NAME, or peftjax"
    )
    run_name: str = field("", "Name of the run in the trackers; in a sweep, of the group; empty: the workdir's name")

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
            raise UserError(
                f'log.trackers={name!r} needs a package that is not installed: pip install "peftjax[{name}]"'
            )


def start_trackers(tracking: Tracking, workdir: Path, *, resume: bool) -> list[Tracker]:
    """Start a run in each tracker, or with `resume` continue the runs whose ids are in the workdir.

    A tracker that cannot be reached when a run resumes is left out with a warning, because a resumed run may be
    unattended.

    Raises:
        UserError: A new run cannot be started, and it is required.
    """
    path, started = workdir / IDS, list[Tracker]()
    if not resume:
        path.unlink(missing_ok=True)
    ids: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    for name in tracking.trackers:
        try:
            tracker = _TRACKERS[name](tracking, workdir, ids.get(name))
        except Exception as error:  # of any kind: from the tracker's package, its network or its server
            if tracking.required and not resume:
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
            except Exception as error:  # of any kind, as above: it must not end the training
                self._trackers.remove(tracker)
                say(f"warning: {type(tracker).__name__} failed and receives no more metrics: {_text(error)}")


def _text(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
