"""Token ids, decoded texts and chat templates beside transformers."""

import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from peftjax.core.config import defaults
from peftjax.data.records import encode_record
from peftjax.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.interop

CHECKPOINTS = ["babyllama105", "stories260k", "tinystories656k"]
TEXTS = [
    "", " ", "\n", "hello world", "  two spaces", " x", "x ", "trailing\n", "\tTab", "naïve café 日本 🙂",
    "<s>hello</s>", "a<|end_story|> b", "<unk> a<unk>", " <s> x </s> ", "Once upon a time.\n\nShe said: \"hi\"",
]  # fmt: skip
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hello there "},
    {"role": "assistant", "content": "Yes, <hello> é"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "No."},
]
TEMPLATES = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == "
    "'assistant' %}{% generation %}{{ message['content'] + '</s>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = "
    "'<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% else %}{% set loop_messages = messages %}{% set "
    "system = '' %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' "
    "%}{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}{% else "
    "%}{% generation %}{{ ' '  + message['content'].strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}",
    "spread out": "{{- bos_token }}\n{%- set ns = namespace(n=0) %}\n{%- for message in messages %}\n    "
    "{%- set ns.n = ns.n + 1 %}\n    {%- if message.role == 'assistant' %}\n        {{- 'A: ' }}\n        "
    "{%- generation %}{{- message.content | trim }}{{- eos_token }}{%- endgeneration %}\n    {%- else %}\n"
    "        {{- message | tojson }}\n    {%- endif %}\n    {%- if ns.n > 7 %}{%- break %}{%- endif %}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- 'A: ' }}\n{%- endif %}\n",
}


@pytest.fixture(scope="module")
def texts(assets: Path) -> list[str]:
    """Awkward texts and real ones."""
    found = list(TEXTS)
    for name in ("e2e_nlg", "tiny_shakespeare", "alpaca_subset"):
        with gzip.open(assets / "data" / name / "validation.jsonl.gz") as lines:
            found += [str(value) for line in list(lines)[:200] for value in json.loads(line).values()]
    return found


@pytest.mark.parametrize("checkpoint", [*CHECKPOINTS, "minilm_l6_fp16", "smollm2_135m"])
def test_ids_and_texts_equal_those_of_transformers(checkpoint: str, assets: Path, texts: list[str]) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(assets / checkpoint, model_max_length=10**9)
    ours = load_tokenizer(assets / checkpoint)
    for text in texts:
        for special in (True, False):
            flag = None if special else False
            ids = theirs(text, add_special_tokens=special, truncation=False, padding=False)["input_ids"]
            assert ours.encode(text, bos=flag, eos=flag) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("length", [8, 12, 60])
def test_pairs_are_cut_and_typed_as_transformers_does_it(length: int, assets: Path) -> None:
    pairs = [
        ("a", "b"),
        ("one two three four five six seven", "eight"),
        ("nine", "ten eleven twelve " * 9),
        ("x " * 70, "y " * 9),
    ]
    theirs = transformers.AutoTokenizer.from_pretrained(assets / "minilm_l6_fp16")
    cut = load_tokenizer(assets / "minilm_l6_fp16").cut(length)
    for pair in [*pairs, ("alone " * 9,)]:
        encoding, whole = cut(*pair)
        expected = theirs(*pair, truncation=True, max_length=length)
        assert encoding.ids == expected["input_ids"]
        assert encoding.type_ids == expected["token_type_ids"]
        assert whole == len(theirs(*pair)["input_ids"])


def test_the_tokens_of_words_are_those_of_transformers(assets: Path, tmp_path: Path) -> None:
    words = ["Alice", "lives", "in", "Wonderland-upon-Avon", ",", "naïve", "😀"]
    for directory in (assets / "minilm_l6_fp16", _byte_level(tmp_path)):
        options = {} if directory.name == "minilm_l6_fp16" else {"add_prefix_space": True}
        theirs = transformers.AutoTokenizer.from_pretrained(directory, **options)
        for length in (6, 64):
            encoding, _ = load_tokenizer(directory).cut(length, words=True)(words)
            expected = theirs(words, is_split_into_words=True, truncation=True, max_length=length)
            assert encoding.ids == expected["input_ids"]
            assert encoding.word_ids == expected.word_ids()


