"""The configs that come with the project."""

import ast
import runpy
from pathlib import Path

import pytest

from peftjax.core.errors import UserError
from peftjax.training import config as configs

FOLDER = Path(__file__).parents[1] / "configs"
GLUE = FOLDER / "glue_roberta_lora.py"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_a_config_is_valid_and_says_what_it_is_for(path: Path) -> None:
    configs.load(path)
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("task", ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"])
def test_a_task_of_glue_has_its_config(task: str) -> None:
    config = configs.load(f"{GLUE}:{task}")
    assert config.data.train == (f"tfds:glue/{task}/train",)
    assert (config.task.kind, len(config.task.labels)) == (
        ("regression", 0) if task == "stsb" else ("classification", 3 if task == "mnli" else 2)
    )
    assert config.train.steps > config.optim.warmup_steps


def test_what_is_no_task_of_glue_is_told_with_what_is_near() -> None:
    with pytest.raises(UserError, match=r"'mprc' is no task of GLUE\. Did you mean 'mrpc'"):
        configs.load(f"{GLUE}:mprc")


def test_the_conversations_are_what_their_script_writes(tmp_path: Path) -> None:
    runpy.run_path(str(FOLDER / "data" / "date_chats" / "make.py"))["write"](tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        assert (FOLDER / "data" / "date_chats" / name).read_bytes() == (tmp_path / name).read_bytes()
