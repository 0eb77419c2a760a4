"""Conversations as tokens: rendered with the model's chat template, with a mask for the answers to train on."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from peftjax.core.errors import UserError
from peftjax.data.chat_template import Message
from peftjax.data.conversations import Conversation
from peftjax.data.tokenizer import Tokenizer

Span = tuple[int, int]  # characters of the rendered text


def encode_chat(
    conversation: Conversation, tokenizer: Tokenizer, train_on: str, name: str
) -> tuple[list[int], np.ndarray]:
    """Render and tokenize a conversation.

    Args:
        conversation: The conversation.
        tokenizer: The tokenizer, which has the chat template.
        train_on: "completions": train on the assistant's messages; "last": only on the last one; "all": on all tokens.
            Messages with weight 0 are never trained on.
        name: The name of the record, for messages.

    Returns:
        The token ids [n], and a mask, bool [n], that is true for the tokens to train on. If the template marks the
        assistant's text ({% generation %}), these are the marked tokens. Otherwise, an answer extends from the end of the
        generation prompt through the end-of-turn token, both located in the text of the whole conversation.

    Raises:
        UserError: The template rejects the conversation, or an answer cannot be located in its text.
    """
    answers = conversation.answers()
    if not answers and train_on != "all":
        roles = sorted({str(message["role"]) for message in conversation.messages})
        tokenizer.template.warn(
            f'conversations with the roles {", ".join(roles)} have no message with the role "assistant" to train on; rename '
            'the roles, or set data.train_on="all"'
        )
    wanted = answers[-1:] if train_on == "last" else answers
    learned = [i for i in wanted if conversation.weights[i]]
    rendered = _Rendered(conversation, tokenizer, name)
    tokens, offsets = tokenizer.encode_with_offsets(rendered.text)
    if train_on == "all":
        silent = [i for i in answers if not conversation.weights[i]]
        return tokens, ~_covered(rendered.spans(silent), offsets)
    if not tokenizer.template.marks(conversation.tools):
        return tokens, _covered(rendered.spans(learned), offsets)
    marked = np.array(tokenizer.template.marked(conversation.messages, *conversation.extras), bool)
    return tokens, marked if learned == answers else marked & _covered(rendered.spans(learned), offsets)


def render(tokenizer: Tokenizer, conversation: Conversation, count: int, name: str, add_generation_prompt: bool) -> str:
    """Render the first `count` messages of a conversation as text; errors name the record.

    Raises:
        UserError: There is no chat template, or it rejects the conversation.
    """
    try:
        return tokenizer.chat(conversation.messages[:count], add_generation_prompt, *conversation.extras)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


class _Rendered:
    """The text of a conversation, in which answers are located."""

    def __init__(self, conversation: Conversation, tokenizer: Tokenizer, name: str):
        self._conversation, self._tokenizer, self._name = conversation, tokenizer, name
        self._messages = conversation.messages
        self.text = render(tokenizer, conversation, len(self._messages), name, add_generation_prompt=False)
        for i, message in enumerate(self._messages):
            if calls := message.get("tool_calls"):
                calls = _replaced_below(calls, ("name", "arguments"), self._mark())
                if self._text_with(i, {**message, "tool_calls": calls}) == self.text:
                    raise UserError(
                        f"{name}: {tokenizer.template.name} does not render tool calls; use a model whose template does"
                    )
                if any(json.dumps(text, ensure_ascii=False) in self.text for text in _json_arguments(message)):
                    tokenizer.template.warn(
                        "tool calls have their arguments as JSON text, as in OpenAI's format, which "
                        f"{tokenizer.template.name} would encode as JSON a second time; convert them to objects, for example "
                        "with data.map"
                    )

    def spans(self, answers: list[int]) -> list[Span]:
        """The text to train on for each of these messages: from where generation starts through the end-of-turn token."""
        spans: list[Span] = []
        for i in answers:
            span = self._prefix_span(i) or self._located_span(i, spans[-1][1] if spans else 0)
            if span:
                spans.append(span)
        return spans

    def _prefix_span(self, i: int) -> Span | None:
        """The span of message i if the conversation up to it is rendered the same without the messages that follow."""
        before = self._part(i, add_generation_prompt=True)
        after = self.text if i + 1 == len(self._messages) else self._part(i + 1)
        if before is None or after is None or not (self.text.startswith(after) and after.startswith(before)):
            return None
        # Text after the end-of-turn token, usually a line break, is part of the template, not of the answer.
        answer = after.rstrip()
        ends = answer.endswith(self._tokenizer.special_texts) and len(answer) > len(before)
        if not ends:
            self._warn_of_end()
        return len(before), len(answer) if ends else len(after)

    def _located_span(self, i: int, floor: int) -> Span | None:
        """The span of message i wherever it is in the text; None if the template leaves it out.

        The message is located by rendering the conversation with other content in its place.
        """
        region = self._region(i)
        if region is None:
            return None
        start, stop = region
        if start < floor:
            raise UserError(
                f"{self._name}: {self._tokenizer.template.name} lets message {i + 1} (an assistant turn) "
                "change the text of earlier messages, so its tokens cannot be located. Split the conversation into one "
                'record per answer and set data.train_on="last"'
            )
        following = self._region(i + 1) if i + 1 < len(self._messages) else None
        limit = following[0] if following and following[0] >= stop else len(self.text)
        return self._begin(i, floor, start), self._end(stop, limit)

    def _begin(self, i: int, floor: int, start: int) -> int:
        """Where generation of message i begins; its content starts at `start`.

        An answer may lack what the generation prompt ends with, such as "<think>".
        """
        before, bare = self._part(i, add_generation_prompt=True), self._part(i)
        shared = _common(self.text, before or "")
        if before is not None and shared == len(before):
            return shared
        if bare is not None and shared > len(bare):
            return min(shared, start)
        header = self._tokenizer.template.generation_prompt
        found = self.text.rfind(header, floor, start) if header else -1
        return start if found < 0 else found + len(header)

    def _end(self, stop: int, limit: int) -> int:
        """The end of the first end-of-turn token between two positions: an eos token, or else any special token."""
        for texts in (self._tokenizer.eos_texts, self._tokenizer.special_texts):
            found = [(at, -len(text)) for text in texts if (at := self.text.find(text, stop, limit)) >= 0]
            if found:
                at, length = min(found)
                return at - length
        self._warn_of_end()
        return stop

    def _region(self, i: int) -> Span | None:
        """The characters that change with the content of message i; None if there are none."""
        message, mark = self._messages[i], self._mark()
        region = self._changed(i, _replaced(message, mark))
        if region and message.get("tool_calls"):
            # The name of a function may also be in the header of the tool's answer, as with the template of gpt-oss.
            shorter = self._changed(i, _replaced(message, mark, ("arguments",)))
            if shorter and any(text in self.text[shorter[1] : region[1]] for text in self._tokenizer.eos_texts):
                return region[0], shorter[1]
        return region

    def _changed(self, i: int, message: Message) -> Span | None:
        """The characters that change if message i is replaced; None if there are none."""
        other = self._text_with(i, message)
        if other == self.text:
            return None
        start = _common(self.text, other)
        return start, len(self.text) - _common(self.text[start:][::-1], other[start:][::-1])

    def _text_with(self, i: int, message: Message) -> str:
        """The text of the conversation with message i replaced."""
        messages = [*self._messages[:i], message, *self._messages[i + 1 :]]
        try:
            return self._tokenizer.chat(messages, False, *self._conversation.extras)
        except UserError as error:
            raise UserError(f"{self._name}: message {i + 1} cannot be located: {error}") from error

    def _mark(self) -> str:
        """A private-use character that does not occur in the text."""
        return next(mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in self.text)

    def _part(self, count: int, *, add_generation_prompt: bool = False) -> str | None:
        """The text of the first `count` messages; None if the template does not render them alone."""
        if not count:
            return None
        try:
            return self._tokenizer.chat(self._messages[:count], add_generation_prompt, *self._conversation.extras)
        except UserError:
            return None

    def _warn_of_end(self) -> None:
        self._tokenizer.template.warn(
            f"{self._tokenizer.template.name} ends an answer without an end-of-turn token, so the model "
            "does not learn where to stop; add eos_token to the template"
        )


def _json_arguments(message: Message) -> list[str]:
    """The arguments of tool calls that are JSON text instead of objects."""
    calls = [call.get("function", call) for call in message["tool_calls"] if isinstance(call, Mapping)]
    found = [call.get("arguments") for call in calls if isinstance(call, Mapping)]
    return [text for text in found if isinstance(text, str) and text.lstrip().startswith("{") and '"' in text]


def _replaced(message: Message, mark: str, of_calls: tuple[str, ...] = ("name", "arguments")) -> dict[str, Any]:
    """A copy of the message with `mark` for every text that a template may render; in tool calls, for texts below
    `of_calls`."""
    new = dict(message)
    for key in ("content", "reasoning_content", "thinking", "reasoning"):
        if text := message.get(key):
            new[key] = mark if isinstance(text, str) else _replaced_below(text, ("text",), mark)
    if calls := message.get("tool_calls"):
        new["tool_calls"] = _replaced_below(calls, of_calls, mark)
    return new if new != message else new | {"content": mark}


def _replaced_below(value: Any, keys: tuple[str, ...], mark: str) -> Any:
    """`value` with `mark` for every text below one of the keys."""
    if isinstance(value, Mapping):
        return {
            key: _all_replaced(entry, mark) if key in keys else _replaced_below(entry, keys, mark)
            for key, entry in value.items()
        }
    return [_replaced_below(entry, keys, mark) for entry in value] if isinstance(value, list) else value


def _all_replaced(value: Any, mark: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _all_replaced(entry, mark) for key, entry in value.items()}
    if isinstance(value, list):
        return [_all_replaced(entry, mark) for entry in value]
    return mark if isinstance(value, str) else value


def _common(one: str, other: str) -> int:
    """The length of the common prefix of two texts."""
    same, limit = 0, min(len(one), len(other))
    while same < limit:  # bisection: comparing slices is much faster than comparing characters one by one
        middle = (same + limit + 1) // 2
        same, limit = (middle, limit) if one[same:middle] == other[same:middle] else (same, middle - 1)
    return same


def _covered(spans: list[Span], offsets: list[Span]) -> np.ndarray:
    """Which tokens are in one of the spans, bool [n]; a token that begins before a span and ends in it counts."""
    ends = np.array([end for _, end in offsets], int)
    mask = np.zeros(len(offsets), bool)
    for start, end in spans:
        mask |= (start < ends) & (ends <= end)
    return mask
