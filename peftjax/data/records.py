"""Records of text as tokens: which fields are read, and which tokens carry a loss."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from peftjax.data.chat import encode_chat, messages_of, render
from peftjax.data.fields import field_of, fill
from peftjax.data.tokenizer import Tokenizer

# Of a text record, at most this many tokens are the prompt that a generated sample continues.
TEXT_PROMPT_TOKENS = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One document for training.

    Attributes:
      tokens: [n] int32.
      loss_mask: [n] bool, true where the model is asked to predict this token. Nothing predicts the first one.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model is asked in an evaluation by generation.

    Attributes:
      tokens: to continue.
      prompt: their text.
      expected: the text that should follow. Compare without the spaces around it: some tokenizers lose them.
      record: the record's name.
    """

    tokens: list[int]
    prompt: str
    expected: str
    record: str


def encode_record(record: Mapping[str, Any], data: ConfigDict, tokenizer: Tokenizer, *, name: str) -> Example:
    """The tokens of a record and which of them carry a loss, by `data.format` (`data` is config.data).

    text: the text between bos (where the tokenizer adds it by itself) and eos; a loss on all of it. An empty text has
      no loss.
    completion: bos, prompt, completion, eos; a loss on the completion and the eos. The prompt's tokens are those of the
      prompt alone, what a generation starts from, and the completion's are those it has after the prompt. Where
      tokenizing both together would merge across their boundary (Hugging Face TRL then warns and trains on the merged
      tokens), the completion is tokenized by itself.
    chat: the conversation by the model's chat template; a loss on every assistant turn, its end-of-turn token included.

    Raises:
      ValueError: a field is missing or is not text; a template or a conversation that cannot be used. `name`, what to
        call the record, is in the message.
    """
    if data.format == "text":
        return _encode_text(record, data, tokenizer, name)
    if data.format == "completion":
        prompt, completion = _prompt_and_completion(record, data, tokenizer, name)[1:]
        return example([*prompt, *completion], [False] * len(prompt) + [True] * len(completion))
    if data.format == "chat":
        return example(*encode_chat(messages_of(record, data, name), tokenizer, name))
    raise ValueError(f'config.data.format = {data.format!r} must be "text", "completion" or "chat"')


def encode_prompt(record: Mapping[str, Any], data: ConfigDict, tokenizer: Tokenizer, *, name: str) -> Prompt:
    """What a generation starts from for this record, and the text that should follow.

    completion: the prompt; the completion. chat: what precedes the last assistant turn; that turn's content.
    text: the first half of the tokens, 32 of them at most; the rest of the text.

    Raises:
      ValueError: as `encode_record`; also a conversation without an assistant turn.
    """
    if data.format == "completion":
        expected, ids, _ = _prompt_and_completion(record, data, tokenizer, name)
    elif data.format == "chat":
        messages = messages_of(record, data, name)
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if last is None or not isinstance(messages[last].get("content"), str):
            raise ValueError(f"{name}: the conversation has no assistant turn with a text to expect")
        text = render(tokenizer, messages[:last], name, add_generation_prompt=True)
        ids, expected = tokenizer.encode(text, bos=False, eos=False), messages[last]["content"]
    else:
        whole = encode_record(record, data, tokenizer, name=name).tokens.tolist()
        cut = max(1, min(TEXT_PROMPT_TOKENS, len(whole) // 2))
        ids, expected = whole[:cut], tokenizer.decode(whole[cut:])
    return Prompt(ids, tokenizer.decode(ids), expected, name)


def example(tokens: Sequence[int], loss_mask: Sequence[bool] | np.ndarray) -> Example:
    return Example(np.asarray(tokens, np.int32), np.asarray(loss_mask, bool))


def _encode_text(record: Mapping[str, Any], data: ConfigDict, tokenizer: Tokenizer, name: str) -> Example:
    text = field_of(record, data.text_field, "text_field", name)
    if not isinstance(text, str):
        raise ValueError(f"{name}: the field {data.text_field!r} must hold text, and holds {type(text).__name__}")
    ids = tokenizer.encode(text, bos=False, eos=False)
    tokens = tokenizer.end(tokenizer.begin(ids))
    return example(tokens, np.full(len(tokens), bool(ids)))


def _prompt_and_completion(
    record: Mapping[str, Any], data: ConfigDict, tokenizer: Tokenizer, name: str
) -> tuple[str, list[int], list[int]]:
    """The completion's text, the prompt's tokens, and the completion's tokens with their eos."""
    prompt = fill(data.prompt_template, record, data, name)
    completion = fill(data.completion_template, record, data, name)
    before = tokenizer.encode(prompt, bos=True, eos=False)
    both = tokenizer.encode(prompt + completion, bos=True, eos=False)
    after = both[len(before) :] if both[: len(before)] == before else tokenizer.encode_continuation(completion)
    return completion, before, tokenizer.end(after)
