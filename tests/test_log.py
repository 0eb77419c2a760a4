"""The log: what it writes, what a resumed run makes of it, what it prints."""

import io
import json
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peftjax.core.errors import UserError
from peftjax.core.files import write_atomically
from peftjax.core.memory import peak_memory
from peftjax.core.units import format_bytes, format_clock
from peftjax.log import METRICS, Log, read_metrics
from tests.runs import is_measured


def run(workdir: Path, start: int, stop: int, **options: Any) -> None:
    """Log steps start + 1 to stop of 6, evaluated before the first and at every second step."""
    options = {"tensorboard": False, "quiet": True} | options
    with Log(workdir, total_steps=6, resume_step=start, **options) as log:
        if start == 0:
            log.evaluation(0, {"eval_loss": 9.0})
        for step in range(start + 1, stop + 1):
            log.step(step, {"loss": 1 / step, "tokens_per_second": 100.0, "learning_rate": 1e-3, "grad_norm": 0.5})
            if step % 2 == 0:
                log.evaluation(step, {"eval_loss": 2 / step})


def repeatable(workdir: Path) -> list[list[tuple[str, Any]]]:
    """The lines without what two equal runs may differ in; pairs, so that the order of the fields counts."""
    return [
        [(name, value) for name, value in line.items() if not is_measured(name)]
        for line in read_metrics(workdir / METRICS)
    ]


def test_each_logged_step_is_one_json_line(tmp_path: Path) -> None:
    run(tmp_path, 0, 2)
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [(line["step"], line["kind"]) for line in lines] == [(0, "eval"), (1, "train"), (2, "train"), (2, "eval")]
    assert lines[1].keys() == {
        "step", "kind", "seconds", "loss", "tokens_per_second", "learning_rate", "grad_norm", "peak_memory_bytes",
    }  # fmt: skip
    assert lines[2]["loss"] == 0.5
    assert all(line["peak_memory_bytes"] > 2**20 for line in lines if line["kind"] == "train")
    assert read_metrics(tmp_path / METRICS) == lines


def test_a_line_is_in_the_file_when_the_call_returns(tmp_path: Path) -> None:
    with Log(tmp_path, total_steps=2, resume_step=0, tensorboard=False, quiet=True) as log:
        log.step(1, {"loss": 1.0})
        assert read_metrics(tmp_path / METRICS)[-1]["step"] == 1


def test_numbers_that_are_not_finite_stay_json_and_come_back(tmp_path: Path) -> None:
    with Log(tmp_path, total_steps=1, resume_step=0, tensorboard=False, quiet=True) as log:
        log.step(1, {"loss": math.nan, "grad_norm": np.float32(np.inf), "other": -math.inf})
    text = (tmp_path / METRICS).read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (line,) = read_metrics(tmp_path / METRICS)
    assert math.isnan(line["loss"])
    assert (line["grad_norm"], line["other"]) == (math.inf, -math.inf)


def test_numbers_of_numpy_are_written_as_they_are(tmp_path: Path) -> None:
    with Log(tmp_path, total_steps=1, resume_step=0, tensorboard=False, quiet=True) as log:
        log.step(1, {"loss": np.float32(0.1), "tokens": np.int32(7)})
    (line,) = read_metrics(tmp_path / METRICS)
    assert line["loss"] == float(np.float32(0.1))
    assert type(line["tokens"]) is int


@pytest.mark.parametrize("torn", ["", '{"step": 5, "kind": "tr', "\0\0\0"])
def test_a_killed_and_resumed_log_equals_an_undisturbed_one(tmp_path: Path, torn: str) -> None:
    run(tmp_path / "whole", 0, 6)
    run(tmp_path / "killed", 0, 4)  # its last checkpoint is of step 2
    with (tmp_path / "killed" / METRICS).open("a") as file:
        file.write(torn)
    run(tmp_path / "killed", 2, 6)
    assert repeatable(tmp_path / "killed") == repeatable(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.partial"))


def test_a_run_from_step_0_begins_its_log_anew(tmp_path: Path) -> None:
    run(tmp_path, 0, 4)
    run(tmp_path, 0, 1)
    assert [line["step"] for line in read_metrics(tmp_path / METRICS)] == [0, 1]


def test_seconds_go_on_after_a_resume(tmp_path: Path) -> None:
    run(tmp_path, 0, 2)
    path = tmp_path / METRICS
    path.write_text("".join(json.dumps(line | {"seconds": 1000.0}) + "\n" for line in read_metrics(path)))
    run(tmp_path, 2, 4)
    seconds = [line["seconds"] for line in read_metrics(path)]
    assert seconds == sorted(seconds)
    assert 1000 <= seconds[-1] < 1060


@pytest.mark.parametrize(
    "broken", ['{"step": 1, "ki', '{"step": 1}', "[1]", '{"step": 1, "kind": "train", "seconds": NaN}']
)
def test_a_broken_line_before_the_last_is_named(tmp_path: Path, broken: str) -> None:
    run(tmp_path, 0, 2)
    path = tmp_path / METRICS
    lines = path.read_text().splitlines()
    lines[2] = broken
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 3"):
        read_metrics(path)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 3"):
        run(tmp_path, 2, 4)
    assert path.read_text().splitlines() == lines


def test_a_last_line_that_is_cut_off_is_left_out(tmp_path: Path) -> None:
    run(tmp_path, 0, 2)
    path = tmp_path / METRICS
    whole = path.read_text()
    path.write_text(whole[:-1])  # only its newline is missing: nothing is lost
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2, 2]
    path.write_text(whole[:-2])
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2]


