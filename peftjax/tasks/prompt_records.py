"""Prompts as records, {"prompt": "..."} with a text or {"messages": [...]} with a conversation, and their tokens."""

import json
from collections.abc import Mapping
from typing import Any

from peftjax.core.errors import UserError
from peftjax.data.chat import render
from peftjax.data.config import DataConfig
from peftjax.data.conversations import conversation_of
from peftjax.data.tokenizer import Tokenizer


def encode_chat(record: Mapping[str, Any], tokenizer: Tokenizer, name: str) -> list[int]:
    """Convert a record to the tokens that an answer continues: its messages, or its text as in `encode_chat_prompt`."""
    if conversation := with_messages(record):
        return encode_conversation(conversation, tokenizer, name)
    return encode_chat_prompt(text_in(record, name), tokenizer, name)


def encode_conversation(record: Mapping[str, Any], tokenizer: Tokenizer, name: str) -> list[int]:
    """Convert the messages of a record, and its tools if there are any, to the tokens that an answer continues.

    Raises:
        UserError: The record does not hold messages, or the chat template rejects them.
    """
    conversation = conversation_of(record, DataConfig(format="chat"), name)
    text = render(tokenizer, conversation, len(conversation.messages), name, add_generation_prompt=True)
    return tokenizer.encode(text, bos=False, eos=False)


def encode_chat_prompt(prompt: str, tokenizer: Tokenizer, name: str) -> list[int]:
    """Convert a user message to the tokens that an answer continues.

    Args:
        prompt: The text of the message; or a conversation in JSON, as a list of messages or as a record,
            {"messages": [...], "tools": [...]}.
        tokenizer: The tokenizer.
        name: What messages call the prompt.
    """
    if record := conversation_in(prompt):
        return encode_conversation(record, tokenizer, name)
    return tokenizer.encode_prompt(prompt, chat=True)


def with_messages(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its conversation, from the field "messages" or "prompt", in "messages"; empty if it has none."""
    messages = record.get("messages", record.get("prompt"))
    return {**record, "messages": messages} if _are_messages(messages) else {}


def text_in(record: Mapping[str, Any], name: str) -> str:
    """The text of the prompt in a record, which messages call `name`.

    Raises:
        UserError: There is none.
    """
    if not isinstance(prompt := record.get("prompt"), str):
        raise UserError(
            f'{name}: a prompt needs the field "prompt" with a text, or "messages" with a list of messages '
            f'{{"role": ..., "content": ...}}; its fields: {", ".join(record) or "none"}'
        )
    return prompt


def prompt_text(record: Mapping[str, Any]) -> str:
    """A record of a file of prompts as the text that `encode` takes."""
    prompt = record.get("prompt")
    return prompt if isinstance(prompt, str) else json.dumps(with_messages(record) or dict(record), ensure_ascii=False)


def conversation_in(prompt: str) -> dict[str, Any]:
    """The record of a conversation in JSON; empty if the prompt is another text."""
    value = json_in(prompt)
    if _are_messages(value):
        return {"messages": value}
    return value if isinstance(value, dict) and "messages" in value else {}


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) and "role" in each for each in value)


def json_in(text: str) -> Any:
    """The JSON value in a text; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
