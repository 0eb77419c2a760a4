"""The benchmarks: what their bound counts, and accelerator.py from end to end at tiny shapes, comparing the CPU with itself."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from peftjax import methods, sharding
from peftjax.plan.hlo import ENTRY, parse_program
from peftjax.plan.traced import trace_step
from peftjax.training import config as configs
from peftjax.training import jaxpr_cost
from peftjax.training.operations import Operation
from peftjax.training.step import apply
from tests import tiny
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


PROGRAM = """HloModule jit_train_step
%slice (stack: bf16[3,8,4], i: s32[]) -> bf16[8,4] {
  %stack = bf16[3,8,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %next = s32[] add(%i, %i)
  %wide = f32[3,8,4]{2,1,0} convert(%stack)
  %part = f32[1,8,4]{2,1,0} dynamic-slice(%wide, %next, %next, %next), dynamic_slice_sizes={1,8,4}
  ROOT %kernel = bf16[8,4]{1,0} bitcast(%part)
}
%decode (codes: s4[8,4]) -> f32[8,4] {
  %codes = s4[8,4]{1,0} parameter(0)
  ROOT %values = f32[8,4]{1,0} convert(%codes)
}
%add (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  ROOT %sum = f32[8,4]{1,0} add(%a, %a)
}
ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %sliced = bf16[8,4]{1,0} fusion(%x), kind=kLoop, calls=%slice
  %decoded = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%decode
  %product = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %added = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%add
}
"""


def test_operations_are_told_apart_in_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from profile_steps import kind

    program = parse_program(PROGRAM)
    update = apply.__code__.co_firstlineno + 2

    def kind_of(name: str, source: str = "") -> str:
        return kind(program[ENTRY][name], Operation(name, "", "", source, backward=False), program)

    assert kind_of("sliced") == "copies out of stacks"
    assert kind_of("decoded") == "decoding NF4"
    assert kind_of("product", "nn/attention.py:10, models/decoder.py:20") == "products of attention"
    assert kind_of("product", "nn/linear.py:10") == "products with kernels, adapters and head"
    assert kind_of("added") == kind_of("added", "nn/norm.py:1") == "element-wise operations and reductions"
    assert kind_of("added", f"training/step.py:{update}") == "optimizer update"


@pytest.mark.slow
def test_growth_is_measured_and_plotted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import scaling

    monkeypatch.setattr(scaling, "STUDIES", {"length": (16, 32), "runs": (1, 2)})
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--shape=tiny", "--rounds=1", f"--results={tmp_path}"])
    with jax.set_mesh(sharding.make_mesh()):  # restores the mesh that the steps set
        scaling.main()
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert {study: list(times) for study, times in found.items()} == {"length": ["16", "32"], "runs": ["1", "2"]}
    assert all(seconds > 0 for times in found.values() for seconds in times.values())
    assert "runs: exponent" in (tmp_path / "scaling.svg").read_text()


@pytest.mark.slow
def test_the_memory_of_a_step_comes_from_the_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    for variable in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.setenv(variable, "cpu")  # restored after the import, which sets them
    import knobs
    import qlora_memory

    wide = tiny.CONFIG | {  # never in memory
        "hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 32_000, "max_position_embeddings": 2048,
    }  # fmt: skip
    for module in (knobs, qlora_memory):
        monkeypatch.setitem(module.CASES, "wide", qlora_memory.case("wide", "cpu", 4, 256))
        monkeypatch.setattr(module, "sizes", lambda model: wide)
    monkeypatch.setattr(knobs, "KNOBS", ((), ("--config.train.batch_size=4",)))
    monkeypatch.setattr(sys, "argv", ["knobs.py", "wide"])
    knobs.main()
    qlora_memory.main(["wide", "--base=bfloat16"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "arguments" in line]
    (nf4, small), (same, large), (dense, _) = (
        [float(number) for number in re.findall(r"(?:arguments|temporaries) ([\d.]+)", line)] for line in lines
    )
    assert nf4 == same < dense
    assert 2 * small < large


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
