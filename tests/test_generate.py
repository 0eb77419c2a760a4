"""The command generate with a file of prompts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import peftjax
from peftjax import decoding
from peftjax.io import load
from peftjax.tasks.prompt_format import PromptFormat
from tests import tiny
from tests.runs import in_process

PROMPTS = ["1+1=", "20+1=", "3", "4+", "5"]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a model with a chat template."""
    path = tiny.directory(tmp_path_factory.mktemp("generate") / "model")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_prompts_of_a_file_are_answered_in_batches(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = peftjax.load_tokenizer(model)
    expected = peftjax.generate(peftjax.load_model(model), tokenizer, PROMPTS, max_new_tokens=3)
    records = [{"prompt": prompt, "id": number} for number, prompt in enumerate(PROMPTS)]
    write(tmp_path / "prompts.jsonl", *records)
    (tmp_path / "prompts.txt").write_text("\n\r\n".join(PROMPTS))  # with blank lines

    def answers(*arguments: str) -> list[dict[str, Any]]:
        output = tmp_path / "answers.jsonl"
        output.unlink(missing_ok=True)
        assert not in_process("generate", f"--model={model}", "--max-new-tokens=3", f"--output={output}", *arguments)
        assert capsys.readouterr().out.startswith(f"{output}: ")
        return lines(output)

    found = [{**record, "generated_text": text} for record, text in zip(records, expected, strict=True)]
    assert answers(f"--prompts={tmp_path / 'prompts.jsonl'}", "--batch-size=2") == found
    for arguments in ([f"--prompts={tmp_path / 'prompts.txt'}"], [f"--prompt={prompt}" for prompt in PROMPTS]):
        texts = answers(*arguments)
        assert texts == [{"prompt": record["prompt"], "generated_text": record["generated_text"]} for record in found]
    assert not in_process(
        "generate",
        f"--model={model}",
        "--max-new-tokens=3",
        f"--prompts={tmp_path / 'prompts.jsonl'}",
        "--batch-size=2",
    )
    said = capsys.readouterr().out
    assert "".join(f"\n> {prompt}\n{text}\n" for prompt, text in zip(PROMPTS, expected, strict=True)) in said


def test_answers_are_kept_when_the_command_is_interrupted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def answer(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
        calls.append(prompts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return prompts

    monkeypatch.setattr(decoding, "generate_ids", answer)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    output = tmp_path / "answers.jsonl"
    arguments = [f"--model={model}", f"--prompts={tmp_path / 'prompts.txt'}", f"--output={output}", "--batch-size=2"]
    arguments.append("--max-new-tokens=8")
    assert in_process("generate", *arguments) == 130
    assert lines(output) == [{"prompt": prompt, "generated_text": prompt} for prompt in PROMPTS[:4]]
    capsys.readouterr()
    assert in_process("generate", *arguments) == 2
    assert f"--output={output} exists and would be replaced; delete it" in capsys.readouterr().err
    assert len(lines(output)) == 4


def test_a_record_has_the_fields_of_the_template_or_messages(model: Path, tmp_path: Path) -> None:
    tokenizer = peftjax.load_tokenizer(model)

    def tokens(prompts: PromptFormat, record: dict[str, Any]) -> str:
        return tokenizer.decode(prompts.encode_record(record, tokenizer, "a:1"))

    two = PromptFormat("causal_lm", "completion", "{question} in {context}", "prompt")
    assert tokens(two, {"question": "a", "context": "b", "messages": []}) == "a in b"
    assert tokens(two, {"prompt": '{"question": "a", "context": "b"}'}) == "a in b"
    with pytest.raises(peftjax.UserError, match=r"^a:1: the record has no field 'context'"):
        tokens(two, {"question": "a"})
    one = PromptFormat("causal_lm", "completion", "Q {prompt}", "question")
    assert tokens(one, {"question": "a", "prompt": "b"}) == "Q a"
    assert tokens(one, {"prompt": "b"}) == "Q b"
    turns = [{"role": "user", "content": "a"}]
    chat = PromptFormat("causal_lm", "chat", "{prompt}", "prompt")
    for record in ({"messages": turns}, {"prompt": turns}, {"prompt": "a"}):
        assert tokens(chat, record) == "user: a"
    alpaca = PromptFormat("causal_lm", "alpaca", "{prompt}", "prompt")
    assert tokens(alpaca, {"instruction": "a", "input": "b", "output": "c"}) == "user: a\n\nb"
    for prompts in (one, alpaca):
        with pytest.raises(peftjax.UserError, match=r"^a:1: the model was not trained on messages; give the text"):
            tokens(prompts, {"messages": turns})


@pytest.mark.parametrize(
    ("prompts", "record", "text", "said"),
    [
        (
            PromptFormat("causal_lm", "completion", "{a}+{b}=", "prompt"), {"a": "1", "b": "2", "id": 7}, "1+2=",
            "the prompt template '{a}+{b}='",
        ),
        (
            PromptFormat("causal_lm", "chat", "{prompt}", "prompt"), {"messages": [{"role": "user", "content": "é"}]},
            "user: é<eos>", "the chat template, as in",
        ),
    ],
)  # fmt: skip
def test_records_get_the_format_of_the_training(
    prompts: PromptFormat, record: dict[str, Any], text: str, said: str, model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trained = shutil.copytree(model, tmp_path / "trained")
    prompts.save(trained)
    monkeypatch.setattr(decoding, "generate_ids", lambda model, prompts, **_: prompts)
    file, output = write(tmp_path / "prompts.jsonl", record, record), tmp_path / "answers.jsonl"
    arguments = [
        f"--model={trained}",
        f"--prompts={file}",
        f"--output={output}",
        "--batch-size=1",
        "--max-new-tokens=8",
    ]
    assert not in_process("generate", *arguments)
    assert f"applying {said}" in capsys.readouterr().out
    assert lines(output) == [{**record, "generated_text": text.replace("<eos>", "")}] * 2


def test_mistakes_in_a_file_are_reported_before_weights_are_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(message: str, *arguments: str) -> None:
        assert in_process("generate", f"--model={model}", *arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line

    turns = {"messages": [{"role": "user", "content": "a"}]}
    long = write(tmp_path / "long.jsonl", {"prompt": "a"}, {"prompt": "a" * 60})
    refused(
        "long.jsonl:2: a prompt of 60 tokens and 64 new tokens exceed the model's 64 positions", f"--prompts={long}"
    )
    monkeypatch.setattr(load, "read_tensors", lambda *_, **__: pytest.fail("weights are read"))
    chat = write(tmp_path / "chat.jsonl", {"prompt": "a"}, turns)
    refused("chat.jsonl:2: messages are rendered with the chat template; add --chat", f"--prompts={chat}")
    refused("rendered with the chat template; give --chat instead of --raw", f"--prompts={chat}", "--raw")
    other = write(tmp_path / "other.jsonl", {"text": "a"})
    refused('other.jsonl:1: a prompt needs the field "prompt" with a text, or "messages"', f"--prompts={other}")
    refused("its fields: text", f"--prompts={other}", "--chat")
    empty = write(tmp_path / "empty.jsonl", {"prompt": ""})
    refused("empty.jsonl:1: the prompt is empty", f"--prompts={empty}")
    (tmp_path / "bad.txt").write_bytes(b"a\n\xff\n")
    refused("bad.txt:2: not valid UTF-8", f"--prompts={tmp_path / 'bad.txt'}")
    (tmp_path / "blank.txt").write_text("\n")
    refused("blank.txt: the file has no prompts", f"--prompts={tmp_path / 'blank.txt'}")
    refused("chta.jsonl': no such file. Did you mean", f"--prompts={tmp_path / 'chta.jsonl'}")
    refused("the name must end in .jsonl, .jsonl.gz, .jsonl.zst or .txt", f"--prompts={tmp_path / 'prompts.md'}")
    refused("--batch-size=0 must be at least 1", f"--prompts={chat}", "--batch-size=0")
