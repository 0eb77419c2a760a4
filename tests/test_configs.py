"""The configs that come with the project."""

import ast
import math
import runpy
from pathlib import Path

import pytest

from peftjax.core.errors import UserError
from peftjax.data.fields import fill
from peftjax.training import config as configs
from peftjax.training import duration, space
from peftjax.training.sections import DEFAULT_STEPS

FOLDER = Path(__file__).parents[1] / "configs"
EXPERIMENTS = sorted(
    path for name in ("config.py", "large.py") for path in (FOLDER.parent / "experiments").glob(f"*/{name}")
)
GLUE = FOLDER / "glue_roberta_lora.py"


@pytest.mark.parametrize(
    "path", [*sorted(FOLDER.glob("*.py")), *EXPERIMENTS], ids=lambda path: path.parent.name + path.stem
)
def test_a_config_is_valid_and_says_what_it_is_for(path: Path) -> None:
    few, several = (configs.load(path, [f"--config.train.{field}"]) for field in ("steps=5", "epochs=0.1"))
    assert duration.in_steps(few, lambda: 100).optim.warmup_steps <= few.train.steps == 5
    assert (few.train.epochs, several.train.steps) == (0, DEFAULT_STEPS)
    assert duration.in_steps(several, lambda: 1000).train.steps == math.ceil(100 / several.train.batch_size)
    assert ast.get_docstring(ast.parse(path.read_text()))
    for swept in space.read_spaces(str(path), []):
        space.load_run(str(path), [], [swept], space.grid(swept)[-1])


FIELDS = {
    **dict.fromkeys(("cola", "sst2"), ("sentence",)),
    **dict.fromkeys(("mrpc", "stsb", "rte", "wnli"), ("sentence1", "sentence2")),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
}


@pytest.mark.parametrize("task", FIELDS)
def test_a_task_of_glue_has_its_config(task: str) -> None:
    config = configs.load(f"{GLUE}:{task}")
    assert config.data.train == (f"tfds:glue/{task}/train",)
    assert (config.task.kind, len(config.task.labels)) == (
        ("regression", 0) if task == "stsb" else ("classification", 3 if task == "mnli" else 2)
    )
    record = {field: f"the {field}" for field in FIELDS[task]} | {"label": 0, "idx": 7}  # as in a local file
    texts = [config.data.prompt_template, *filter(None, [config.data.pair_template])]
    assert [fill(text, record, config.data, "a.jsonl:1") for text in texts] == [
        f"the {field}" for field in FIELDS[task]
    ]
    assert config.data.label_field == "label"
    config = duration.in_steps(config, lambda: 3200)
    assert (config.train.steps, config.train.eval_every, config.optim.warmup_steps) == (300, 100, 18)


def test_what_is_no_task_of_glue_is_told_with_what_is_near() -> None:
    with pytest.raises(UserError, match=r"'mprc' is not a GLUE task\. Did you mean 'mrpc'"):
        configs.load(f"{GLUE}:mprc")


def test_the_conversations_are_what_their_script_writes(tmp_path: Path) -> None:
    runpy.run_path(str(FOLDER / "data" / "date_chats" / "make.py"))["write"](tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        assert (FOLDER / "data" / "date_chats" / name).read_bytes() == (tmp_path / name).read_bytes()