def test_a_disabled_log_touches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "none", 0, 4, enabled=False, quiet=False, tensorboard=True)
    assert not (tmp_path / "none").exists()
    assert capsys.readouterr().out == ""


def test_a_quiet_log_writes_and_does_not_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, 0, 2)
    assert read_metrics(tmp_path / METRICS)
    assert capsys.readouterr().out == ""


def test_without_a_terminal_each_logged_step_is_a_plain_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as GitHub sets it: colours, but no cursor to move
    run(tmp_path, 0, 2, quiet=False)
    out = capsys.readouterr().out
    assert not [character for character in out if ord(character) < 32 and character != "\n"]
    lines = out.splitlines()
    assert len(lines) == 4
    assert lines[0] == "step 0/6  evaluation  loss 9"
    assert lines[2].startswith("step 2/6  loss 0.5  lr 0.001  100 tok/s  ")
    assert lines[2].endswith(" left")


def test_on_a_terminal_there_is_a_bar_with_messages_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stdout", terminal)
    with Log(tmp_path, total_steps=60, resume_step=20, tensorboard=False) as log:
        log.message("[red]not markup[/red]")
        log.step(30, {"loss": 0.5, "learning_rate": 1e-3, "tokens_per_second": 1234.0})
        log.step(40, {"loss": 0.25, "learning_rate": 1e-3, "tokens_per_second": 1234.0})
        log.evaluation(40, {"eval_loss": 0.125})
    monkeypatch.undo()
    out = terminal.getvalue()
    for expected in (
        "[red]not markup[/red]",
        "20/60",
        "40/60",
        "loss 0.25",
        "1,234 tok/s",
        "evaluation  loss 0.125",
        " left",
    ):
        assert expected in out
    assert out.count("evaluation") == 1
    assert out.rstrip().endswith("\x1b[?25h")  # the cursor is back


def events(workdir: Path) -> list[list[Any]]:
    """The events of each TensorBoard file, oldest first."""
    import struct

    from tensorboardX.proto.event_pb2 import Event

    files = []
    for path in sorted(workdir.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        data, found = path.read_bytes(), []
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
        files.append(found)
    return files


def test_tensorboard_gets_the_same_numbers_and_hides_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    run(tmp_path, 0, 4, tensorboard=True)
    run(tmp_path, 2, 6, tensorboard=True)
    first, second = events(tmp_path)
    scalars = {(event.step, value.tag): value.simple_value for event in first for value in event.summary.value}
    assert scalars[4, "train/loss"] == 0.25
    assert scalars[0, "eval/loss"] == 9.0
    starts = [event for event in second if event.HasField("session_log")]
    assert [event.step for event in starts] == [3]  # events of earlier files from step 3 on are hidden
    assert min(event.step for event in second if event.summary.value) == 3
    assert not [event for event in first if event.HasField("session_log")]


def test_an_exception_closes_the_log(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Log(tmp_path, total_steps=1, resume_step=0, quiet=True) as log:
        raise KeyError
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.step(1, {"loss": 1.0})


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.json\.partial'"):
        write_atomically(tmp_path / "a.json", "text")
    log = Log(tmp_path, total_steps=6, resume_step=0, tensorboard=False, quiet=True)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log._file.fileno())
    os.close(full)
    for action in (partial(log.step, 1, {"loss": 1.0}), log.close):
        with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
            action()


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory()
    held = np.ones(2**25)  # 256 MiB
    grown = peak_memory()
    del held
    assert grown >= before
    assert grown > 2**28
    assert peak_memory() > 0.9 * grown  # a peak, not what is held now; the kernel's count is not exact


def test_sizes_and_times_are_short() -> None:
    assert [format_bytes(size) for size in (0, 999, 1536, 20.3 * 2**20, 700 * 2**20, 5 * 2**40)] == [
        "0 B", "999 B", "1.5 KiB", "20.3 MiB", "700 MiB", "5.0 TiB",
    ]  # fmt: skip
    assert [format_clock(seconds) for seconds in (0.2, 59.6, 3599, 3600, 90061)] == [
        "0:00", "1:00", "59:59", "1:00:00", "25:01:01",
    ]  # fmt: skip