def _byte_level(folder: Path) -> Path:
    """A RoBERTa tokenizer of single bytes, with the space before a word as a token of its own."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters])}
    made = transformers.RobertaTokenizer(vocab=vocab, merges=[])
    made.save_pretrained(folder / "roberta")
    return folder / "roberta"


SPECIAL = {
    "DebertaV2": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "XLMRoberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
}


@pytest.mark.parametrize("kind", list(SPECIAL))
def test_unigram_tokenizers_of_encoders_give_the_tokens_of_transformers(kind: str, tmp_path: Path) -> None:
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁one", "▁two", "en"]
    vocab = [(piece, 0.0) for piece in SPECIAL[kind]] + [(piece, -1.0 - number) for number, piece in enumerate(pieces)]
    getattr(transformers, f"{kind}Tokenizer")(vocab=vocab).save_pretrained(tmp_path)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for length in (6, 64):
        for texts in (["one two  ten"], ["one two ten", "two É"]):
            encoding, _ = ours.cut(length)(*texts)
            expected = theirs(*texts, truncation=True, max_length=length, return_token_type_ids=True)
            assert (encoding.ids, encoding.type_ids) == (expected["input_ids"], expected["token_type_ids"])
        encoding, _ = ours.cut(length, words=True)(["one", "ten"])
        expected = theirs(["one", "ten"], is_split_into_words=True, truncation=True, max_length=length)
        assert (encoding.ids, encoding.word_ids) == (expected["input_ids"], expected.word_ids())
    assert ours.pad_id == theirs.pad_token_id


@pytest.fixture(params=list(TEMPLATES))
def with_template(request: pytest.FixtureRequest, assets: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint's tokenizer with a chat template."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (assets / "stories260k").glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    (folder / "chat_template.jinja").write_text(TEMPLATES[request.param])
    return folder


def test_conversations_are_written_as_transformers_writes_them(with_template: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(with_template)
    ours = load_tokenizer(with_template)
    for messages, prompt in ((CHAT, False), (CHAT[:2], True), (CHAT[1:], False)):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert ours.chat(messages, add_generation_prompt=prompt) == expected


def test_what_the_assistant_says_is_found_as_the_template_marks_it(with_template: Path, tmp_path: Path) -> None:
    """The templates mark the assistant's turns with {% generation %}. Without the marks, we find the same tokens."""
    theirs = transformers.AutoTokenizer.from_pretrained(with_template)
    marked: Any = theirs.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    unmarked = Path(shutil.copytree(with_template, tmp_path / "unmarked")) / "chat_template.jinja"
    unmarked.write_text(re.sub(r"{%-? (end)?generation %}", "", unmarked.read_text()))
    config = defaults()
    config.data.format = "chat"
    for folder in (with_template, unmarked.parent):
        example = encode_record({"messages": CHAT}, config.data, load_tokenizer(folder), name="a:1")
        assert example.tokens.tolist() == marked["input_ids"]
        assert example.loss_mask.astype(int).tolist() == marked["assistant_masks"]


def test_the_chats_of_smollm2_are_those_of_transformers(assets: Path) -> None:
    """Its template adds a system message, which is not learned."""
    folder = assets / "smollm2_135m"
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    config = defaults()
    config.data.format = "chat"
    for messages in (CHAT, CHAT[1:]):
        example = encode_record({"messages": messages}, config.data, load_tokenizer(folder), name="a:1")
        assert example.tokens.tolist() == theirs.apply_chat_template(messages)["input_ids"]
        assert theirs.decode(example.tokens[example.loss_mask]) == "Yes, <hello> é<|im_end|>No.<|im_end|>"


CONFIGS: list[tuple[dict[str, Any] | None, dict[str, Any]]] = [
    ({"eos_token_id": 2}, {"eos_token_id": 5}),
    ({"eos_token_id": [7, 2]}, {}),
    (None, {"eos_token_id": [5, 3]}),
]


@pytest.mark.parametrize(("generation", "fields"), CONFIGS)
def test_a_text_ends_where_generate_of_transformers_ends_it(
    generation: dict[str, Any] | None, fields: dict[str, Any], with_template: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(with_template, tmp_path / "copy")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=len(load_tokenizer(folder)._theirs), **sizes)
    )
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if name != "eos_token_id"}
    (folder / "config.json").write_text(json.dumps(config | fields))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    tokenizer = load_tokenizer(folder)
    assert list(tokenizer.stop_ids(chat=False)) == (theirs if isinstance(theirs, list) else [theirs])
