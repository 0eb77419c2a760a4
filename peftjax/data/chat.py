"""Conversations as tokens: rendered with the model's chat template, with a mask for the assistant's turns."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peftjax.core.errors import UserError
from peftjax.data.config import DataConfig
from peftjax.data.fields import field_of
from peftjax.data.tokenizer import Message, Tokenizer


def encode_chat(messages: list[Message], tokenizer: Tokenizer, name: str) -> tuple[list[int], np.ndarray]:
    """Render and tokenize a conversation.

    The assistant's turns are located by rendering the conversation up to each of them.

    Args:
        messages: The conversation.
        tokenizer: The tokenizer, which has the chat template.
        name: The name of the record, for messages.

    Returns:
        The token ids [n], and a mask, bool [n], that is true for the assistant's tokens.

    Raises:
        UserError: The template rejects the conversation, or renders an assistant turn differently once messages follow.
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
                f"{name}: the chat template of {tokenizer.directory} renders the conversation up to message {i + 1} (an "
                "assistant turn) differently if more messages follow, so the assistant's tokens cannot be located. Split such "
                'conversations into one record per answer, or use config.data.format = "completion"'
            )
        # Text after the end-of-turn token, usually a line break, is part of the template, not of the answer.
        answer = after.rstrip()
        spans.append((len(before), len(answer) if answer.endswith(tokenizer.special_texts) else len(after)))
    tokens, offsets = tokenizer.encode_with_offsets(whole)
    ends = np.array([end for _, end in offsets], int)
    mask = np.zeros(len(tokens), bool)
    for start, end in spans:  # a token that begins before an answer and ends in it is part of it
        mask |= (start < ends) & (ends <= end)
    return tokens, mask


def render(tokenizer: Tokenizer, messages: Sequence[Message], name: str, *, add_generation_prompt: bool = False) -> str:
    """Render a conversation as text; errors name the record.

    Raises:
        UserError: There is no chat template, or it rejects the conversation.
    """
    try:
        return tokenizer.chat(messages, add_generation_prompt)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def messages_of(record: Mapping[str, Any], data: DataConfig, name: str) -> list[Message]:
    """Return the conversation of a record.

    Raises:
        UserError: The record has no such field, or its value is not a list of messages.
    """
    messages = field_of(record, data.messages_field, "messages_field", name)
    if isinstance(messages, Mapping):  # TFDS stores a sequence of dicts as a dict of sequences
        messages = [dict(zip(messages, values, strict=True)) for values in zip(*messages.values(), strict=True)]
    good = isinstance(messages, list | tuple) and messages
    if not good or not all(isinstance(m, Mapping) and "role" in m and "content" in m for m in messages):
        raise UserError(
            f'{name}: the field {data.messages_field!r} must hold a list of messages {{"role": ..., "content": ...}}, '
            f"not {str(messages)[:80]!r}"
        )
    return list(messages)
