"""Runs that stop when they no longer improve (train.patience), and results from the best checkpoint (checkpoint.export)."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import peftjax
from peftjax import sweep
from peftjax.core.errors import UserError
from peftjax.log import read_metrics
from peftjax.tasks.best import best_evaluation, of_result, out_of_patience
from peftjax.train import train
from peftjax.training import config as configs
from peftjax.training.trained import result_of
from tests import test_trainer as trainer
from tests.io.test_checkpoint import damage
from tests.runs import metrics
from tests.test_train import config
from tests.training.test_sweep import member

FIELDS = trainer.FIELDS | {
    "train.steps": 6,
    "train.log_every": 1,
    "train.eval_every": 1,
    "checkpoint.best_score": "quality",
}
BEST = FIELDS | {"checkpoint.export": "best", "train.patience": 2}
QUALITY = (9.0, 0.1, 0.5, math.nan, 0.5, 0.7, 0.2)  # by step; that of the untrained model does not count
WEIGHTS = "adapter/adapter_model.safetensors"


def run(workdir: Path, fields: dict[str, Any] = FIELDS, quality: Any = QUALITY, **given: Any) -> Any:
    return peftjax.train(
        "embedded", trainer.LORA, trainer.RECORDS, workdir=workdir, config=fields,
        on_evaluate=lambda model, step: {"quality": quality[step]}, **given,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run that stopped after step 4, since steps 3 and 4 were no better than step 2."""
    workdir = tmp_path_factory.mktemp("best") / "stopped"
    trained = run(workdir, BEST)
    assert trained.scores == {"quality": 0.5}
    peftjax.save_adapter(trained.model, workdir.with_name("returned"))
    assert (workdir.with_name("returned") / Path(WEIGHTS).name).read_bytes() == (workdir / WEIGHTS).read_bytes()
    return workdir


@pytest.mark.parametrize(
    ("score", "values", "best", "patience"),
    [
        ("accuracy", [0.9, 0.1, 0.3, 0.3, 0.2], 2, 2),
        ("eval_loss", [0.1, 4.0, 3.0, 3.0], 2, 1),
        ("perplexity", [1.0, 8.0, 9.0, 7.0], 3, 0),
        ("bleu", [50.0, math.nan, math.inf, 10.0], 3, 0),
        ("eval_loss", [2.0, math.nan, math.nan], None, 2),
        ("eval_loss", [2.0], None, 0),
    ],
)
def test_the_best_is_the_earliest_with_the_best_finite_value_after_the_first_step(
    score: str, values: list[float], best: int | None, patience: int
) -> None:
    lines = [{"step": step, "kind": "eval", score: value} for step, value in enumerate(values)]
    assert (best_evaluation(lines, score) or {}).get("step") == best
    assert not out_of_patience(lines, score, 0)
    assert not out_of_patience(lines, score, patience + 1)
    assert patience == 0 or out_of_patience(lines, score, patience)
    assert of_result(lines, score, "last") == lines
    assert of_result(lines, score, "best") == lines[: len(lines) if best is None else best + 1]


