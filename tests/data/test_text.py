import base64
import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from peftjax.core.errors import UserError
from peftjax.data.records import Example, encode_prompt, encode_record
from peftjax.data.tokenizer import Tokenizer, load_tokenizer
from peftjax.io.hf_files import EMBEDDED

CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "yes no"},
    {"role": "user", "content": "the date"},
    {"role": "assistant", "content": "17 March"},
]


def learned(tokenizer: Tokenizer, example: Example) -> str:
    """What carries a loss, special tokens written out."""
    ids = [int(i) for i, loss in zip(example.tokens, example.loss_mask, strict=True) if loss]
    return tokenizer._tokenizer.decode(ids, skip_special_tokens=False)


def written(tokenizer: Tokenizer, ids: Any) -> str:
    return tokenizer._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


RANKS = [*(bytes([i]) for i in range(256)), b"he", b"hel"]  # of a byte-level vocabulary

# --- the tokenizer


def test_special_tokens_are_read_and_decode_leaves_them_out(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)
    assert tokenizer.eos_ids == (2, 6)  # and <|end|>, with which the chat template ends an answer
    assert (tokenizer.stop_ids(chat=True), tokenizer.stop_ids(chat=False)) == ((2, 6), (2,))
    ids = tokenizer.encode("hello world")
    assert ids[0] == 1
    assert tokenizer.decode([*ids, 2, 3, 3]) == "hello world"


def test_a_beginning_is_added_once_and_an_end_too(tokenizer: Tokenizer) -> None:
    bare = tokenizer.encode("hello", bos=False, eos=False)
    assert tokenizer.encode("hello") == [1, *bare]
    assert tokenizer.encode("hello", bos=True, eos=True) == [1, *bare, 2]
    assert tokenizer.encode("<s>hello</s>", bos=True, eos=True) == [1, *bare, 2]
    assert tokenizer.encode("<s>hello") == [1, 1, *bare]  # as transformers has it
    assert tokenizer.encode("", bos=True, eos=True) == [1, 2]


def test_add_bos_token_counts_where_the_post_processor_adds_none(make_directory: Callable[..., Path]) -> None:
    def without_post_processor(data: dict[str, Any]) -> None:
        data["post_processor"] = None

    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True}
    tokenizer = load_tokenizer(make_directory(without_post_processor, tokenizer_config=config))
    bare = tokenizer.encode("hello", bos=False, eos=False)
    assert tokenizer.encode("hello") == [1, *bare, 2] == tokenizer.encode("hello", bos=True, eos=True)
    assert tokenizer.encode_prompt("hello") == [1, *bare]  # generation continues it


