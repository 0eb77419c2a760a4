"""Records of text as tokens: which fields are read, and which tokens have a loss."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peftjax.core.errors import UserError
from peftjax.data.chat import encode_chat, render
from peftjax.data.config import DataConfig
from peftjax.data.conversations import alpaca_fields, conversation_of, text_of
from peftjax.data.fields import fill, text_field
from peftjax.data.tokenizer import Tokenizer

# The maximum length of the prompt that is cut from a text record.
TEXT_PROMPT_TOKENS = 32

# The prompts of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), which models trained on its format expect.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
    "that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One document for training.

    Attributes:
        tokens: int32 [n].
        loss_mask: bool [n], true for the tokens that the model is trained to predict. The first one is never predicted.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt for an evaluation by generation.

    Attributes:
        tokens: The tokens to continue.
        prompt: Their text.
        expected: The expected continuation. Compare without surrounding spaces, which some tokenizers lose.
        record: The name of the record.
    """

    tokens: list[int]
    prompt: str
    expected: str
    record: str


def encode_record(record: Mapping[str, Any], data: DataConfig, tokenizer: Tokenizer, *, name: str) -> Example:
    """The tokens of a record, and which of them have a loss.

    By data.format:

    text: The text between bos (if the tokenizer adds it) and eos, with a loss on all of it. An empty text has no loss.
    completion: bos, prompt, completion, eos, with a loss on the completion and the eos. The prompt is tokenized alone, as
      for generation; the completion is tokenized together with the prompt. If this would merge tokens across their
      boundary (Hugging Face TRL then warns and trains on the merged tokens), the completion is tokenized separately.
    chat: The conversation as rendered by the chat template, with a loss on every assistant turn including its
      end-of-turn token.
    sharegpt: The same; the conversation has ShareGPT's names for fields and roles.
    alpaca: The same; the user message is the instruction and the input, the answer is the output. If the tokenizer has no
      chat template: as completion, with the Stanford Alpaca prompt.

    data.train_on = "last" restricts the loss of a conversation to its last answer; "all" extends it to all tokens.

    Raises:
        UserError: A field is missing or is not text, or a template or a conversation cannot be used. The message calls
            the record `name`.
    """
    if data.format == "text":
        ids = tokenizer.encode(text_field(record, data.text_field, "text_field", name), bos=False, eos=False)
        tokens = tokenizer.end(tokenizer.begin(ids))
        return example(tokens, [bool(ids)] * len(tokens))
    if _is_completion(data, tokenizer):
        prompt, completion = _prompt_and_completion(record, data, tokenizer, name)[1:]
        loss = [data.train_on == "all"] * len(prompt) + [True] * len(completion)
        return example([*prompt, *completion], loss)
    return example(*encode_chat(conversation_of(record, data, name), tokenizer, data.train_on, name))


def encode_prompt(record: Mapping[str, Any], data: DataConfig, tokenizer: Tokenizer, *, name: str) -> Prompt:
    """The prompt of a record, and the text that is expected to follow.

    By data.format:

    completion: The prompt, and the completion.
    chat, sharegpt, alpaca: Everything before the last assistant turn, and the content of that turn.
    text: The first half of the tokens, at most 32 of them, and the rest of the text.

    Raises:
        UserError: As `encode_record`; also a conversation without an assistant turn.
    """
    if data.format == "text":
        whole = encode_record(record, data, tokenizer, name=name).tokens.tolist()
        cut = max(1, min(TEXT_PROMPT_TOKENS, len(whole) // 2))
        ids, expected = whole[:cut], tokenizer.decode(whole[cut:])
    elif _is_completion(data, tokenizer):
        expected, ids, _ = _prompt_and_completion(record, data, tokenizer, name)
    else:
        ids, expected = _question_and_answer(record, data, tokenizer, name)
    return Prompt(ids, tokenizer.decode(ids), expected, name)


def example(tokens: Sequence[int], loss_mask: Sequence[bool] | np.ndarray) -> Example:
    return Example(np.asarray(tokens, np.int32), np.asarray(loss_mask, bool))


def _is_completion(data: DataConfig, tokenizer: Tokenizer) -> bool:
    return data.format == "completion" or (data.format == "alpaca" and not tokenizer.template)


def _question_and_answer(
    record: Mapping[str, Any], data: DataConfig, tokenizer: Tokenizer, name: str
) -> tuple[list[int], str]:
    """The tokens of a conversation before its last answer, and the text of that answer."""
    conversation = conversation_of(record, data, name)
    last = max(conversation.answers(), default=None)
    expected = None if last is None else text_of(conversation.messages[last])
    if last is None or expected is None:
        raise UserError(f"{name}: the conversation has no assistant turn with text to compare with")
    if not last:
        raise UserError(f"{name}: the conversation begins with its only assistant turn, so there is no prompt")
    text = render(tokenizer, conversation, last, name, add_generation_prompt=True)
    return tokenizer.encode(text, bos=False, eos=False), expected


def _prompt_and_completion(
    record: Mapping[str, Any], data: DataConfig, tokenizer: Tokenizer, name: str
) -> tuple[str, list[int], list[int]]:
    """The text of the completion, the tokens of the prompt, and the tokens of the completion with its eos."""
    if data.format == "alpaca":
        instruction, given, completion = alpaca_fields(record, name)
        prompt = (ALPACA_WITH_INPUT if given else ALPACA).format(instruction=instruction, input=given)
    else:
        prompt = fill(data.prompt_template, record, data, name)
        completion = fill(data.completion_template, record, data, name)
    before = tokenizer.encode(prompt, bos=True, eos=False)
    both = tokenizer.encode(prompt + completion, bos=True, eos=False)
    after = both[len(before) :] if both[: len(before)] == before else tokenizer.encode_continuation(completion)
    return completion, before, tokenizer.end(after)
