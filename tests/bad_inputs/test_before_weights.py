"""Mistakes that config.json, the config and the data decide: one line and exit code 2, before any weights are read."""

import json
from pathlib import Path
from typing import Any

import pytest

from peftjax.data.batches import Batches
from peftjax.tasks import model as model_section
from peftjax.training import memory
from tests import runs, tiny

CONFIG = """
from peftjax.core.config import defaults
from peftjax.methods import make_config

def get_config():
    config = defaults()
    config.model.path = "{root}/model"
    config.data.train, config.data.eval = ("{root}/train.jsonl",), ("{root}/eval.jsonl",)
    config.data.format, config.data.max_length = "completion", 24
    config.train.steps, config.train.batch_size = 2, 8
    {lines}
    return config
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and data."""
    root = tmp_path_factory.mktemp("bad")
    tiny.directory(root / "model")
    for name in ("train", "eval"):
        records = [{"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in range(8)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "silent.jsonl").write_text('{"prompt": "' + "long " * 30 + '", "completion": "1"}\n')
    (root / "file").write_text("")
    fields = json.loads((root / "model" / "config.json").read_text())
    (root / "small").mkdir()
    for file in (root / "model").iterdir():  # a vocabulary without a row for <eos>, which pads
        (root / "small" / file.name).write_bytes(file.read_bytes())
    (root / "small" / "config.json").write_text(json.dumps(fields | {"vocab_size": 256, "eos_token_id": None}))
    return root


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*arguments: Any, **options: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(model_section, "load_model", load_model)


def error_of(command: str, root: Path, lines: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command with a config."""
    (root / "config.py").write_text(CONFIG.format(root=root, lines=lines))
    given = [f"--config={root / 'config.py'}", *arguments]
    if not any(argument.startswith("--workdir") for argument in arguments):
        given.append(f"--workdir={root / 'run'}")
    capsys.readouterr()
    assert runs.in_process(command, *given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


CASES: dict[str, tuple[str, ...]] = {
    # lines of the config: what the message has to name, and words of the fix
    "config.optim.warmup_steps = 3": ("optim.warmup_steps=3", "at most train.steps=2"),
    "config.optim.b1 = 1.0": ("optim.b1=1", "less than 1"),
    "config.optim.b2 = 1.0": ("optim.b2=1", "less than 1"),
    "config.optim.eps = 0.0": ("optim.eps=0", "for example 1e-8"),
    "config.optim.learning_rate = float('inf')": ("optim.learning_rate=inf", "must be at least 0"),
    "config.optim.learning_rate = float('nan')": ("optim.learning_rate=nan", "must be at least 0"),
    "config.method = make_config('lora', dropout=1.0)": ("dropout must be at least 0", "below 1", "1.0"),
    "config.method = make_config('lora', alpha=float('inf'))": ("method.alpha", "inf"),
    "config.method = make_config('full'); config.model.quantize = 'nf4'": ("method.name='full'", "model.quantize=''"),
    "config.method = make_config('lora', rank=64)": ("method.rank=64", "k_proj", "use at most 16"),
    "config.method = make_config('lora', targets=('q_prj',))": ("'q_prj'", "Did you mean 'q_proj'"),
    "config.method = make_config('lora', layers_to_transform=(3,))": ("layer 3 does not exist", "layers 0 to 2"),
    "config.method = make_config('prompt', tokens=60)": ("60 virtual tokens", "64 positions", "lower"),
    "config.data.max_length = 65": ("data.max_length=65", "64 positions", "lower data.max_length"),
    "config.model.skip_quantize = ('q_prj',); config.model.quantize = 'nf4'": ("q_prj", "Did you mean"),
    "config.model.attention = 'splash'": ("attention='splash'", "multiple of 128"),
    "config.model.attention = 'cudnn'": ("attention='cudnn'", "choose 'xla'"),
    "config.model.path = '{root}/small'": ("small: padding", "'<eos>'", "256 rows", "model.resize_embeddings=True"),
    "config.data.max_length = 10**13": ("data.max_length=10000000000000", "the batch alone takes", "lower"),
    "config.train.batch_size = 10**12": ("train.batch_size=1000000000000", "the batch alone takes", "lower"),
    "config.data.train = ('{root}/silent.jsonl',)": ("silent.jsonl", "data.max_length"),
    "config.data.eval = ('{root}/silent.jsonl',)": ("silent.jsonl", "data.max_length"),
    "config.data.prompt_template = '{{prompt:>999999999}}'": ("{prompt:>999999999}", "at most 10,000"),
    "config.data.prompt_template = '{{prompt:{{completion}}999999999}}'": ("999999999 characters", "at most 10,000"),
    "config.task.kind = 'seq2seq'": ("does not support task.kind='seq2seq'", "it supports causal_lm"),
    "config.eval.exact_match = 3; config.data.eval = ()": ("eval.exact_match=3", "set data.eval"),
    "config.eval.samples = 3; config.data.eval = ()": ("eval.samples=3", "set data.eval"),
    "config.model.new_head = True": ("model.new_head=True", "task.kind='causal_lm'", "set it to False"),
    "import sys; sys.exit(0)": ("config.py, line 11", "SystemExit: 0"),
}


@pytest.mark.parametrize("lines", CASES)
def test_train_refuses(lines: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of("train", root, lines.format(root=root), capsys)
    for words in CASES[lines]:
        assert words in line, line


def test_a_batch_beyond_the_memory_is_refused_before_it_is_read(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "most_memory", lambda devices: 2**28)
    monkeypatch.setattr(Batches, "__next__", None)
    line = error_of("train", root, "config.train.batch_size = 40_000", capsys)
    for words in ("train.batch_size=40000", "data.max_length=24", "256 MiB of memory", "lower"):
        assert words in line, line


def test_a_sweep_checks_all_members_before_the_first_one_trains(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for field, member, words in (
        ("--sweep.method.rank=2,64", "rank=64: ", "method.rank=64 exceeds"),
        ("--sweep.data.max_length=16,65", "max_length=65: ", "64 positions"),
        ("--sweep.method.targets=('q_proj',);('q_prj',)", "targets=", "'q_prj' matches no layer"),
    ):
        line = error_of("sweep", root, "pass", capsys, field)
        assert member in line, line
        assert words in line, line
    assert not (root / "run" / "sweep.json").exists()


def test_evaluate_checks_the_data_before_the_weights(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "done" / "adapter").mkdir(parents=True)
    lines = f"config.data.eval = ('{root}/silent.jsonl',)"
    line = error_of("evaluate", root, lines, capsys, f"--workdir={root / 'done'}")
    assert "silent.jsonl" in line
    line = error_of("evaluate", root, "config.data.eval = ()", capsys, f"--workdir={root / 'done'}")
    assert "data.eval names no source" in line


@pytest.mark.parametrize(
    ("option", "message"),
    [
        *((f"--temperature={value}", "use 0 (greedy) or a finite number above 0") for value in ("nan", "inf", "-1.0")),
        ("--max-new-tokens=0", "generates nothing; use 1 or more"),
    ],
)
def test_generate_refuses_a_value(option: str, message: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.in_process("generate", f"--model={root / 'nowhere'}", "--prompt=a", option) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert option.removeprefix("--") in line
    assert message in line