def test_a_prompt_for_an_encoder_decoder_ends_as_any_text(make_directory: Callable[..., Path]) -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>", "add_eos_token": True}
    directory = make_directory(tokenizer_config=special, config={"is_encoder_decoder": True})
    ids = load_tokenizer(directory).encode_prompt("hello")
    assert ids == load_tokenizer(directory).encode("hello")
    assert ids[-1] == 2


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken", "tekken"])
def test_tokenizers_without_tokenizer_json_are_converted(kind: str, assets: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = {"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": kind != "tiktoken"}
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if kind == "sentencepiece":
        shutil.copy(assets / "babyllama105" / "tokenizer.model", tmp_path)
        expected = load_tokenizer(assets / "babyllama105").encode("hello é", bos=True, eos=False)
    elif kind == "tiktoken":
        lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(RANKS)]
        (tmp_path / "tokenizer.model").write_text("\n".join(lines))
        config["added_tokens_decoder"] = {
            str(258 + i): {"content": token, "special": True} for i, token in enumerate(("<s>", "</s>"))
        }
        expected = [257, ord("l"), ord("o"), ord(" "), 0xC3, 0xA9]  # as in most tiktoken directories, no bos
    else:
        special = [
            {"rank": i, "token_str": token, "is_control": True} for i, token in enumerate(("<unk>", "<s>", "</s>"))
        ]
        vocab = [{"rank": i, "token_bytes": base64.b64encode(token).decode()} for i, token in enumerate(RANKS)]
        size = {"num_vocab_tokens": 258, "default_vocab_size": 261, "default_num_special_tokens": 3}
        tekken = {
            "config": {"pattern": r"\p{L}+|\s", "version": "v7"} | size,
            "vocab": vocab,
            "special_tokens": special,
        }
        (tmp_path / "tekken.json").write_text(json.dumps(tekken))
        (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
        expected = [1, 260, ord("l") + 3, ord("o") + 3, ord(" ") + 3, 0xC3 + 3, 0xA9 + 3]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("hello é", bos=True, eos=False) == expected
    assert tokenizer.decode(expected) == "hello é"
    assert tokenizer.eos_id == tokenizer.token_id("</s>")


@pytest.mark.parametrize("file", ["tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens"])
def test_added_tokens_are_read_from_each_of_four_files(file: str, make_directory: Callable[..., Path]) -> None:
    files: dict[str, Any] = {
        "tokenizer_config": {
            "eos_token": "</s>",
            "added_tokens_decoder": {"327": {"content": "<new>", "special": True}},
        },
        "special_tokens_map": {"additional_special_tokens": ["<new>"]},
        "added_tokens": {"<new>": 327},
    }

    def add(data: dict[str, Any]) -> None:
        if file == "tokenizer":
            data["added_tokens"].append(data["added_tokens"][0] | {"id": 327, "content": "<new>"})

    tokenizer = load_tokenizer(make_directory(add, **{name: files[name] for name in {file} & files.keys()}))
    assert tokenizer.token_id("<new>") == 327
    assert tokenizer.encode("a<new>b", bos=False).count(327) == 1


def test_a_tokenizer_that_begins_a_text_with_nothing_is_left_so(make_directory: Callable[..., Path]) -> None:
    def without_post_processor(data: dict[str, Any]) -> None:
        data["post_processor"] = None

    tokenizer = load_tokenizer(make_directory(without_post_processor))
    assert tokenizer.encode("hello", bos=True) == tokenizer.encode("hello", bos=False)


def test_a_missing_pad_token_becomes_the_end_token_and_never_0(make_directory: Callable[..., Path]) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<not in the vocabulary>"}
    folder = make_directory(tokenizer_config=config, config={"vocab_size": 327})
    assert load_tokenizer(folder).pad_id == 2  # transformers adds the token as 327, for which the model has no row


def test_without_pad_and_end_token_both_are_errors_that_say_what_to_do(make_directory: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(make_directory(tokenizer_config={"bos_token": "<s>"}, config={"pad_token_id": -1}))
    with pytest.raises(ValueError, match=r"neither a pad nor an eos token, .*tokenizer_config\.json"):
        tokenizer.pad_id  # noqa: B018
    with pytest.raises(ValueError, match="no eos token"):
        tokenizer.encode("hello", eos=True)


def test_the_models_own_configs_stand_in_for_the_tokenizers(make_directory: Callable[..., Path]) -> None:
    files = {
        "generation_config": {"eos_token_id": [6, "3", 2], "bos_token_id": "3"},
        "config": {"bos_token_id": 1, "pad_token_id": 3},
    }
    tokenizer = load_tokenizer(make_directory(tokenizer_config={}, **files))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.eos_ids) == (1, 6, 3, (2, 6))
    assert tokenizer.stop_ids(chat=False) == (6, 2)


def test_the_older_special_tokens_map_counts_as_in_transformers(make_directory: Callable[..., Path]) -> None:
    files = {
        "tokenizer_config": {"eos_token": "<|end|>"},
        "special_tokens_map": {"bos_token": "<s>", "eos_token": "</s>"},
    }
    tokenizer = load_tokenizer(make_directory(**files))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_named_tokens_are_special_even_where_tokenizer_json_forgot_it(make_directory: Callable[..., Path]) -> None:
    def forget(data: dict[str, Any]) -> None:
        for token in data["added_tokens"]:
            token["special"] = False

    tokenizer = load_tokenizer(make_directory(forget))
    assert tokenizer.decode([1, *tokenizer.encode("hello", bos=False), 2]) == "hello"


def test_stored_padding_and_truncation_are_switched_off(make_directory: Callable[..., Path]) -> None:
    def limit(data: dict[str, Any]) -> None:
        data["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
        data["padding"] = {
            "strategy": {"Fixed": 3}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 3, "pad_type_id": 0,
            "pad_token": "<pad>",
        }  # fmt: skip

    tokenizer = load_tokenizer(make_directory(limit))
    assert tokenizer.decode(tokenizer.encode("the quick brown fox jumps")) == "the quick brown fox jumps"
    assert 3 not in tokenizer.encode("x")


def test_a_directory_without_a_tokenizer_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"has no tokenizer: none of .*tokenizer\.json.*Write one with transformers"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"^the tokenizer in .* cannot be loaded by transformers: [^\n]*$"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": {"content": 5}}')
    with pytest.raises(UserError, match=r"^the tokenizer in .* cannot be loaded by transformers: [^\n]*$"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("auto_map", [["mine.Slow", None], {"AutoTokenizer": [None, "mine.Fast"]}, None])
def test_tokenizer_json_is_read_without_the_tokenizers_own_code(
    auto_map: Any, make_directory: Callable[..., Path]
) -> None:
    expected = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "tokenizer_class": "Mine"}
    folder = make_directory(tokenizer_config=expected | ({"auto_map": auto_map} if auto_map else {}))
    (folder / "mine.py").write_text("raise SystemExit")
    with (
        pytest.warns(UserWarning, match="contains its own Python code")
        if auto_map
        else contextlib.nullcontext() as warned
    ):
        tokenizer = load_tokenizer(folder)
    assert not auto_map or len(warned) == 1
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"x": 0, "y": 3}, unk_token="[UNK]"),
        models.WordPiece({"x": 0, "y": 3}, unk_token="[UNK]"),
        models.Unigram([("x", -1.0), ("y", -2.0)]),
        models.BPE({"x": 0, "y": 1}, [], unk_token="[UNK]"),
    ],
)
def test_a_vocabulary_without_its_unknown_token_is_an_error_only_for_text_that_needs_it(
    model: models.Model, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("x") == tokenizer.cut(4)("x")[0].ids == [0]
    for encode in (tokenizer.encode, tokenizer.cut(4)):
        with pytest.raises(UserError, match=r"cannot encode 'zebra': .*set unk_token in tokenizer\.json"):
            encode("zebra")
        with pytest.raises(UserError, match=r"^cannot encode 'x\\udce9': it is not valid Unicode$"):
            encode("x\udce9")


def test_a_length_without_room_for_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    theirs = tokenizers.Tokenizer(models.WordLevel({"x": 0, "#": 1}, unk_token="#"))
    theirs.pre_tokenizer = pre_tokenizers.Whitespace()
    theirs.post_processor = processors.TemplateProcessing(
        single="# $A #", pair="# $A # $B #", special_tokens=[("#", 1)]
    )
    theirs.save(str(tmp_path / "tokenizer.json"))
    cut = load_tokenizer(tmp_path).cut(3)
    assert cut("x x x")[0].ids == [1, 0, 1]
    assert cut("", "")[0].ids == [1, 1, 1]
    with pytest.raises(
        UserError, match=r"max_length=3 leaves no room for text: .* adds 3 special tokens; use at least 4"
    ):
        cut("x", "x")


def test_the_tokenizer_of_the_bundled_model_is_loaded_by_its_name() -> None:
    assert load_tokenizer("embedded").directory == EMBEDDED


def test_of_a_hub_model_the_weights_are_not_downloaded(
    make_directory: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(make_directory(config={}))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_tokenizer("owner/model", "v2").token_id("<s>") == 1
    assert (asked["name"], asked["revision"]) == ("owner/model", "v2")
    assert "tokenizer.json" in asked["allow_patterns"]
    assert not [pattern for pattern in asked["allow_patterns"] if pattern.endswith("safetensors")]


def test_a_directory_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"modle: no such directory\. Did you mean 'model'\?"):
        load_tokenizer(str(tmp_path / "modle"))


def test_an_unknown_token_is_an_error_that_names_near_ones(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_id("<|end|>") == 6
    with pytest.raises(ValueError, match=r"no token '<\|ende\|>'\. Did you mean '<\|end\|>'"):
        tokenizer.token_id("<|ende|>")


# --- chat templates


def test_a_chat_template_is_found_in_each_of_its_places(make_directory: Callable[..., Path]) -> None:
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "of the list"}]
    folder = make_directory(tokenizer_config={}, chat_template={"chat_template": "of the json file"})
    assert load_tokenizer(folder).chat(CHAT) == "of the json file"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(folder).chat(CHAT) == "of the list"
    (folder / "chat_template.jinja").write_text("of the jinja file")
    assert load_tokenizer(folder).chat(CHAT) == "of the jinja file"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            "{% for m in messages %}\n  {% if loop.index > 1 %}\n{% break %}\n{% endif %}\n{{ m.content }}{% endfor %}",
            "hello",
        ),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "hello"),
        ('{{ {"a": "<é>"} | tojson }}', '{"a": "<é>"}'),
        ("{{ strftime_now('%%') }}{{ bos_token }}", "%<s>"),
        ("{{ add_generation_prompt }} {{ tools is none }}", "False True"),
    ],
)
def test_templates_are_rendered_as_transformers_does(
    template: str, text: str, make_directory: Callable[..., Path]
) -> None:
    config = {"bos_token": "<s>", "chat_template": template}
    assert load_tokenizer(make_directory(tokenizer_config=config)).chat(CHAT) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "rejects the conversation: roles must alternate"),
        ("{{ messages.append(1) }}", "rejects the conversation: .*'append' .* unsafe"),
        ("{{ messages.__class__.__mro__ }}", "rejects the conversation"),
        ("{% if %}", "rejects the conversation"),
        ([{"name": "rag", "template": "no"}], 'has the chat templates rag, but none named "default"'),
        (None, r"has no chat template.*chat_template\.jinja"),
    ],
)
def test_a_template_that_refuses_or_is_missing_is_an_error(
    template: Any, message: str, make_directory: Callable[..., Path]
) -> None:
    tokenizer = load_tokenizer(make_directory(tokenizer_config={"chat_template": template}))
    with pytest.raises(ValueError, match=message):
        tokenizer.chat(CHAT)


