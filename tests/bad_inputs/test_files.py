"""Model and adapter directories with files of the wrong type: one line with the file and the field, and exit code 2."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from flax import nnx

import peftjax
from peftjax.core import time_limit
from peftjax.core.errors import UserError
from peftjax.io import load, safetensors_files
from tests import runs, tiny

DEEP = "[" * 100_000
CONFIG, TOKENIZER, GENERATION, ADAPTER = (
    "config.json", "tokenizer_config.json", "generation_config.json", "adapter_config.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.directory(tmp_path_factory.mktemp("files") / "model")


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    loaded = peftjax.attach(peftjax.load_model(model), peftjax.Lora(rank=2), rngs=nnx.Rngs(0))
    return peftjax.save_adapter(loaded, model.parent / "adapter")


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """No weights are read, except in tests that load an adapter; what never ends is stopped after a second, or 128 MiB."""
    monkeypatch.setattr(time_limit, "SECONDS", 1.0)
    monkeypatch.setattr(time_limit, "MEMORY", 2**27)

    def load_model(*arguments: Any, **options: Any) -> None:
        raise AssertionError("weights are read")

    if "adapter" not in request.fixturenames:
        monkeypatch.setattr(load, "load_model", load_model)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of `generate`."""
    capsys.readouterr()
    assert runs.in_process("generate", "--prompt=a", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# file, value of each field, words of the message
FIELDS: list[tuple[str, dict[str, Any], str]] = [
    *[
        (CONFIG, {field: value}, f"{CONFIG}: {field} must be an integer of at least 1, not ")
        for field in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "head_dim",
        )
        for value in ("32", 32.5, -1, 0, True, [32], {"a": 1})
    ],
    *[
        (CONFIG, {field: value}, f"{CONFIG}: {field} must be a finite number, not ")
        for field in ("rms_norm_eps", "rope_theta", "initializer_range", "attention_dropout")
        for value in ("1e-6", [1e-6], True, float("nan"), float("inf"))
    ],
    *[
        (CONFIG, {field: value}, f"{CONFIG}: {field} must be true or false, not ")
        for field in ("tie_word_embeddings", "attention_bias", "mlp_bias")
        for value in ("false", 0, [], 1.5)
    ],
    *[
        (CONFIG, {field: value}, f"{CONFIG}: {field} must be an object, not ")
        for field in ("rope_scaling", "rope_parameters", "quantization_config", "id2label", "text_config")
        for value in ("linear", 3, [1])
    ],
    *[
        (CONFIG, {field: {"rope_type": "yarn"} | inner}, f"{field}: {name} must be {kind}, not ")
        for field in ("rope_scaling", "rope_parameters")
        for inner, name, kind in (
            ({"factor": "4"}, "factor", "a number above 0"),
            ({"rope_theta": 0}, "rope_theta", "a number above 0"),
            ({"mscale": True}, "mscale", "a finite number"),
            ({"original_max_position_embeddings": 0.5}, "original_max_position_embeddings", "an integer of at least 1"),
            ({"short_factor": [1.0, "2"]}, "short_factor", "a list of numbers above 0"),
            ({"rope_type": ["yarn"]}, "rope_type", "a string"),
            ({"full_attention": 1}, "full_attention", "an object"),
            ({"full_attention": {"factor": []}}, "full_attention: factor", "a number above 0"),
        )
    ],
    *[
        (CONFIG, {field: 0}, f"{CONFIG}: {field} must be an integer of at least 1, not 0")
        for field in ("decoder_sparse_step", "interleave_moe_layer_step", "no_rope_layer_interval", "num_experts")
    ],
    *[
        (CONFIG, {field: value}, f"{CONFIG}: {field} must be a list of integers, not ")
        for field in ("mlp_only_layers", "moe_layers", "no_rope_layers")
        for value in (1, "1", [1.5], ["1"])
    ],
    (CONFIG, {"model_type": 3}, "model_type must be a string, not 3 (int)"),
    (CONFIG, {"model_type": ["llama"]}, "model_type must be a string"),
    (CONFIG, {"hidden_act": 3}, "hidden_act must be a string"),
    (CONFIG, {"architectures": "LlamaForCausalLM"}, "architectures must be a list of strings"),
    (CONFIG, {"architectures": [3]}, "architectures must be a list of strings"),
    (CONFIG, {"quantization_config": {"load_in_4bit": "yes"}}, "quantization_config: load_in_4bit must be true or false"),
    (CONFIG, {"quantization_config": {"quant_method": 3}}, "quantization_config: quant_method must be a string"),
    (TOKENIZER, {"chat_template": 3}, f"{TOKENIZER}: chat_template must be a string, an object or a list"),
    (TOKENIZER, {"add_bos_token": "no"}, f"{TOKENIZER}: add_bos_token must be true or false"),
    (TOKENIZER, {"eos_token": 3}, f"{TOKENIZER}: eos_token must be a string or an object"),
    (TOKENIZER, {"tokenizer_class": []}, f"{TOKENIZER}: tokenizer_class must be a string"),
    (TOKENIZER, {"added_tokens_decoder": [1]}, f"{TOKENIZER}: added_tokens_decoder must be an object"),
]  # fmt: skip

