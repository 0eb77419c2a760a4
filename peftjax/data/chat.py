"""Conversations as tokens, written by the model's chat template, and where in them the assistant speaks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peftjax.core.errors import UserError
from peftjax.data.chat_template import Message
from peftjax.data.config import DataConfig
from peftjax.data.fields import field_of
from peftjax.data.tokenizer import Tokenizer


def encode_chat(messages: list[Message], tokenizer: Tokenizer, name: str) -> tuple[list[int], np.ndarray]:
    """The tokens of the rendered conversation, and which of them are the assistant's, bool [n].

    The assistant's turns are found by rendering the messages up to each of them.
    """
    whole = render(tokenizer, messages, name)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:i], name, add_generation_prompt=True)
        after = render(tokenizer, messages[: i + 1], name)
        if not (whole.startswith(after) and after.startswith(before)):
            raise UserError(
                f"{name}: the chat template of {tokenizer.directory} writes the conversation up to message {i + 1} (an "
                "assistant turn) differently once more messages follow, so the assistant's part cannot be told. Split "
                'such conversations into one record for each answer, or use config.data.format = "completion"'
            )
        # What stands after the end-of-turn token, usually a line break, belongs to the template and not to the answer.
        answer = after.rstrip()
        spans.append((len(before), len(answer) if answer.endswith(tokenizer.special_texts) else len(after)))
    tokens, offsets = tokenizer.encode_with_offsets(whole)
    ends = np.array([end for _, end in offsets], int)
    mask = np.zeros(len(tokens), bool)
    for start, end in spans:  # a token that begins before an answer and ends inside it counts as part of the answer
        mask |= (start < ends) & (ends <= end)
    return tokens, mask


def render(tokenizer: Tokenizer, messages: Sequence[Message], name: str, *, add_generation_prompt: bool = False) -> str:
    try:
        return tokenizer.chat(messages, add_generation_prompt)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def messages_of(record: Mapping[str, Any], data: DataConfig, name: str) -> list[Message]:
    messages = field_of(record, data.messages_field, "messages_field", name)
    if isinstance(messages, Mapping):  # TFDS stores a sequence of dicts as a dict of sequences
        messages = [dict(zip(messages, values, strict=True)) for values in zip(*messages.values(), strict=True)]
    good = isinstance(messages, list | tuple) and messages
    if not good or not all(isinstance(m, Mapping) and "role" in m and "content" in m for m in messages):
        raise UserError(
            f'{name}: the field {data.messages_field!r} must hold a list of messages {{"role": ..., "content": ...}}, '
            f"and holds {str(messages)[:80]!r}"
        )
    return list(messages)
