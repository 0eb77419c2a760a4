"""A prompt to a trained model becomes the tokens that the same record has in the evaluation of its training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftjax.core.errors import UserError
from peftjax.data.tokenizer import Tokenizer, load_tokenizer
from peftjax.tasks import TaskConfig, make_task
from peftjax.tasks.prompt_format import PromptFormat, read_prompt_format
from peftjax.tasks.prompt_records import encode_chat_prompt

TEMPLATE = {"format": "completion", "completion_template": "{answer}"}
QUESTION = {"question": "hello world", "answer": "yes"}
TWO = QUESTION | {"context": {"text": ["the fox"]}}
CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}]}
SYSTEM = {"role": "system", "content": "be brief"}
TURNS = {"messages": [SYSTEM, *CHAT["messages"], *CHAT["messages"]]}
ALPACA = {"instruction": "hello", "output": "yes"}


@pytest.mark.parametrize(
    ("task", "data", "record", "prompt", "described"),
    [
        ("causal_lm", {"format": "completion"}, {"prompt": "hello", "completion": "no"}, "hello", ""),
        (
            "causal_lm", TEMPLATE | {"prompt_template": "{prompt} ->", "prompt_field": "question"}, QUESTION, "hello world",
            "the prompt template '{prompt} ->'",
        ),
        ("causal_lm", TEMPLATE | {"prompt_template": "{question!s:>20}:"}, QUESTION, "hello world", "the prompt template"),
        ("causal_lm", TEMPLATE | {"prompt_template": "{context[text][0]}?"}, TWO, "the fox", "the prompt template"),
        (
            "causal_lm", TEMPLATE | {"prompt_template": "{question} in {context[text][0]}"}, TWO, json.dumps(TWO),
            "the prompt template '{question} in {context[text][0]}'",
        ),
        ("causal_lm", {"format": "chat"}, CHAT, "hello", "the chat template, with the prompt as a user message"),
        (
            "causal_lm", {"format": "chat"}, TURNS, json.dumps(TURNS["messages"][:-1]),
            "the chat template, with the prompt as a user message",
        ),
        ("causal_lm", {"format": "chat"}, {"messages": [{"role": "user", "content": "[1]"}, CHAT["messages"][1]]}, "[1]", "the chat"),
        ("causal_lm", {"format": "sharegpt"}, SHAREGPT, "hello", "the chat template, with the prompt as a user message"),
        ("causal_lm", {"format": "alpaca"}, ALPACA, "hello", "the chat template, with the prompt as a user message"),
        (
            "causal_lm", {"format": "alpaca"}, ALPACA | {"input": "3"}, '{"instruction": "hello", "input": "3"}',
            "the chat template, with the prompt as a user message",
        ),
        ("seq2seq", TEMPLATE | {"prompt_template": "say: {question}"}, QUESTION, "hello world", "the prompt template"),
    ],
)  # fmt: skip
def test_a_prompt_has_the_tokens_of_its_record(
    task: str, data: dict[str, str], record: dict[str, Any], prompt: str, described: str, tokenizer: Tokenizer,
    make_config: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    section = make_config(**data, max_length=64).data
    expected = make_task(TaskConfig(kind=task), section, tokenizer.directory).prompt(record, "the record")
    PromptFormat.of(task, section).save(tmp_path)
    found = read_prompt_format(tmp_path)
    assert found is not None
    assert found.encode(prompt, tokenizer, "--prompt") == list(expected.tokens)
    assert found.describe(tokenizer).startswith(described)
    assert bool(found.describe(tokenizer)) == bool(described)


def test_alpaca_without_a_chat_template_has_its_own_prompt_and_a_text_is_continued_as_it_is(
    make_directory: Callable[..., Path], make_config: Callable[..., Any]
) -> None:
    tokenizer = load_tokenizer(make_directory(tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"}))
    data = make_config(format="alpaca", max_length=512).data
    expected = make_task(TaskConfig(), data, tokenizer.directory).prompt(ALPACA, "the record").tokens
    alpaca = PromptFormat.of("causal_lm", data)
    assert alpaca.encode("hello", tokenizer, "--prompt") == expected
    assert alpaca.describe(tokenizer) == "Alpaca's prompt, with the prompt as the instruction"
    text = PromptFormat.of("causal_lm", make_config(format="text").data)
    assert text.encode("hello", tokenizer, "--prompt") == tokenizer.encode_prompt("hello")
    assert text.describe(tokenizer) == ""


def test_a_prompt_without_the_fields_of_the_template_is_refused(tokenizer: Tokenizer) -> None:
    two = PromptFormat("causal_lm", "completion", "{question} in {context}", "prompt")
    with pytest.raises(UserError) as caught:
        two.encode("hello", tokenizer, "--prompt")
    assert "--prompt='hello' lacks question, context, which the prompt template" in str(caught.value)
    assert """--prompt='{"question": "...", "context": "..."}', or --raw""" in str(caught.value)
    with pytest.raises(UserError, match=r'lacks context, .*\'\{"question": "a", "context": "\.\.\."\}\''):
        two.encode('{"question": "a"}', tokenizer, "--prompt")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    assert read_prompt_format(tmp_path) is None
    (tmp_path / "peftjax.json").write_text("{}")
    assert read_prompt_format(tmp_path) is None
    for prompt in (
        '["a"]',
        '{"task": "causal_lm"}',
        '{"task": 1, "format": "a", "template": "b", "prompt_field": "c"}',
    ):
        (tmp_path / "peftjax.json").write_text(f'{{"prompt": {prompt}}}')
        with pytest.raises(
            UserError, match=r"peftjax\.json: \"prompt\" must be an object with the texts task, format, "
        ):
            read_prompt_format(tmp_path)


def test_tools_and_mistakes_in_a_conversation_as_a_prompt(tokenizer: Tokenizer) -> None:
    (tokenizer.directory / "chat_template.jinja").write_text(
        "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    tokenizer, record = (
        load_tokenizer(tokenizer.directory),
        {"messages": CHAT["messages"][:1], "tools": [{"name": "date"}]},
    )
    ids = encode_chat_prompt(json.dumps(record), tokenizer, "--prompt")
    assert tokenizer.decode(ids) == '[{"name": "date"}]hello'
    chat = PromptFormat("causal_lm", "chat", "{prompt}", "prompt")
    assert chat.describe(tokenizer, [json.dumps(record)]) == "the chat template"
    assert chat.describe(tokenizer, [json.dumps(record), "hello"]).endswith("with the prompt as a user message")
    for wrong in ('[{"role": "user"}]', '{"messages": 3}'):
        with pytest.raises(UserError, match=r"^--prompt: "):
            encode_chat_prompt(wrong, tokenizer, "--prompt")