# --- records


def test_a_text_carries_a_loss_everywhere_and_ends(tokenizer: Tokenizer, make_config: Callable[..., Any]) -> None:
    example = encode_record({"text": "hello world"}, make_config().data, tokenizer, name="a:1")
    assert written(tokenizer, example.tokens) == "<s>hello world</s>"
    assert example.loss_mask.all()


def test_an_empty_text_carries_no_loss(tokenizer: Tokenizer, make_config: Callable[..., Any]) -> None:
    assert not encode_record({"text": ""}, make_config().data, tokenizer, name="a:1").loss_mask.any()


def test_numbers_are_read_as_their_text(tokenizer: Tokenizer, make_config: Callable[..., Any]) -> None:
    row = {"text": 17, "instruction": 2.5, "input": 0, "output": -3}
    text = {key: str(value) for key, value in row.items()}
    for format_ in ("text", "alpaca"):
        one, other = (encode_record(r, make_config(format=format_).data, tokenizer, name="a:1") for r in (row, text))
        assert one.tokens.tolist() == other.tokens.tolist()


def test_of_a_completion_record_the_completion_and_the_end_carry_a_loss(
    tokenizer: Tokenizer, make_config: Callable[..., Any]
) -> None:
    data = make_config(
        format="completion", prompt_field="q", prompt_template="{prompt} ({n}):", completion_field="a"
    ).data
    record = {"q": "the date", "n": 3, "a": " 17 March"}
    example = encode_record(record, data, tokenizer, name="a:1")
    assert written(tokenizer, example.tokens) == "<s>the date (3): 17 March</s>"
    assert learned(tokenizer, example) == " 17 March</s>"
    prompt = encode_prompt(record, data, tokenizer, name="a:1")
    assert prompt.tokens == example.tokens[: len(prompt.tokens)].tolist()
    assert (prompt.prompt, prompt.expected, prompt.record) == ("the date (3):", " 17 March", "a:1")


