"""The benchmarks: what their bound counts, and accelerator.py from end to end at tiny shapes, comparing the CPU with itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from peftjax import methods, sharding
from peftjax.plan.traced import trace_step
from peftjax.training import config as configs
from peftjax.training import jaxpr_cost
from tests.runs import QUICK

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "accelerator.py"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_bound_counts_the_products_of_a_step_without_masked_scores(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent / "against_peft")
    from cells import CELLS, RANK

    cell = CELLS[f"tiny-{method}-f32-2x32"]
    options = {"rank": RANK, "targets": "all-linear"} if method == "lora" else {}
    fields = {
        "model.init": "random", "model.attention": "xla", "train.batch_size": cell.rows, "data.max_length": cell.length,
    }  # fmt: skip
    config = configs.changed(configs.Config(method=methods.METHODS[method](**options)), fields)
    traced = trace_step(config, cell.sizes, sharding.make_mesh({}, devices=jax.devices()[:1])).traced
    width, layers = cell.sizes["hidden_size"], cell.sizes["num_hidden_layers"]
    scores = cell.rows * layers * 2 * cell.length**2 * width  # one product, masked or not
    masked, recomputed = 3 * scores, scores  # half of six products, and q k^T again in the backward pass
    assert jaxpr_cost.matmul_flops(traced.jaxpr.jaxpr) == cell.flops() + masked + recomputed


@pytest.mark.slow
def test_the_accelerator_benchmark_checks_and_measures_tiny_shapes(tmp_path: Path) -> None:
    file = tmp_path / "all.json"
    file.write_text(json.dumps({"steps": {"earlier": {"error": "out of memory"}}}))
    command = [sys.executable, str(SCRIPT), "qlora packed xla block", "--tiny", "--torch-python=", f"--json={file}"]
    environment = os.environ | {"XLA_FLAGS": QUICK, "PYTHONPATH": str(SCRIPT.parents[1])}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(file.read_text())
    assert found["device"]["platform"] == "cpu"
    assert min(value for name, value in found["device"].items() if name.endswith("per_second")) > 1e6
    checked = found["check"]
    assert [(case["method"], case["dtype"], case["attention"]) for case in checked[::2]] == [
        ("lora", "float32", "xla"), ("lora", "bfloat16", "xla"), ("qlora", "bfloat16", "xla"),
    ]  # fmt: skip
    assert all(max(case[kind] for kind in ("loss", "logits", "gradient")) < 1e-6 for case in checked)
    (step,) = (found["steps"][name] for name in found["steps"] if name != "earlier")
    assert step["seconds"][0] > 0
    assert step["planned"] == pytest.approx(step["compiled"], rel=0.2)
    assert "qlora-128-packed-xla-block" in ran.stdout
