"""The trackers' own packages, offline: what a sweep of two runs logs, and that a resumed run continues its run there."""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peftjax import sweep
from peftjax.log import Log, read_metrics
from peftjax.trackers.base import Tracking
from peftjax.training import sweep_members

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),  # SQLAlchemy 2.1, of MLflow 3.17
]


def rows(workdir: Path) -> Iterator[tuple[int, str, float]]:
    """(step, tag, value) of each metric in metrics.jsonl."""
    for line in read_metrics(workdir / "metrics.jsonl"):
        for name, value in line.items():
            if name not in ("step", "kind", "seconds"):
                yield line["step"], f"{line['kind']}/{name.removeprefix('eval_')}", value


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for all that the trackers store, without a network."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_PROJECT", "WANDB_DIR", "MLFLOW_EXPERIMENT_ID", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "dates")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return tmp_path


def wandb_records(workdir: Path) -> list[list[Any]]:
    """The records of each offline run in a workdir, oldest first. The file is a log of LevelDB, in blocks of 32 KiB."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its process writes the last records after `finish` has returned
    found = []
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        data, at, whole, records = path.read_bytes(), 7, b"", []
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            whole += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # a whole record, or the last part of one
                records.append(Record.FromString(whole))
                whole = b""
        found.append(records)
    return found


def wandb_rows(records: list[Any]) -> set[tuple[int, str, str]]:
    """(step, tag, JSON) of each logged number."""
    return {
        (record.history.step.num, "/".join(item.nested_key) or item.key, item.value_json)
        for record in records
        if record.HasField("history")
        for item in record.history.item
        if not item.key.startswith("_") and not "".join(item.nested_key).startswith("_")
    }


def mlflow_rows(client: Any, run: str) -> dict[tuple[int, str], float]:
    """{(step, tag): value} of each logged number."""
    tags = client.get_run(run).data.metrics
    return {(each.step, tag): each.value for tag in tags for each in client.get_metric_history(run, tag)}


def test_a_sweep_is_a_group_of_runs(local: Path) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    records = [{"prompt": f"{n} + {n} = ", "completion": str(2 * n)} for n in range(8)]
    (local / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {
        "model": {"path": "embedded"},
        "data": {"train": ["data.jsonl"], "eval": ["data.jsonl"], "format": "completion", "max_length": 32},
        "train": {"steps": 2, "batch_size": 4, "log_every": 1},
        "method": {"name": "lora", "rank": 2},
        "log": {"trackers": ["wandb", "mlflow"]},
    }
    (local / "config.json").write_text(json.dumps(config))
    workdir = local / "rates"
    pair = sweep_members.members(str(local / "config.json"), [], ["--sweep.optim.learning_rate=0.01,1e30"], workdir)
    found = {one["run"]: one for one in sweep.sweep(pair, workdir)}
    client = MlflowClient()
    for member in pair:
        ids = json.loads((member.workdir / "trackers.json").read_text())
        logged = list(rows(member.workdir))
        assert len(logged) > 10

        (stored,) = wandb_records(member.workdir)
        ((run,),) = ([record.run for record in stored if record.HasField("run")],)
        assert (run.run_id, run.project, run.run_group, run.display_name) == (
            ids["wandb"], "peftjax", "rates", member.name,
        )  # fmt: skip
        values = {
            item.key: item.value_json for record in stored if record.HasField("config") for item in record.config.update
        }
        assert float(values["optim.learning_rate"]) == member.values["optim.learning_rate"]
        written = {(step, tag): float(json.loads(value)) for step, tag, value in wandb_rows(stored)}
        assert written == {(step, tag): pytest.approx(value, nan_ok=True) for step, tag, value in logged}
        (end,) = [record.exit.exit_code for record in stored if record.HasField("exit")]
        assert end == int("failed" in found[member.name])

        there = client.get_run(ids["mlflow"])
        assert client.get_experiment(there.info.experiment_id).name == "dates"
        assert there.info.run_name == member.name
        assert there.data.tags["sweep"] == "rates"
        assert float(there.data.params["optim.learning_rate"]) == member.values["optim.learning_rate"]
        assert there.info.status == ("FAILED" if "failed" in found[member.name] else "FINISHED")
        assert mlflow_rows(client, ids["mlflow"]) == {
            (step, tag): pytest.approx(value, nan_ok=True) for step, tag, value in logged
        }


def log(workdir: Path, tracker: str, start: int, stop: int) -> None:
    """Log steps start + 1 to stop of 4."""
    what = Tracking((tracker,), "", "greetings", "", {"train.steps": stop, "method.init": ""})
    with Log(workdir, total_steps=4, resume_step=start, tensorboard=False, tracking=what, quiet=True) as log:
        for step in range(start + 1, stop + 1):
            log.step(step, {"loss": math.nan if step == 4 else 1 / step, "grad_norm": math.inf, "an odd, name!": 1.0})


def test_wandb_continues_a_resumed_run(local: Path) -> None:
    pytest.importorskip("wandb")
    log(local, "wandb", 0, 3)
    log(local, "wandb", 2, 4)
    first, second = wandb_records(local)
    assert len({record.run.run_id for record in first + second if record.HasField("run")}) == 1
    losses = [
        [(step, value) for step, tag, value in sorted(wandb_rows(one)) if tag == "train/loss"]
        for one in (first, second)
    ]
    assert [step for step, _ in losses[0]] == [1, 2, 3]
    assert losses[1] == [(3, losses[0][2][1]), (4, "NaN")]


def test_mlflow_continues_a_resumed_run(local: Path) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    log(local, "mlflow", 0, 3)
    log(local, "mlflow", 2, 4)
    client = MlflowClient()
    (experiment,) = [one for one in client.search_experiments() if one.name == "dates"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train.steps": "3", "method.init": ""}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [one.step for one in history] == [1, 2, 3, 3, 4]
    assert math.isnan(history[-1].value)
    assert "train/an odd_ name_" in run.data.metrics


def test_trackio_continues_a_resumed_run(local: Path) -> None:
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    log(local, "trackio", 0, 3)
    log(local, "trackio", 2, 4)
    (run,) = SQLiteStorage.get_runs("peftjax")
    assert SQLiteStorage.get_run_config("peftjax", run)["train.steps"] == 4
    assert run.startswith("greetings-")
    logs = SQLiteStorage.get_logs("peftjax", run)
    assert [(one["step"], one["train/loss"]) for one in logs][:3] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert [one["step"] for one in logs] == [1, 2, 3, 3, 4]
    assert math.isnan(logs[-1]["train/loss"])
