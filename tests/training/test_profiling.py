"""`--profile=N:M`: the trace of some steps, and the table of their most expensive operations."""

import re
from pathlib import Path

import pytest

from peftjax.core.errors import UserError
from peftjax.log import read_metrics
from peftjax.train import main, train
from peftjax.training import config as configs
from peftjax.training import profiling
from peftjax.training.operations import Operation, read_operations
from peftjax.training.profiling import operations_table, parse_steps
from tests.test_train import config


@pytest.mark.parametrize("text", ["5", "3:", "0:2", "4:3", "1:2:3", "a:b", "-1:2", ""])
def test_a_malformed_range_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--profile={text} must be N:M, .* such as --profile=20:22"):
        main(["--config=configs/quickstart.py", f"--workdir={tmp_path}", f"--profile={text}"])


def test_a_run_traces_the_steps_and_prints_their_operations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    made, workdir = config(tmp_path, data__eval=(), train__steps=4), tmp_path / "run"
    made.eval.samples = made.eval.exact_match = 0
    with pytest.raises(UserError, match="--profile=3:5: this run takes steps 1 to 4; choose steps among these"):
        train(configs.validate(made), workdir, profile=parse_steps("3:5"))
    capsys.readouterr()
    train(configs.validate(made), workdir, profile=parse_steps("3:4"))
    (trace,) = (workdir / "profile" / "plugins" / "profile").iterdir()
    assert {"".join(path.suffixes[-2:]) for path in trace.iterdir()} >= {".xplane.pb", ".json.gz"}
    printed = capsys.readouterr().out.splitlines()
    (start,) = (number for number, line in enumerate(printed) if "operations of steps 3 to 4" in line)
    inside = [line.strip("│ ") for line in printed[start:]]
    rows = [line.split() for line in inside if re.match(r"[\d.e-]+ +[\d.]+% ", line)]
    shares = [float(row[1].rstrip("%")) for row in rows]
    assert len(rows) == 11  # ten, and the others
    assert shares[:10] == sorted(shares[:10], reverse=True)
    assert sum(shares) == pytest.approx(100, abs=1)
    assert rows[-1][-1] == "others"
    assert "decoder.py:" in "\n".join(printed[start:])
    with pytest.raises(UserError, match="--profile=3:4: this run has finished all of its 4 steps"):
        train(configs.validate(made), workdir, profile=parse_steps("3:4"))


@pytest.mark.slow
def test_a_trace_that_cannot_be_read_is_a_warning_and_the_run_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("an event\nwithout a name")

    monkeypatch.setattr(profiling, "read_times", fail)
    made, workdir = config(tmp_path, data__eval=(), train__steps=3), tmp_path / "run"
    train(configs.validate(made), workdir, profile=parse_steps("2:2"))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: the trace"))
    assert line == (
        "warning: the trace of step 2 could not be read, and the run continues. KeyError: 'an event\\nwithout a "
        f"name'; details in {workdir / 'debug.log'}"
    )
    assert "in fail" in (workdir / "debug.log").read_text()
    assert read_metrics(workdir / "metrics.jsonl")[-1]["step"] == 3


def test_operations_carry_their_type_scopes_and_lines() -> None:
    program = """HloModule jit_train_step

FileNames
1 "/somewhere/peftjax/training/step.py"
2 "/somewhere/peftjax/models/decoder.py"
3 "/somewhere/peftjax/quant/base.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=10 end_line=10}
2 {file_name_id=2 function_name_id=1 line=20 end_line=20}
3 {file_name_id=3 function_name_id=1 line=30 end_line=30}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

ENTRY %main (x: f32[2]) -> f32[2] {
  %while.3 = (s32[], f32[2]{0}) while(%tuple), metadata={op_name="jit(train_step)/while"}
  ROOT %fusion.1 = bf16[8,4]{1,0} fusion(%a), metadata={op_name="jit(f)/transpose(jvp(q_proj))/while/body/dot_general" stack_frame_id=3}
}
"""
    found = read_operations(program)
    assert found["while.3"] == Operation("while.3", "tuple", "", "", False)
    assert found["fusion.1"] == Operation(
        "fusion.1", "bf16[8,4]", "q_proj/dot_general", "models/decoder.py:20", backward=True
    )
    table = operations_table(found, {"fusion.1": (8, 0.3), "while.3": (2, 0.1)}, steps=2, rows=1)
    first, others = zip(*(column.cells for column in table.columns), strict=True)
    assert first == ("150", "75.0%", "4", "fusion.1 bf16[8,4]\nq_proj/dot_general (backward) models/decoder.py:20")
    assert others[:4] == ("50", "25.0%", "", "1 others")
