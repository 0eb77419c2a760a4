"""MLflow."""

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from peftjax.trackers.base import PROJECT, Status, Tracking


class Mlflow:
    """A run of MLflow. Its parameters are the config with which it was started: MLflow cannot change them."""

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
