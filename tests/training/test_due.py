"""When a run logs, evaluates and saves; checkpoints by time change nothing else."""

from pathlib import Path

import pytest

from peftjax.core import distributed
from peftjax.train import train
from peftjax.training import config as configs
from peftjax.training.due import Due
from tests.runs import checkpoints, files, last_arrays, metrics
from tests.test_train import config


def test_a_checkpoint_is_due_by_steps_and_at_a_line_of_the_log_once_the_last_one_is_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    fields = {"train": {"steps": 50, "log_every": 5, "eval_every": 20}, "checkpoint": {"every": 15, "minutes": 2.0}}
    due = Due(configs.validate(fields), lambda: now[0])
    assert [step for step in range(1, 51) if due.save(step)] == [15, 20, 30, 40, 45, 50]
    assert [step for step in range(1, 51) if due.eval(step)] == [20, 40, 50]
    assert not due.save_by_time(5)
    now[0] = 119.9
    assert not due.save_by_time(5)
    now[0] = 120.0
    assert (due.save_by_time(9), due.save_by_time(10)) == (False, True)
    due.saved()
    assert not due.save_by_time(10)
    now[0] = 240.0
    monkeypatch.setattr(distributed, "gather", lambda mine: [False, mine])  # process 0 decides
    assert not due.save_by_time(10)
    monkeypatch.setattr(distributed, "gather", lambda mine: [True, mine])
    now[0] = 120.0
    assert due.save_by_time(10)
    off = Due(configs.validate(fields | {"checkpoint": {"minutes": 0}}), lambda: now[0])
    now[0] = 1e9
    assert not off.save_by_time(10)


@pytest.mark.slow
def test_checkpoints_by_time_change_no_other_bit(tmp_path: Path) -> None:
    for name, minutes in (("steps", 0.0), ("time", 1e-9)):
        fields = {"checkpoint__every": 6, "checkpoint__minutes": minutes, "checkpoint__keep": 9}
        train(configs.validate(config(tmp_path, **fields)), tmp_path / name)
    assert checkpoints(tmp_path / "steps") == {"6"}
    assert checkpoints(tmp_path / "time") == {"2", "4", "6"}  # the lines of the log
    assert metrics(tmp_path / "steps") == metrics(tmp_path / "time")
    assert last_arrays(tmp_path / "steps") == last_arrays(tmp_path / "time")
    assert files(tmp_path / "steps" / "adapter") == files(tmp_path / "time" / "adapter")
