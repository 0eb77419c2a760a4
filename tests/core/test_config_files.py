"""Config files in YAML and JSON mean what the Python file with the same values means."""

import os
import sys
from pathlib import Path

import pytest

from peftjax.core.errors import UserError
from peftjax.training import config

PYTHON = """
from peftjax.core.config import defaults
from peftjax.methods import make_config

def get_config():
    config = defaults()
    config.seed = 3
    config.model.path = "no"
    config.method = make_config("lora", rank=4, targets=("q_proj", "v_proj"), rank_pattern={"q_proj": 2})
    config.data.train = ("a.jsonl", "2024-01-01.jsonl@0.5")
    config.data.prompt_template = "Q: {question}\\nA:"
    config.optim.learning_rate = 1e-3
    config.train.steps = 10_000
    config.data.pack = True
    return config
"""
YAML = """
seed: 3
model: {path: no}  # a string in YAML 1.2
method:
  name: lora
  rank: 4
  targets: [q_proj, v_proj]
  rank_pattern: {q_proj: 2}
data:
  train:
    - a.jsonl
    - 2024-01-01.jsonl@0.5
  prompt_template: "Q: {question}\\nA:"
  pack: true
optim.learning_rate: 1e-3
train: {steps: 10_000}
"""


@pytest.fixture
def load(tmp_path: Path):
    def load(name: str, text: str, *overrides: str) -> config.Config:
        (tmp_path / name).write_text(text)
        return config.load(tmp_path / name, overrides)

    return load


def test_yaml_and_json_give_the_config_that_python_gives(load) -> None:
    expected = load("run.py", PYTHON)
    assert load("run.yaml", YAML) == expected
    assert load("run.yml", YAML + "# the end", "--config.seed=4").seed == 4
    assert load("config.json", config.to_json(expected)) == expected  # as a run writes it into its workdir
    assert load("empty.yaml", "# nothing") == load("empty.json", "{}") == config.validate({})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "optim:\n  b1: 0.9\n  learning_rat: 1e-3", "a.yaml, line 3: unknown field optim.learning_rat. Did you"),
        ("a.yaml", "optm:\n  b1: 0.9", "a.yaml, line 2: unknown field optm.b1. Did you mean 'optim.b1'?"),
        ("a.yaml", "seed: 1\ntrain:\n  steps: many", "a.yaml, line 3: train.steps must be an int, not 'many' (str)"),
        ("a.yaml", "seed: 1\nmethod: {name: lroa}", "a.yaml, line 2: method.name: 'lroa' is not a method. Did"),
        ("a.yaml", "seed: 1\ntrain:", "a.yaml, line 2: train is a section; set one of its fields: train.steps"),
        ("a.yaml", "seed: 1\nseed: 2", "a.yaml, line 2: seed is given twice, first on line 1"),
        ("a.yaml", "train:\n  - steps", "a.yaml, line 1: train"),
        ("a.yaml", "train: {1: 2}", "a.yaml, line 1: the name of a section or a field must be a string, not '1'"),
        ("a.yaml", "- seed", "a.yaml, line 1: a config must be a mapping with sections"),
        ("a.yaml", "seed: 1\ntrain: [1\n", "a.yaml, line 3: not valid YAML: expected ',' or ']'"),
        ("a.yaml", "seed: !!python/object/apply:os.getcwd []", "a.yaml, line 1: not valid YAML: could not determine"),
        ("a.yaml", "seed: 1\n\x00", "a.yaml: not valid YAML: unacceptable character"),
        ("a.json", '{"seed": 1,\n"train": }', "a.json, line 2: not valid JSON: Expecting value"),
        ("a.json", '{"seed": 1, "seed": 2}', "a.json: not valid JSON: 'seed' is given twice"),
        ("a.json", "[]", "a.json: a config must be an object with sections, not []"),
        ("a.json", '{"train": {"steps": true}}', "a.json: train.steps must be an int, not True (bool)"),
        ("a.toml", "", "a.toml: a config is a Python, YAML or JSON file"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_the_file_and_the_line(load, name: str, text: str, message: str, tmp_path) -> None:
    with pytest.raises(UserError) as caught:
        load(name, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_the_place_of_a_syntax_error_in_an_imported_module_is_the_import(load, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_helper.py").write_text("a = 1\nb = = 2\n")
    with pytest.raises(UserError, match=r"run\.py, line 1: SyntaxError: .*\(broken_helper\.py, line 2\)$"):
        load("run.py", "import broken_helper\n" + PYTHON)


def test_a_key_of_another_type_is_an_unknown_field(load) -> None:
    with pytest.raises(UserError, match=r"run\.py: unknown field 1\."):
        load("run.py", "def get_config():\n    return {1: 2}\n")


def test_a_file_that_is_not_there_is_refused_with_a_near_name_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "lora.yaml").write_text("")
    with pytest.raises(UserError, match=r"lora\.yml: no such file\. Did you mean 'lora\.yaml'"):
        config.load(tmp_path / "lora.yml")


def test_a_python_file_that_is_rewritten_in_the_same_second_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "config.py"
    for seed in (3, 4):
        file.write_text(PYTHON.replace("seed = 3", f"seed = {seed}"))
        os.utime(file, (1_000_000_000, 1_000_000_000))
        assert config.load(str(file)).seed == seed
    assert [path.name for path in tmp_path.iterdir()] == ["config.py"]


def test_a_python_file_may_define_dataclasses(tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    lines = (
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass Own:\n    a: int = 3\n"
    )
    file.write_text(lines + PYTHON)
    assert config.load(str(file)).seed == 3