# file, its text, words of the message
TEXTS = [
    *[
        (file, text, words)
        for file in (CONFIG, TOKENIZER, GENERATION)
        for text, words in (
            (DEEP, "nested too deeply"),
            ('{"a":' * 100_000, "nested too deeply"),
            ("", "is not valid JSON"),
            ("{", "is not valid JSON"),
            ("[]", "must hold a JSON object, not a list"),
            ("3", "must hold a JSON object, not a int"),
            ('{"a": "\\ud800"}', "lone surrogate"),
        )
    ],
    ("tokenizer.json", DEEP, "tokenizer"),
    ("tokenizer.json", "", "tokenizer"),
    ("tokenizer.json", "{}", "tokenizer"),
    ("tokenizer.json", '{"model": 3}', "tokenizer"),
    ("chat_template.jinja", "{% for %}", "the chat template of"),
    ("chat_template.jinja", "{{ 1 / 0 }}", "division by zero"),
    ("chat_template.jinja", "{{ messages[7].content.x }}", "the chat template of"),
    ("chat_template.jinja", "{{ raise_exception('no\nno') }}", "no no"),
    (
        "chat_template.jinja",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "does not end; look for a loop in it (stopped after 1 s)",
    ),
    (
        "chat_template.jinja",
        "{{ 'x' * 10**10 }}",
        "repeats or pads a text or list to 1e+10 characters or elements; the limit is",
    ),
    ("chat_template.jinja", "{{ (7 * ('%9999999999d' % 1)) ~ 2 }}", "to 7e+10 characters"),
    ("chat_template.jinja", "{{ messages[0].content | center(10**9) }}", "to 1e+09 characters"),
    ("chat_template.jinja", "{{ messages[0].content | center(width=10**9) }}", "to 1e+09 characters"),
    ("chat_template.jinja", "{{ '{:>9999999999}'.format(1) }}", "to 1e+10 characters"),
    ("chat_template.jinja", "{{ 10 ** (10 ** 10) }}", "to inf characters"),
    (
        "chat_template.jinja",
        "{% set n = 4 * 10**6 %}{{ messages[0].role * n }}",
        "characters to 16,000,000; the limit is 10,000,000",
    ),
    (
        "chat_template.jinja",
        "{% set x = namespace(y='x') %}{% for n in range(60) %}{% set x.y = x.y ~ x.y %}{% endfor %}",
        "does not end; look for a loop in it (stopped after it took",
    ),
]


def test_a_field_of_the_wrong_type_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(model, tmp_path / "bad")
    for file, fields, words in FIELDS:
        path = tmp_path / "bad" / file
        before = path.read_text() if path.exists() else "{}"
        path.write_text(json.dumps(json.loads(before) | fields))
        line = error_of(capsys, f"--model={tmp_path / 'bad'}")
        assert words in line, (fields, line)
        assert str(path) in line, (fields, line)
        path.write_text(before)