def test_a_run_stops_without_progress_and_its_result_is_the_best_checkpoint(stopped: Path, tmp_path: Path) -> None:
    assert [line["step"] for line in metrics(stopped) if line["kind"] == "train"] == [1, 2, 3, 4]
    run(tmp_path / "two", FIELDS | {"train.steps": 2})
    assert (stopped / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()
    card = (stopped / "adapter" / "README.md").read_text()
    assert "2 steps of 4 sequences" in card
    page = (stopped / "report.html").read_text()
    assert "Stopped after step 4 of 6: no better quality in 2 evaluations." in page
    assert "The result has the weights of step 2, with the best quality." in page
    assert "Not finished" not in page
    assert result_of(peftjax.training.trained.run_config(stopped), stopped) == stopped / "adapter"  # without a warning


def test_the_same_call_again_trains_no_further_and_writes_the_same_result(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stopped, tmp_path / "again")
    trained = run(tmp_path / "again", BEST)
    assert trained.scores == {"quality": 0.5}
    assert metrics(tmp_path / "again") == metrics(stopped)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (stopped / WEIGHTS).read_bytes()
    printed = capsys.readouterr().out
    assert "stopped after step 4 of 6: no better quality in 2 evaluations in a row (train.patience)" in printed
    assert "the result has the weights of step 2, with the best quality: 0.5" in printed


def test_a_higher_patience_continues_a_stopped_run_and_last_exports_its_end(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "more")
    trained = run(tmp_path / "more", BEST | {"train.patience": 3, "checkpoint.export": "last"})
    whole = run(tmp_path / "whole")
    assert trained.scores == whole.scores == {"quality": 0.2}
    assert (tmp_path / "more" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert metrics(tmp_path / "more") == metrics(tmp_path / "whole")


def test_a_run_that_fails_on_the_way_remembers_the_best_evaluation(stopped: Path, tmp_path: Path) -> None:
    def interrupt(line: dict[str, Any]) -> None:
        if line["step"] == 4:
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        run(tmp_path / "run", BEST, on_metrics=interrupt)
    assert run(tmp_path / "run", BEST).scores == {"quality": 0.5}
    assert metrics(tmp_path / "run") == metrics(stopped)
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (stopped / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("kind", "message"),
    [("a byte flipped in a data file", "is damaged: "), ("the record lost", "is damaged: "), ("", "is missing")],
)
def test_a_best_checkpoint_that_is_lost_is_reported_and_not_replaced_by_another(
    kind: str, message: str, stopped: Path, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    best = tmp_path / "run" / "checkpoints" / "2"
    damage(best, kind) if kind else shutil.rmtree(best)
    with pytest.raises(UserError, match=f"checkpoint {best} {message}"):
        run(tmp_path / "run", BEST)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"checkpoint.best_score": "qualty"},
            r"best_score='qualty' is not a score of this run. Did you mean 'quality'\?",
        ),
        ({"checkpoint.keep_best": False}, r"export='best' needs the best checkpoint; set checkpoint.keep_best=True"),
        ({"train.eval_every": 0}, r"train.patience=2 requires evaluations during the training; set train.eval_every"),
    ],
)
def test_a_best_checkpoint_that_cannot_be_found_is_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path, BEST | fields)
    assert not (tmp_path / "checkpoints").exists()


def test_without_evaluations_neither_patience_nor_the_best_checkpoint_has_a_meaning(tmp_path: Path) -> None:
    made = config(tmp_path, data__eval=(), train__eval_every=1)
    for name, fields in {"patience": {"train.patience": 1}, "export": {"checkpoint.export": "best"}}.items():
        with pytest.raises(UserError, match=rf"{name}=.* requires evaluations; set data.eval"):
            train(configs.changed(configs.validate(made), fields), tmp_path / name)


@pytest.mark.slow
def test_full_fine_tuning_exports_the_best_model(tmp_path: Path) -> None:
    fields = BEST | {"optim.learning_rate": 1e-3, "train.steps": 4}
    best, two = (
        peftjax.train(
            "embedded", peftjax.Full(), trainer.RECORDS, workdir=tmp_path / str(steps), config=fields | {"train.steps": steps},
            on_evaluate=lambda model, step: {"quality": QUALITY[step]},
        )
        for steps in (4, 2)
    )  # fmt: skip
    assert best.path.name == "model"
    assert (best.path / "model.safetensors").read_bytes() == (two.path / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_members_of_a_sweep_stop_alone_and_export_their_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = config(
        tmp_path,
        train__steps=6,
        train__eval_every=1,
        train__patience=2,
        checkpoint__export="best",
        optim__schedule="constant",
    )
    runs = [member(made, tmp_path / "sweep", optim__learning_rate=rate) for rate in (1e-3, 1e-30)]
    found = sweep.sweep(runs, tmp_path / "sweep")
    printed = capsys.readouterr().out
    assert f"{runs[1].name} stopped after step" in printed
    for one in runs:
        alone = tmp_path / "alone" / one.name
        trained = train(one.config, alone)
        lines = [read_metrics(path / "metrics.jsonl") for path in (one.workdir, alone)]
        assert lines[0][-1]["step"] == lines[1][-1]["step"] == (6 if one is runs[0] else 3)
        (entry,) = (entry for entry in found if entry["run"] == one.name)
        assert entry["scores"]["eval_loss"] == pytest.approx(trained.scores["eval_loss"], rel=1e-4)
        assert "stopped" not in entry
        ours, theirs = (load_file(path / WEIGHTS) for path in (one.workdir, alone))
        for name, array in theirs.items():
            np.testing.assert_allclose(ours[name], array, rtol=1e-3, atol=1e-5)
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())[0]["run"] == runs[0].name
    sweep.sweep(runs, tmp_path / "sweep")
    assert "2 of 2 runs have already ended" in capsys.readouterr().out
