"""Conversations from records: chat messages as they are, ShareGPT's and Alpaca's fields as chat messages."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from peftjax.core.errors import UserError
from peftjax.data.chat_template import Message
from peftjax.data.config import DataConfig
from peftjax.data.fields import field_of, text_field

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
# A message of these kinds needs no content.
_INSTEAD_OF_CONTENT = ("tool_calls", "reasoning_content", "thinking", "reasoning")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What a chat template renders.

    Attributes:
        messages: The messages, without keys that are null.
        tools: JSON schemas of the functions that the assistant can call; None if there are none.
        weights: Whether each message may be trained on: false if the record gives it weight 0.
        variables: Other variables of the template.
    """

    messages: list[Message]
    tools: list[Any] | None
    weights: list[bool]
    variables: dict[str, Any]

    @property
    def extras(self) -> tuple[list[Any] | None, dict[str, Any]]:
        """What the template gets besides the messages: tools and other variables."""
        return self.tools, self.variables

    def answers(self) -> list[int]:
        """The positions of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]


def conversation_of(record: Mapping[str, Any], data: DataConfig, name: str) -> Conversation:
    """Return the conversation of a record in the format chat, sharegpt or alpaca.

    Raises:
        UserError: A field is missing, or does not hold what the format expects.
    """
    read = {"chat": _chat, "sharegpt": _sharegpt, "alpaca": _alpaca}[data.format]
    messages = [_without_nulls(message) for message in read(record, data, name)]
    weights = [_weight(message.pop("weight", 1), name) for message in messages]
    for message in messages:
        _check_content(message, name)
    variables = _without_nulls(record.get("chat_template_kwargs") or {})
    if not isinstance(variables, dict):
        raise UserError(
            f"{name}: field 'chat_template_kwargs' must hold an object with variables of the template, not {str(variables)[:80]!r}"
        )
    return Conversation(list(messages), _tools(record, name), weights, variables)


def text_of(message: Message) -> str | None:
    """The text of a message: its content, or the text parts of its content; None if there is no text."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content if isinstance(content, str) else None


def alpaca_fields(record: Mapping[str, Any], name: str) -> tuple[str, str, str]:
    """The instruction, the input (often empty) and the output of a record in Alpaca's format.

    Raises:
        UserError: A field is missing, or is neither text nor a number.
    """
    given = "" if record.get("input") is None else text_field(record, "input", 'format="alpaca"', name)
    instruction, output = (text_field(record, key, 'format="alpaca"', name) for key in ("instruction", "output"))
    return instruction, given, output


def _chat(record: Mapping[str, Any], data: DataConfig, name: str) -> list[Message]:
    parts = [_listed(record.get(field)) for field in (data.prompt_field, data.completion_field)]
    if data.messages_field not in record and all(map(_are_messages, parts)):  # as in TRL
        prompt, completion = parts
        silent = {} if data.train_on == "all" else {"weight": 0}
        return [{**message, **silent} for message in prompt] + completion
    messages = _listed(field_of(record, data.messages_field, "messages_field", name))
    if not _are_messages(messages):
        raise UserError(
            f'{name}: the field {data.messages_field!r} must hold a list of messages {{"role": ..., "content": ...}}, '
            f"not {str(record[data.messages_field])[:80]!r}{_other_format(messages)}"
        )
    return messages


def _sharegpt(record: Mapping[str, Any], data: DataConfig, name: str) -> list[Message]:
    field = "conversations" if data.messages_field == "messages" else data.messages_field
    turns = _listed(field_of(record, field, "messages_field", name))
    if not turns or not all(isinstance(turn, Mapping) and "from" in turn and "value" in turn for turn in turns):
        raise UserError(
            f'{name}: the field {field!r} must hold a list of turns {{"from": ..., "value": ...}}, not '
            f"{str(record[field])[:80]!r}"
        )
    if unknown := [role for turn in turns if (role := turn["from"]) not in list(SHAREGPT_ROLES)]:  # of any type
        raise UserError(
            f'{name}: {unknown[0]!r} in "from" is not a ShareGPT role; the roles are {", ".join(SHAREGPT_ROLES)}'
        )
    system = record.get("system")
    first = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    return first + [
        {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"], "weight": turn.get("weight")} for turn in turns
    ]


def _alpaca(record: Mapping[str, Any], data: DataConfig, name: str) -> list[Message]:
    del data
    instruction, given, output = alpaca_fields(record, name)
    prompt = f"{instruction}\n\n{given}" if given else instruction
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": output}]


def _are_messages(messages: list[Any]) -> bool:
    return bool(messages) and all(isinstance(message, Mapping) and message.get("role") for message in messages)


def _listed(messages: Any) -> list[Message]:
    """A list of messages; TFDS stores a sequence of dicts as a dict of sequences. Empty if it is neither."""
    if isinstance(messages, Mapping):
        columns = list(messages.values())
        if not all(isinstance(column, list | tuple) and len(column) == len(columns[0]) for column in columns):
            return []
        return [dict(zip(messages, values, strict=True)) for values in zip(*columns, strict=True)]
    return list(messages) if isinstance(messages, list | tuple) else []


def _other_format(messages: list[Message]) -> str:
    turns = bool(messages) and all(isinstance(turn, Mapping) and "from" in turn for turn in messages)
    return '; for "from" and "value" set data.format="sharegpt"' if turns else ""


def _without_nulls(value: Any) -> Any:
    """A value without the keys whose value is None, at any depth: Arrow gives every struct the keys of all others."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list | tuple) else value


def _check_content(message: Message, name: str) -> None:
    """Refuse a message whose content is neither text nor parts of text, and a message without anything to render."""
    content, role = message.get("content"), message["role"]
    if content is None and not any(message.get(key) for key in _INSTEAD_OF_CONTENT):
        raise UserError(f"{name}: a message with the role {role!r} has neither content nor tool_calls")
    for part in content if isinstance(content, list) else []:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = repr(part.get("type") if isinstance(part, Mapping) else part)[:80]
            raise UserError(
                f"{name}: a message with the role {role!r} has a part of type {kind}; only text is supported"
            )
    if content is not None and not isinstance(content, str | list):
        raise UserError(f"{name}: the content of a message must be text or a list of parts, not {content!r:.80}")


def _weight(weight: Any, name: str) -> bool:
    if weight not in (0, 1):
        raise UserError(f"{name}: the weight of a message must be 0 or 1, not {weight!r}")
    return bool(weight)


def _tools(record: Mapping[str, Any], name: str) -> list[Any] | None:
    tools = record.get("tools")
    if isinstance(tools, str):  # Arrow has no type for JSON schemas of different shapes, so they are stored as text
        try:
            tools = json.loads(tools or "null")
        except ValueError as error:
            raise UserError(f"{name}: field 'tools' is not valid JSON: {error}") from error
    if tools and not (isinstance(tools, list | tuple) and all(isinstance(tool, Mapping) for tool in tools)):
        raise UserError(f"{name}: field 'tools' must hold a list of JSON schemas, not {str(tools)[:80]!r}")
    return _without_nulls(tools) or None
