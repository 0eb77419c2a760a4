"""Epochs, fractions and percentages as numbers of steps, and the number of rows in an epoch."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from peftjax import sharding, sweep
from peftjax.core.errors import UserError
from peftjax.data import epoch
from peftjax.data.batches import Batching, train_batches
from peftjax.data.epoch import count_rows
from peftjax.methods import AdaLora
from peftjax.train import train
from peftjax.training import config as configs
from peftjax.training import duration
from peftjax.training.config import Config
from peftjax.training.member import Member
from peftjax.training.setup import open_data
from tests.test_train import config


def made(**fields: Any) -> Config:
    return configs.validate(configs.to_dict(configs.changed(Config(), fields)))


def lengths(rows: int, **fields: Any) -> tuple[Any, ...]:
    one = duration.in_steps(made(**{name.replace("__", "."): value for name, value in fields.items()}), lambda: rows)
    assert duration.in_steps(one, lambda: pytest.fail("nothing is left to resolve")) == one
    assert (one.train.epochs, one.optim.warmup_fraction) == (0, 0)
    return one.train.steps, one.optim.warmup_steps, one.train.eval_every, one.checkpoint.every


def test_epochs_fractions_and_percentages_become_steps_rounded_up() -> None:
    assert lengths(0) == (1000, 0, 100, 100)  # ten evaluations by default
    assert lengths(0, train__steps=5, optim__warmup_fraction=0.03) == (5, 1, 1, 100)
    assert lengths(0, train__steps=600, optim__warmup_fraction=1 / 30, checkpoint__every="25%") == (600, 20, 60, 150)
    assert lengths(128, train__epochs=2.5, checkpoint__every="0.5 epochs") == (40, 0, 4, 8)
    assert lengths(101, train__epochs=1, train__eval_every="1 epoch") == (13, 0, 13, 100)
    assert lengths(3, train__steps=7, train__eval_every=0, checkpoint__every=".1epochs") == (7, 0, 0, 1)
    assert lengths(10, train__epochs=1e-6, optim__warmup_fraction=1.0) == (1, 1, 1, 100)


def test_the_budget_of_adalora_spans_the_run_unless_its_length_is_given() -> None:
    for method, steps in ((AdaLora(), 40), (AdaLora(total_steps=30), 30)):
        one = dataclasses.replace(made(**{"train.epochs": 2.5}), method=method)
        assert duration.in_steps(one, lambda: 128).method == AdaLora(total_steps=steps)


def test_of_two_fields_for_one_length_the_command_line_wins_and_a_file_sets_one(tmp_path: Path) -> None:
    path = tmp_path / "config.json.py"
    path.write_text("def get_config():\n    return {'train': {'steps': 60}, 'optim': {'warmup_steps': 50}}\n")
    one = configs.load(path, ["--config.train.epochs=2", "--config.optim.warmup_fraction=0.5"])
    assert (one.train.epochs, one.train.steps, one.optim.warmup_steps) == (2, 1000, 0)
    again = configs.changed(one, {"train.steps": 5, "optim.warmup_steps": 3})
    assert (again.train.epochs, again.train.steps, again.optim.warmup_fraction) == (0, 5, 0)
    unset = configs.load(path, ["--config.train.epochs=0", "--config.optim.warmup_fraction=0"])
    assert (unset.train.steps, unset.optim.warmup_steps) == (60, 50)
    assert configs.changed(unset, {"train.epochs": 0}) == unset
    again = configs.changed(one, {"train.steps": 1000, "optim.warmup_steps": 0})
    assert (again.train.epochs, again.optim.warmup_fraction) == (0, 0)
    for both, message in (
        ({"train": {"epochs": 2, "steps": 60}}, r"train\.epochs=2 and train\.steps=60 both give the length of the run"),
        ({"optim": {"warmup_steps": 5, "warmup_fraction": 0.1}}, "both give the length of the warmup; set one of them"),
    ):
        with pytest.raises(UserError, match=message):
            configs.validate(both)
    with pytest.raises(UserError, match=r"warmup_steps=50 must be at most train\.steps=5"):
        configs.load(path, ["--config.train.steps=5"])
    with pytest.raises(UserError, match=r"warmup_steps=50 must be at most train\.steps=2"):
        duration.in_steps(configs.load(path, ["--config.train.epochs=1"]), lambda: 16)


@pytest.mark.parametrize("text", ["10", "10 %", "0.5 epochs", "1 epoch"])
def test_an_interval_is_read_from_the_command_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.py").write_text("def get_config():\n    return {}\n")
    one = configs.load(tmp_path / "c.py", [f"--config.train.eval_every={text}"])
    assert one.train.eval_every == (10 if text == "10" else text)


@pytest.mark.parametrize("value", ["0%", "ten", "10 steps per epoch", "-1", "-5%", 0.1, True, None])
def test_what_is_no_interval_is_refused_with_the_three_notations(value: Any) -> None:
    with pytest.raises(UserError, match=r"must be a number of steps, a percentage of the run such as '10%', or epochs"):
        configs.validate({"train": {"eval_every": value}})


def test_the_bounds_of_an_interval_in_steps_hold() -> None:
    with pytest.raises(UserError, match=r"checkpoint\.every=0 must be at least 1"):
        configs.validate({"checkpoint": {"every": 0}})


def rows(root: Path, *, most: int = 1000, **fields: Any) -> tuple[int, bool]:
    one = configs.validate(config(root, **fields))
    task, batches = open_data(one, sharding.make_mesh())
    assert batches.source is not None
    return count_rows(batches.source, one.data, task, most)


def test_an_epoch_has_the_rows_that_the_stream_fills_with_its_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rows(tmp_path) == (40, True)
    packed = configs.validate(config(tmp_path, data__pack=True, data__shuffle=False))
    task, batches = open_data(packed, sharding.make_mesh())
    one = train_batches(packed.data, task, Batching(1), 0)
    found = next(count for count, _ in enumerate(one, 1) if one.summary()["records"] >= 40)
    assert rows(tmp_path, data__pack=True)[1]
    assert abs(rows(tmp_path, data__pack=True)[0] - found) <= 1  # the last rows of an epoch are filled by the next one
    estimate, exact = rows(tmp_path, most=10, data__pack=True)
    assert (abs(estimate - found) <= 2, exact) == (True, False)
    assert rows(tmp_path, data__too_long="drop", data__max_length=7)[0] == 10
    assert (
        duration.describe_length(packed, task, batches)
        == f"6 steps of 8 packed rows: {48 / found:.3g} epochs of {found} packed rows"
    )
    whole = dataclasses.replace(packed, data=dataclasses.replace(packed.data, pack=False))
    task, batches = open_data(whole, sharding.make_mesh())
    assert duration.describe_length(whole, task, batches) == "6 steps of 8 examples: 1.2 epochs of 40 examples"
    monkeypatch.setattr(epoch, "TYPICAL", 1)  # longer records: fewer are tokenized
    estimate, exact = rows(tmp_path, data__pack=True)
    assert (abs(estimate - found) <= 2, exact) == (True, False)


def test_a_mixture_has_no_epochs(tmp_path: Path) -> None:
    made = config(tmp_path, train__eval_every="1 epoch")
    made.data.train = tuple(f"{path}@1" for path in made.data.train)
    one = configs.validate(made)
    task, batches = open_data(one, sharding.make_mesh())
    assert duration.describe_length(one, task, batches) == "6 steps of 8 examples from a mixture"
    with pytest.raises(
        UserError, match=r"train\.jsonl@1 is a mixture with weights, which has no epochs; give train\.steps"
    ):
        train(one, tmp_path / "run")


@pytest.mark.slow
def test_a_run_in_epochs_is_one_in_steps_and_resumes_and_is_extended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"data__eval": (), "optim__warmup_fraction": 0.25, "train__eval_every": "10%"}
    by_epochs = config(tmp_path, train__epochs=1.0, **fields)
    by_epochs.train.steps = 1000
    train(configs.validate(by_epochs), tmp_path / "run")
    printed = capsys.readouterr().out
    assert "5 steps of 8 examples: 1 epoch of 40 examples" in printed
    assert re.search(r"parameters in float32, on .*, loaded in \d+.* s\n", printed)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (stored["train"]["steps"], stored["train"]["epochs"], stored["optim"]["warmup_steps"]) == (5, 0, 2)
    in_steps = config(tmp_path, train__steps=5, optim__warmup_steps=2, data__eval=())
    train(configs.validate(in_steps), tmp_path / "run")  # the same run, finished
    assert "resuming after step 5 of 5" in capsys.readouterr().out

    by_epochs.train.epochs = 2.0  # twice as long, with twice the warmup
    train(configs.validate(by_epochs), tmp_path / "run")
    assert "train.steps was raised from 5 to 10" in capsys.readouterr().out
    train(configs.validate(by_epochs), tmp_path / "run")
    by_epochs.optim.warmup_fraction = 0.5
    with pytest.raises(UserError, match=r"another configuration: optim\.warmup_steps: 5 here, 3 there"):
        train(configs.validate(by_epochs), tmp_path / "run")


def test_the_runs_of_a_sweep_over_epochs_are_put_in_steps_and_their_data_is_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(sweep.setup, "open_data", lambda *given: opened.append(given) or open_data(*given))
    base = config(tmp_path, train__epochs=1.0)
    base.train.steps = 1000
    runs = [
        Member({}, configs.changed(configs.validate(base), fields), tmp_path / "run")
        for fields in ({}, {"train.epochs": 2.0}, {"optim.learning_rate": 1.0}, {"train.steps": 7})
    ]
    sweep.resolve_configs(runs)
    assert [one.config.train.steps for one in runs] == [5, 10, 5, 7]
    assert len(opened) == 1
    assert sweep.populations(runs) == [runs]  # members may have different numbers of steps
