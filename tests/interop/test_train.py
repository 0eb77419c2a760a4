"""The train command on real checkpoints and real data, under the configs of configs/, and its adapter in peft."""

import json
from pathlib import Path

import pytest

import peftjax
from peftjax.log import read_metrics
from peftjax.train import main as train_main
from tests.interop.peers import THEIRS, assert_close, assert_far, load_into_theirs, logits

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings(*THEIRS)]


@pytest.mark.parametrize(
    ("name", "config", "data"),
    [
        ("tinystories656k", "e2e_nlg_llama_lora", "e2e_nlg"),
        ("stories260k", "shakespeare_llama_lora", "tiny_shakespeare"),
    ],
)
def test_a_real_checkpoint_learns_answers_otherwise_and_its_adapter_loads_into_peft(
    assets: Path, tmp_path: Path, name: str, config: str, data: str
) -> None:
    base, folder, workdir = assets / name, assets / "data" / data, tmp_path / "run"
    fields = {
        "model.path": base,
        "data.train": folder / "train.jsonl.gz",
        "data.eval": folder / "validation.jsonl.gz",
        "data.max_length": 96,
        "optim.warmup_steps": 2,
        "train.steps": 12,
        "train.eval_every": 0,
        "train.eval_batches": 2,
        "eval.samples": 2,
        "eval.max_new_tokens": 12,
    }
    overrides = [f"--config.{field}={value}" for field, value in fields.items()]
    train_main([f"--config={ROOT / 'configs' / f'{config}.py'}", f"--workdir={workdir}", *overrides])

    before, after = (line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "eval")
    assert after["eval_loss"] < before["eval_loss"] - 0.3
    report = json.loads((workdir / "report.json").read_text())
    answers = [[sample["answer"] for sample in report[side]] for side in ("before", "after")]
    assert len(answers[0]) == 2
    assert all(old != new for old, new in zip(*answers, strict=True))

    model = peftjax.load_model(base)
    untrained = logits(model, 100)
    peftjax.load_adapter(model, workdir / "adapter")
    assert_far(logits(model, 100), untrained)
    assert_close(logits(model, 100), logits(load_into_theirs(base, workdir / "adapter"), 100))