@pytest.mark.parametrize(("file", "text", "words"), TEXTS)
def test_a_file_that_cannot_be_read_is_refused(
    file: str, text: str, words: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "bad")
    (tmp_path / "bad" / file).write_text(text)
    line = error_of(capsys, f"--model={tmp_path / 'bad'}", *(["--chat"] if file.endswith("jinja") else []))
    assert words in line, line
    assert str(tmp_path / "bad") in line, line


@pytest.mark.parametrize("file", [CONFIG, TOKENIZER, GENERATION, "tokenizer.json", "model.safetensors"])
def test_a_pipe_or_a_link_to_nothing_is_refused(
    file: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "bad")
    path = tmp_path / "bad" / file
    for make, words in (
        (lambda: os.mkfifo(path), "is a pipe, a socket or a device"),
        (lambda: path.symlink_to(path), "cannot be read"),
        (lambda: path.symlink_to("nowhere"), "is a link to nowhere, which does not exist"),
    ):
        path.unlink(missing_ok=True)
        make()
        line = error_of(capsys, f"--model={tmp_path / 'bad'}")
        assert f"{path} {words}" in line, line


def test_names_close_to_the_bundled_model_are_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("embeded", "embeddd", "embedd", "Embedded"):
        assert f"{name}: no such directory. Did you mean 'embedded'?" in error_of(capsys, f"--model={name}")


def test_a_weights_index_with_a_path_is_refused(tmp_path: Path) -> None:
    for file in ("/etc/passwd", "../model.safetensors", "a/b.safetensors"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(UserError, match=f"outside of its directory: {file}"):
            safetensors_files.read_tensors(tmp_path)


ADAPTERS: list[tuple[dict[str, Any], str]] = [
    ({"r": "2"}, "r must be a finite number, not '2'"),
    ({"r": True}, "r must be a finite number"),
    ({"lora_alpha": "16"}, "lora_alpha must be a finite number"),
    ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number"),
    ({"lora_dropout": []}, "lora_dropout must be a finite number"),
    ({"target_modules": 3}, "target_modules must be a string or a list of strings"),
    ({"target_modules": [3]}, "target_modules must be a string or a list of strings"),
    ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of strings"),
    ({"rank_pattern": [1]}, "rank_pattern must be an object"),
    ({"peft_type": 3}, "peft_type must be a string"),
    ({"bias": True}, "bias must be a string"),
    ({"use_dora": "no"}, "use_dora must be true or false"),
    ({"layers_to_transform": "all"}, "layers_to_transform must be an integer or a list"),
    ({"init_lora_weights": 3}, "init_lora_weights must be true, false or a string"),
    ({"target_modules": "(q_proj"}, "is not a regular expression"),
    ({"target_modules": "(.*)*q"}, "takes too long; replace nested repetitions"),
    ({"rank_pattern": {"(.*)*!": 2}}, "takes too long; replace nested repetitions"),
]


@pytest.mark.parametrize(("fields", "words"), ADAPTERS)
def test_an_adapter_config_is_checked(
    fields: dict[str, Any], words: str, model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(adapter, tmp_path / "bad")
    path = tmp_path / "bad" / ADAPTER
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    line = error_of(capsys, f"--model={model}", f"--adapter={tmp_path / 'bad'}")
    assert words in line, line
    assert ADAPTER in line, line


def test_patterns_in_a_call_are_bounded(adapter: Path) -> None:
    base = tiny.model()
    for options, words in (
        ({"targets": "(.*)*q"}, r"method.targets: .*\(\.\*\)\*q. takes too long"),
        ({"targets": "(q"}, "method.targets: '.q' is not a regular expression"),
        ({"rank_pattern": {"(.*)*!": 2}}, "method.rank_pattern.* takes too long"),
    ):
        with pytest.raises(UserError, match=words):
            peftjax.attach(base, peftjax.Lora(rank=2, **options), rngs=nnx.Rngs(0))
    for feedforward, words in (("(.*)*q", "takes too long"), ("(q", "is not a regular expression")):
        with pytest.raises(UserError, match=f"method.feedforward: .*{words}"):
            peftjax.attach(base, peftjax.Ia3(targets=("q_proj",), feedforward=feedforward), rngs=nnx.Rngs(0))
