"""The command evaluate on an adapter directory and on a base model, without a run."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flax import nnx

import peftjax
from peftjax.tasks import model as model_section
from peftjax.training import config as configs
from peftjax.training.trained import check_adapter
from tests import tiny
from tests.runs import files, in_process


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, adapters of the first one, held-out records, and a config without a word about a method."""
    root = tmp_path_factory.mktemp("evaluate")
    tiny.directory(root / "model")
    tiny.directory(root / "other", seed=1)
    model = peftjax.attach(peftjax.load_model(root / "model"), peftjax.Lora(rank=2), rngs=nnx.Rngs(0))
    peftjax.save_adapter(model, root / "untrained")
    peftjax.save_adapter(tiny.randomize(model), root / "adapter")
    records = [{"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in range(6)]
    (root / "eval.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {
        "model": {"path": str(root / "model")},
        "data": {"eval": [str(root / "eval.jsonl")], "format": "completion", "max_length": 24},
        "train": {"batch_size": 4},
        "eval": {"exact_match": 2, "max_new_tokens": 2},
    }
    (root / "config.json").write_text(json.dumps(config))
    return root


@pytest.mark.slow
def test_an_adapter_and_the_base_have_the_scores_that_they_have_in_a_run(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*arguments: str) -> str:
        assert in_process("evaluate", f"--config={root / 'config.json'}", *arguments) == 0
        return capsys.readouterr().out

    shutil.copytree(root / "adapter", tmp_path / "run" / "adapter")
    of_run = printed(f"--workdir={tmp_path / 'run'}")
    assert (tmp_path / "run" / "evaluation.json").exists()
    before = files(root)
    found = printed(f"--adapter={root / 'adapter'}", "--config.method.name=full")  # the method is not read
    assert found == of_run
    assert {"eval_loss", "exact_match"} <= {line.split()[0] for line in found.splitlines()}
    base = printed("--base")
    assert base == printed(f"--adapter={root / 'untrained'}") != found
    assert files(root) == before


def test_evaluate_refuses_what_does_not_fit(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier = shutil.copytree(root / "adapter", tmp_path / "classifier")
    fields = json.loads((classifier / "adapter_config.json").read_text())
    (classifier / "adapter_config.json").write_text(json.dumps(fields | {"task_type": "SEQ_CLS"}))
    config, adapter = f"--config={root / 'config.json'}", f"--adapter={root / 'adapter'}"

    def refused(message: str, *arguments: str) -> None:
        assert in_process("evaluate", *arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line

    refused("was trained on another base", config, adapter, f"--config.model.path={root / 'other'}")
    monkeypatch.setattr(model_section, "load_model", lambda *_, **__: pytest.fail("weights are read"))
    refused("nothing to evaluate; give --workdir=DIR of a training run, or --config=FILE with --adapter=DIR", config)
    refused("--workdir and --adapter name different models; give one of them", config, "--workdir=run", adapter)
    refused("--adapter needs --config=FILE, which has the base model", adapter)
    refused("--base needs --config=FILE", "--base")
    refused("--adapter= is empty", config, "--adapter=")
    refused("nowhere: no such directory", config, f"--adapter={tmp_path / 'nowhere'}")
    refused(
        "task_type 'SEQ_CLS' does not fit task.kind='causal_lm'; give another adapter, or set task.kind='classification' or "
        "'regression'",
        config,
        f"--adapter={classifier}",
    )
    refused("data.eval names no source", config, "--base", "--config.data.eval=", "--config.eval.exact_match=0")


def test_an_adapter_of_another_base_on_the_hub_causes_a_warning(root: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(root / "adapter", tmp_path / "adapter")
    fields = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(fields | {"base_model_name_or_path": "org/base-chat"}))
    task: Any = SimpleNamespace(card_task="CAUSAL_LM")
    for path in ("org/base-chat", str(root / "model")):  # a local directory may be a copy of it
        check_adapter(adapter, configs.validate({"model.path": path}), task)
    with pytest.warns(UserWarning, match=r"names the base model org/base-chat, and is used on model\.path='org/base'"):
        check_adapter(adapter, configs.validate({"model.path": "org/base"}), task)