def test_no_token_merges_across_the_boundary_of_prompt_and_completion(
    tokenizer: Tokenizer, make_config: Callable[..., Any]
) -> None:
    data = make_config(format="completion").data
    whole, prompt = tokenizer.encode("hello"), tokenizer.encode("hel")
    assert whole[: len(prompt)] != prompt, "the test needs a text that merges"
    example = encode_record({"prompt": "hel", "completion": "lo"}, data, tokenizer, name="a:1")
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert learned(tokenizer, example) == "lo</s>"


def test_a_continuation_gets_no_space_of_its_own(assets: Path, make_config: Callable[..., Any]) -> None:
    """SentencePiece tokenizers put a space before a text; between a prompt and its completion there is none."""
    tokenizer = load_tokenizer(assets / "tinystories656k")
    data = make_config(format="completion").data
    for prompt, completion in (("Once upon a ", "time"), ("Once upon a", " time"), ("Once upon a ti", "me")):
        record = {"prompt": prompt, "completion": completion}
        tokens = encode_record(record, data, tokenizer, name="a:1").tokens
        assert tokenizer.decode(tokens) == "Once upon a time"
        start = encode_prompt(record, data, tokenizer, name="a:1").tokens
        assert tokens[: len(start)].tolist() == start


def test_every_assistant_turn_carries_a_loss_with_its_end_and_nothing_else(
    tokenizer: Tokenizer, make_config: Callable[..., Any]
) -> None:
    example = encode_record({"messages": CHAT}, make_config(format="chat").data, tokenizer, name="a:1")
    assert written(tokenizer, example.tokens) == tokenizer.chat(CHAT)
    assert learned(tokenizer, example) == "yes no<|end|>17 March<|end|>"


