"""A chat template that is given as a file or as text, in place of the tokenizer's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftjax.core.errors import UserError
from peftjax.data.tokenizer import load_tokenizer
from peftjax.tasks.prompt_format import PromptFormat, read_chat_template, save_chat_template
from peftjax.training import config as configs

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
QUESTION = [{"role": "user", "content": "hello"}]
WITHOUT = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    return tmp_path / "mine.jinja"


def test_a_template_is_a_text_or_a_file(make_directory: Callable[..., Path], file: Path) -> None:
    directory = make_directory(tokenizer_config=WITHOUT)
    with pytest.raises(UserError, match=r"has no chat template.* set data\.chat_template to a file with one"):
        load_tokenizer(directory).chat(QUESTION)
    for given in (TEMPLATE, str(file), file):
        tokenizer = load_tokenizer(directory, chat_template=given)
        assert tokenizer.chat(QUESTION) == "user: hello<|end|>"
        assert tokenizer.token_id("<|end|>") in tokenizer.stop_ids(chat=True)
    with pytest.raises(UserError, match=r"^the given chat template rejects the conversation: "):
        load_tokenizer(directory, chat_template="{{ raise_exception('no') }}").chat(QUESTION)
    with pytest.raises(
        UserError, match=r"miin\.jinja' is neither an existing file nor .* Did you mean 'mine\.jinja'\?"
    ):
        load_tokenizer(directory, chat_template=file.with_name("miin.jinja"))
    file.write_text("no template")
    with pytest.raises(UserError, match=r"mine\.jinja': the file holds no Jinja template"):
        load_tokenizer(directory, chat_template=file)


def test_a_config_has_the_text_of_the_template(make_config: Callable[..., Any], file: Path) -> None:
    config = make_config(format="chat", chat_template=str(file))
    file.unlink()
    assert config.data.chat_template == TEMPLATE
    assert configs.validate(configs.to_dict(config)) == config == make_config(format="chat", chat_template=TEMPLATE)
    with pytest.raises(UserError, match=r"^config: data\.chat_template='.*mine\.jinja' is neither an existing file"):
        make_config(format="chat", chat_template=str(file))
    with pytest.raises(UserError, match=r"data\.format='text' has none; set data\.format to chat, sharegpt or alpaca"):
        make_config(format="text", chat_template=TEMPLATE)
    (line,) = configs.differences(make_config(format="chat", chat_template=TEMPLATE * 99), configs.to_dict(config))
    assert line.startswith("data.chat_template: '{% for m")
    assert len(line) < 500


def test_a_saved_template_replaces_all_others(make_directory: Callable[..., Path]) -> None:
    directory = make_directory()
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    assert read_chat_template(directory) == ""
    save_chat_template(directory, TEMPLATE)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.chat(QUESTION) == tokenizer.chat(QUESTION, tools=[]) == "user: hello<|end|>"
    with pytest.warns(UserWarning, match="does not use the tools"):
        assert tokenizer.chat(QUESTION, tools=[{"name": "date"}]) == "user: hello<|end|>"
    assert read_chat_template(directory) == ""  # the directory may be that of another library
    PromptFormat("causal_lm", "chat", "{prompt}", "prompt").save(directory)
    assert read_chat_template(directory) == TEMPLATE
