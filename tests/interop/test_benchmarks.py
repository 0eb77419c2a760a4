"""The benchmark against PEFT, on three tiny cells: both sides run, agree, and are reported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import QUICK

pytestmark = pytest.mark.interop
pytest.importorskip("peft")

RUN = Path(__file__).parents[2] / "benchmarks" / "against_peft" / "run.py"
DENSE, EXPERTS, LOAD = "tiny-lora-f32-2x32", "tiny-moe-lora-f32-2x32", "tiny-load-dense-bf16"


def test_cells_are_measured_on_both_sides_and_merged_into_the_results(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    results.write_text("{}")
    for cells in ([DENSE], [EXPERTS, LOAD]):
        command = [sys.executable, str(RUN), *cells, f"--torch-python={sys.executable}", "--rounds=2", "--turn=0.01"]
        places = [f"--models={tmp_path}", f"--results={results}"]
        ran = subprocess.run(
            [*command, *places], env=os.environ | {"XLA_FLAGS": QUICK}, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
    found = json.loads(results.read_text())
    assert set(found) == {DENSE, EXPERTS, LOAD}
    for entry in (found[DENSE], found[EXPERTS]):
        for side in ("torch", "peftjax"):
            assert len(entry["seconds"][side]) == 2
            assert entry["first_seconds"][side] > 0
            assert entry["peak_bytes"][side] > 100e6
            assert entry["product_flops_per_second"][side] > 1e6
            assert side in entry["versions"][side]
        assert entry["first_result"]["torch"] == pytest.approx(entry["first_result"]["peftjax"], rel=1e-4)
    assert all(cell in ran.stdout for cell in found)
    table = results.with_suffix(".md").read_text()
    assert [line.split(" ")[1].rstrip("*\\") for line in table.splitlines()[2:5]] == [DENSE, EXPERTS, LOAD]
    assert "<svg" in results.with_suffix(".svg").read_text()
