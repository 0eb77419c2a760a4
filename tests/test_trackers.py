"""Trackers: which are started, what they are told, and what happens when one fails. Their packages are stood in for here."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

import peftjax
from peftjax.core.errors import UserError
from peftjax.log import Log, read_metrics
from peftjax.trackers import LogConfig, check_installed
from peftjax.trackers.base import Tracking
from peftjax.training import config as configs

STAND_IN = """
runs = []

class Config(dict):
    def update(self, values, allow_val_change):
        assert allow_val_change
        super().update(values)

class Run:
    def __init__(self, options):
        self.options, self.config, self.rows, self.end, self.step = options, Config(), [], None, 0
        runs.append(self)

    def log(self, numbers, step):
        if "train/broken" in numbers:
            raise ConnectionError("no route to host\\nat all")
        self.rows.append((step, numbers))

    def mark_preempting(self):
        self.end = "preempted"

    def finish(self, exit_code=0):
        self.end = self.end or exit_code

def init(**options):
    if options["project"] == "forbidden":
        raise ValueError("no such project")
    return Run(options)
"""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The runs of a stand-in for wandb and trackio, which have the same interface."""
    for name in ("WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    (tmp_path / "packages").mkdir()
    for name in ("wandb", "trackio"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / "packages" / f"{name}.py").write_text(STAND_IN)
    yield lambda name: sys.modules[name].runs
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


def tracking(*trackers: str, project: str = "", group: str = "", **config: Any) -> Tracking:
    return Tracking(trackers, project, "greetings", group, config)


def log(workdir: Path, start: int, stop: int, what: Tracking, **numbers: float) -> None:
    """Log steps start + 1 to stop of 4."""
    with Log(workdir, total_steps=4, resume_step=start, tensorboard=False, tracking=what, quiet=True) as log:
        for step in range(start + 1, stop + 1):
            log.step(step, {"loss": 1 / step, **numbers})
        log.evaluation(stop, {"eval_loss": math.nan})


def test_trackers_get_the_config_the_lines_and_the_end(runs: Any, tmp_path: Path) -> None:
    log(tmp_path, 0, 2, tracking("wandb", "trackio", group="sweep", **{"method.rank": 4}))
    for name in ("wandb", "trackio"):
        (run,) = runs(name)
        assert [(step, numbers.get("train/loss")) for step, numbers in run.rows] == [(1, 1.0), (2, 0.5), (2, None)]
        assert math.isnan(run.rows[-1][1]["eval/loss"])
        assert (run.options["project"], run.options["group"]) == ("peftjax", "sweep")
        assert (run.config or run.options["config"]) == {"method.rank": 4}
        assert run.end == 0
    assert runs("wandb")[0].options["name"] == "greetings"


def test_a_resumed_run_continues_and_a_new_one_does_not(runs: Any, tmp_path: Path) -> None:
    for start in (0, 2, 0):
        log(tmp_path, start, start + 1, tracking("wandb", "trackio"))
    for name, field in (("wandb", "id"), ("trackio", "name")):
        first, second, third = (run.options[field] for run in runs(name))
        assert first == second != third
        assert json.loads((tmp_path / "trackers.json").read_text())[name] == third


def test_how_a_run_ended(runs: Any, tmp_path: Path) -> None:
    for kind, end in ((KeyError, 1), (KeyboardInterrupt, "preempted")):
        with pytest.raises(kind), Log(tmp_path, total_steps=1, resume_step=0, tracking=tracking("wandb"), quiet=True):
            raise kind
        assert runs("wandb")[-1].end == end


def test_a_tracker_that_fails_is_left_out_with_one_warning(
    runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(tmp_path, 0, 3, tracking("wandb"), broken=1.0)
    warning = "warning: Wandb failed and receives no more metrics: no route to host\n"
    assert capsys.readouterr().out == warning
    assert runs("wandb")[0].rows == []
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4


def test_a_tracker_that_does_not_start_ends_a_new_run_but_not_a_resumed_one(
    runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forbidden = tracking("wandb", "trackio", project="forbidden")
    with pytest.raises(UserError, match=r"log\.trackers='wandb': the run cannot be started: no such project"):
        log(tmp_path, 0, 2, forbidden)
    log(tmp_path, 2, 3, forbidden)
    log(tmp_path, 0, 2, dataclasses.replace(forbidden, required=False))  # in the middle of a sweep
    assert [
        f"warning: {name} cannot {what} the run: no such project"
        for what in ("continue", "start")
        for name in ("wandb", "trackio")
    ] == capsys.readouterr().out.splitlines()


def test_only_the_first_process_tracks(runs: Any, tmp_path: Path) -> None:
    with Log(tmp_path / "none", total_steps=1, resume_step=0, enabled=False, tracking=tracking("wandb")) as log:
        log.step(1, {"loss": 1.0})
    assert "wandb" not in sys.modules
    assert not (tmp_path / "none").exists()


def test_an_unknown_tracker_and_a_missing_package_are_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"config: log.trackers='wanbd' is not one of .* Did you mean 'wandb'\?"):
        configs.validate({"log": {"trackers": ("wanbd",)}})
    assert configs.validate({}).log == LogConfig(trackers=())
    (tmp_path / "trackio").mkdir()  # a folder of runs in the current directory is not the package
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    for name in ("wandb", "mlflow", "trackio"):
        with pytest.raises(UserError, match=rf"log.trackers='{name}' needs a package .*peftjax\[{name}\]"):
            check_installed([name])


@pytest.mark.slow
def test_a_run_is_tracked_under_the_name_of_its_workdir(runs: Any, tmp_path: Path) -> None:
    records = [{"prompt": f"{n} + {n} = ", "completion": str(2 * n)} for n in range(8)]
    fields = {"data.format": "completion", "data.max_length": 32, "train.batch_size": 4, "train.log_every": 1}
    for steps, project in ((2, "sums"), (3, "other")):  # the second call resumes
        fields |= {"train.steps": steps, "log.trackers": ("wandb",), "log.project": project}
        peftjax.train("embedded", peftjax.Lora(rank=2), records, workdir=tmp_path / "doubling", config=fields)
    first, second = runs("wandb")
    assert (first.options["name"], first.options["group"], first.options["project"]) == ("doubling", None, "sums")
    assert first.options["id"] == second.options["id"]
    assert (first.config["method.rank"], first.config["train.steps"], second.config["train.steps"]) == (2, 2, 3)
    logged = read_metrics(tmp_path / "doubling" / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in logged if line["kind"] == "train"] == [
        (step, numbers["train/loss"])
        for run in (first, second)
        for step, numbers in run.rows
        if "train/loss" in numbers
    ]
