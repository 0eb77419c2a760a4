"""A tiny tokenizer in a model directory, and configs for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from ml_collections import ConfigDict
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from peftjax.core.config import defaults
from peftjax.data.tokenizer import Tokenizer, load_tokenizer
from peftjax.training import config as configs

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|end|>"]
CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, this is a date: 17 March 1999", "yes no yes no"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="session")
def bpe() -> tokenizers.Tokenizer:
    """A byte-level BPE: any text comes back from its ids as it was."""
    bpe = tokenizers.Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return bpe


@pytest.fixture
def make_directory(tmp_path: Path, bpe: tokenizers.Tokenizer) -> Callable[..., Path]:
    """Writes a model directory: `files` are JSON objects by file name; tokenizer_config.json has defaults."""

    def make(edit: Callable[[dict[str, Any]], None] | None = None, **files: dict[str, Any]) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        data = json.loads(bpe.to_str())
        if edit:
            edit(data)
        config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": CHAT_TEMPLATE}
        contents = {"tokenizer": data, "tokenizer_config": config} | files
        for name, content in contents.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        return folder

    return make


@pytest.fixture
def tokenizer(make_directory: Callable[..., Path]) -> Tokenizer:
    return load_tokenizer(make_directory())


@pytest.fixture
def make_config() -> Callable[..., ConfigDict]:
    """A valid config: `data` fields by keyword, with a batch size of 4 rows and rows of 16 tokens."""

    def make(*, batch_size: int = 4, seed: int = 0, **data: Any) -> ConfigDict:
        config = defaults()
        config.seed, config.train.batch_size, config.data.max_length = seed, batch_size, 16
        config.data.update(data)
        return configs.validate(config)

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes records to a .jsonl file and returns its path."""

    def write(name: str, records: list[dict[str, Any]]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write