def test_messages_stored_as_columns_are_read_too(tokenizer: Tokenizer, make_config: Callable[..., Any]) -> None:
    data = make_config(format="chat").data
    columns = {key: [message[key] for message in CHAT] for key in ("role", "content")}
    one, other = (encode_record({"messages": m}, data, tokenizer, name="a:1") for m in (CHAT, columns))
    assert one.tokens.tolist() == other.tokens.tolist()


def test_the_prompt_of_a_conversation_is_all_before_its_last_answer(
    tokenizer: Tokenizer, make_config: Callable[..., Any]
) -> None:
    data = make_config(format="chat").data
    prompt = encode_prompt({"messages": CHAT}, data, tokenizer, name="a:1")
    assert written(tokenizer, prompt.tokens) == tokenizer.chat(CHAT[:3], add_generation_prompt=True)
    assert prompt.expected == "17 March"
    assert (
        tokenizer.encode_prompt("hello", chat=True)
        == encode_prompt({"messages": CHAT[:2]}, data, tokenizer, name="a:1").tokens
    )
    with pytest.raises(ValueError, match="a:1: the conversation has no assistant turn"):
        encode_prompt({"messages": CHAT[:1]}, data, tokenizer, name="a:1")


def test_the_prompt_of_a_text_is_its_first_half(tokenizer: Tokenizer, make_config: Callable[..., Any]) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    prompt = encode_prompt({"text": text}, make_config().data, tokenizer, name="a:1")
    assert prompt.prompt + prompt.expected == text
    assert prompt.prompt
    assert prompt.expected


