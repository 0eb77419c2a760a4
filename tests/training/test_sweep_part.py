"""The parts of a sweep that several jobs train in one workdir."""

import json
import math
from pathlib import Path

import pytest

from peftjax import sweep
from peftjax.core.config import defaults
from peftjax.core.errors import UserError
from peftjax.log import Log
from peftjax.report import sweep_page
from peftjax.training import sweep_results
from peftjax.training.sweep_part import SweepPart, parse_part
from tests.training.test_sweep import member


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_run_is_in_one_part_and_parts_are_consecutive_and_equal(count: int) -> None:
    parts = [SweepPart(index, count).of(["abcd", "efg"]) for index in range(1, count + 1)]
    assert "".join(run for part in parts for run in part) == "abcdefg"
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0/4", "the parts of 4 are numbered from 1 to 4"),
        ("5/4", "the parts of 4 are numbered from 1 to 4"),
        ("1/0", "the parts of 0"),
        ("2", "--part=2 must be I/N, for example --part=1/4"),
        ("$SLURM_ARRAY_TASK_ID/4", "must be I/N"),
        ("8/8", "the sweep has 7 runs; use at most 7 parts"),
    ],
)
def test_a_part_that_does_not_exist_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_part(text).of(["abcd", "efg"])
    assert str(parse_part("2/3")) == "2/3"


def test_parts_and_halving_exclude_each_other() -> None:
    with pytest.raises(UserError, match="--part=1/2 cannot be combined with --halving=3"):
        sweep.main(["--config=none.py", "--workdir=none", "--part=1/2", "--halving=3", "--sweep.seed=0,1"])


def test_a_part_keeps_what_the_others_have_recorded(tmp_path: Path) -> None:
    def pair() -> list[sweep.Member]:
        return [member(defaults(), tmp_path, seed=seed) for seed in (0, 1)]

    first, second, whole = pair(), pair(), pair()
    first[0].failed = "step 3: loss is nan"
    sweep_results.write_results(first, tmp_path, first[:1])
    sweep_results.write_results(second, tmp_path, second[1:])
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert {entry["run"]: entry.get("failed") for entry in found} == {"seed=0": "step 3: loss is nan", "seed=1": None}
    assert not any(
        "failed" in entry for entry in sweep_results.write_results(whole, tmp_path)
    )  # it trains all of them again


def test_scores_that_are_not_finite_stay_json_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[sweep_page.SweptRun] = []
    monkeypatch.setattr(sweep_page, "cost_cards", lambda runs: shown.extend(runs) or ())
    run = member(defaults(), tmp_path, seed=0)
    with Log(run.workdir, total_steps=1, resume_step=0, tensorboard=False, quiet=True) as log:
        log.evaluation(1, {"eval_loss": math.inf, "matthews": math.nan})
    sweep_results.write_results([run], tmp_path)
    (entry,) = json.loads(
        (tmp_path / "sweep.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    assert entry["scores"] == {"eval_loss": "Infinity", "matthews": "NaN"}
    (found,) = shown
    assert found.scores["eval_loss"] == math.inf
    assert math.isnan(found.scores["matthews"])
