"""A run with a chat template of its own records it, and keeps it for those who use its result."""

import json
from pathlib import Path
from typing import Any

import pytest

import peftjax
from peftjax.core.errors import UserError
from peftjax.train import train
from peftjax.training import config as configs
from tests import tiny
from tests.runs import in_process

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    """The fields of a config for a model without a chat template, whose template is in a file."""
    directory = tiny.directory(tmp_path / "model")
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    (tmp_path / "train.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 8)
    source = [str(tmp_path / "train.jsonl")]
    return {
        "model": {"path": str(directory)},
        "method": {"name": "lora", "rank": 2},
        "data": {"train": source, "eval": source, "format": "chat", "max_length": 48},
        "train": {"steps": 2, "batch_size": 4, "eval_every": 0},
    }


def with_template(fields: dict[str, Any], template: str, **train: Any) -> configs.Config:
    return configs.validate(
        fields | {"data": fields["data"] | {"chat_template": template}, "train": fields["train"] | train}
    )


@pytest.mark.slow
def test_a_run_records_its_template_and_its_adapter_has_it(
    fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir, file = tmp_path / "run", tmp_path / "mine.jinja"
    config = with_template(fields, str(file))
    with pytest.raises(UserError, match="has no chat template"):
        train(configs.validate(fields), workdir)
    train(config, workdir)
    assert json.loads((workdir / "config.json").read_text())["data"]["chat_template"] == TEMPLATE
    assert (workdir / "adapter" / "chat_template.jinja").read_text() == TEMPLATE
    with pytest.raises(UserError, match=r"another configuration: data\.chat_template: .* here, .* there"):
        train(with_template(fields, TEMPLATE + " {{ '' }}"), workdir)
    file = file.rename(tmp_path / "moved.jinja")
    train(with_template(fields, str(file), steps=3), workdir)  # resumes
    file.unlink()

    (tmp_path / "config.json").write_text(json.dumps(fields))  # without the template
    printed = []
    for command, of_run, of_adapter in (
        ("evaluate", [], [f"--config={tmp_path / 'config.json'}"]),
        ("generate", ["--prompt=1+1=", "--max-new-tokens=2"], ["--prompt=1+1=", "--max-new-tokens=2"]),
    ):
        for arguments in ([f"--workdir={workdir}", *of_run], [f"--adapter={workdir / 'adapter'}", *of_adapter]):
            capsys.readouterr()
            assert in_process(command, *arguments) == 0
            printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    (of_run, of_adapter) = (text.split("\n> ") for text in printed[2:])
    assert of_run[0].startswith("applying the chat template, with the prompt as a user message")
    assert of_adapter[0].startswith("applying the chat template, with the prompt as a user message")
    assert of_run[1].rpartition("\n\n")[0] == of_adapter[1].rpartition("\n\n")[0]


def test_a_fully_fine_tuned_model_has_the_template(fields: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    train(with_template(fields | {"method": {"name": "full"}}, TEMPLATE, steps=1), tmp_path / "run")
    tokenizer = peftjax.load_tokenizer(tmp_path / "run" / "model")
    assert tokenizer.chat([{"role": "user", "content": "a"}], True) == "user: a<eos>assistant: "
