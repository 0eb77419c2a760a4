"""A finished run that trains on after train.steps is raised."""

from pathlib import Path

import pytest

from peftjax.train import train
from peftjax.training import config as configs
from peftjax.training.optim import OptimConfig, describe_extension
from tests.runs import files, last_arrays, metrics
from tests.test_train import config


@pytest.mark.slow
def test_a_finished_run_goes_on_when_train_steps_is_raised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"optim__schedule": "constant", "train__eval_every": 3, "eval__exact_match": 0, "eval__samples": 0}
    short, long = (configs.validate(config(tmp_path, train__steps=steps, **fields)) for steps in (3, 6))
    train(short, tmp_path / "run")
    capsys.readouterr()
    train(long, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "resuming after step 3 of 6\n" in printed
    assert "train.steps was raised from 3 to 6; the schedule is constant, the next learning rate is 0.01\n" in printed

    train(long, tmp_path / "straight")  # with a constant rate the same run: nothing else depends on train.steps
    trained = [[line for line in metrics(tmp_path / name) if line["step"] != 3] for name in ("run", "straight")]
    assert [line["step"] for line in trained[0]] == [0, 2, 4, 6, 6]
    assert trained[0] == trained[1]
    assert last_arrays(tmp_path / "run") == last_arrays(tmp_path / "straight")
    assert files(tmp_path / "run" / "adapter") == files(tmp_path / "straight" / "adapter")
    assert (tmp_path / "run" / "config.json").read_bytes() == (tmp_path / "straight" / "config.json").read_bytes()

    with pytest.raises(ValueError, match=r"holds a run with another configuration: train\.steps: 3 here, 6 there"):
        train(short, tmp_path / "run")


def test_the_change_of_the_schedule_is_told_with_the_rates_on_both_sides() -> None:
    tell = lambda **fields: describe_extension(OptimConfig(learning_rate=1e-2, **fields), 100, 200, 100)  # noqa: E731
    cosine = tell(schedule="cosine")
    assert cosine.startswith("train.steps was raised from 100 to 200: the cosine schedule now spans 200 steps")
    assert cosine.endswith("the learning rate goes from 2.47e-06 to 0.005")  # 0.01 sin^2(pi/200), 0.01 sin^2(pi/4)
    assert tell(schedule="linear", final_fraction=0.1).endswith("from 0.00109 to 0.0055")