def test_a_template_reaches_into_lists_and_dicts(tokenizer: Tokenizer, make_config: Callable[..., Any]) -> None:
    fields = {
        "prompt_template": "{q} {meta.lang} {a.b}",
        "completion_template": "{answers[text][0]}{answers[at][-1]:03d}",
    }
    data = make_config(format="completion", **fields).data
    record = {"q": "x", "meta": {"lang": "de"}, "a.b": "dot", "answers": {"text": ["yes", "no"], "at": [1, 2]}}
    example = encode_record(record, data, tokenizer, name="a:1")
    assert written(tokenizer, example.tokens) == "<s>x de dotyes002</s>"


COMPLETION = {"format": "completion"}


@pytest.mark.parametrize(
    ("fields", "record", "message"),
    [
        (
            {},
            {"txt": "x", "id": 1},
            r"a:7: .*'text' \(set by data\.text_field\)\. Did .*'txt'\? Its fields: txt, id",
        ),
        ({}, {}, "Its fields: none"),
        ({}, {"text": None}, "a:7: field 'text' must hold text or a number, not NoneType"),
        ({}, {"text": float("nan")}, "a:7: field 'text' must hold text or a number, not NaN"),
        (
            COMPLETION,
            {"prompt": "x", "completion": float("nan")},
            "a:7: field 'completion' must hold .*, not NaN, which",
        ),
        (COMPLETION, {"prompt": "x", "completions": "y"}, "no field 'completion' .*completion_field.*Did you mean"),
        (COMPLETION, {"prompt": ["x"], "completion": "y"}, "'prompt' must hold text or a number, not list"),
        ({**COMPLETION, "prompt_template": "{meaning}"}, {"meanings": "x"}, "'meaning' .*prompt_template.*'meanings'"),
        ({**COMPLETION, "prompt_template": "{prompt"}, {"prompt": "x"}, r"template '\{prompt': .* for a literal brace"),
        ({**COMPLETION, "prompt_template": "{prompt:d}"}, {"prompt": "x"}, r"a:7: template '\{prompt:d\}'"),
        ({**COMPLETION, "prompt_template": "{a:{b}}"}, {"a": 1}, "a:7: the record has no field 'b'"),
        ({**COMPLETION, "prompt_template": "{}"}, {"a": 1}, r"template '\{\}': \{0\} does not name a field"),
        (
            {**COMPLETION, "prompt_template": "{a[1]}"},
            {"a": ["x"]},
            r"a:7: template .*: \{a\[1\]\} has no entry '1'; .* a list of 1",
        ),
        ({**COMPLETION, "prompt_template": "{a.c}"}, {"a": {"b": "x"}}, r"\{a\.c\} has no entry 'c'; found b"),
        ({"format": "chat"}, {"messages": "x"}, "a:7: the field 'messages' must hold a list of messages"),
        ({"format": "chat"}, {"messages": {"role": "user", "content": "x"}}, "must hold a list of messages"),
        ({"format": "chat"}, {"messages": {"role": 1, "content": 2}}, "must hold a list of messages"),
        (
            {"format": "sharegpt"},
            {"conversations": [{"from": [], "value": "x"}]},
            r'\[\] in "from" is not a ShareGPT role',
        ),
        ({"format": "chat"}, {"messages": [{"from": "human"}]}, "must hold a list of messages .*'from'"),
    ],
)
def test_a_record_that_does_not_fit_is_an_error_that_names_it(
    fields: dict[str, str], record: dict[str, Any], message: str, tokenizer: Tokenizer, make_config: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        encode_record(record, make_config(**fields).data, tokenizer, name="a:7")
