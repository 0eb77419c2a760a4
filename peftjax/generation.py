"""`peftjax.generate`: texts from texts, or token ids from token ids."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from typing import Any, TypeGuard, overload

import numpy as np
from flax import nnx

from peftjax.core.errors import UserError
from peftjax.data.chat_template import Message
from peftjax.data.token_rows import check_token_rows
from peftjax.data.tokenizer import Tokenizer
from peftjax.decoding import generate_batches
from peftjax.models.base import Model
from peftjax.sampling import GREEDY, Sampling
from peftjax.tasks.prompt_records import encode_conversation

# A list of messages, or a record with "messages" and optionally "tools".
Conversation = Sequence[Message] | Mapping[str, Any]


@overload
def generate(
    model: nnx.Module,
    prompts: Sequence[Sequence[int]],
    /,
    *,
    max_new_tokens: int = ...,
    stop: Sequence[int] = ...,
    sampling: Sampling = ...,
    seed: int = ...,
    batch_size: int | None = ...,
) -> list[list[int]]: ...
@overload
def generate(  # type: ignore[overload-overlap]  # a list of records is not a conversation
    model: nnx.Module,
    tokenizer: Tokenizer,
    text: str | Conversation,
    /,
    *,
    chat: bool = ...,
    max_new_tokens: int = ...,
    stop: Sequence[int] = ...,
    sampling: Sampling = ...,
    seed: int = ...,
    batch_size: int | None = ...,
) -> str: ...
@overload
def generate(
    model: nnx.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str | Conversation],
    /,
    *,
    chat: bool = ...,
    max_new_tokens: int = ...,
    stop: Sequence[int] = ...,
    sampling: Sampling = ...,
    seed: int = ...,
    batch_size: int | None = ...,
) -> list[str]: ...
def generate(
    model: nnx.Module,
    prompts: Sequence[Sequence[int]] | Tokenizer,
    texts: str | Conversation | Sequence[str | Conversation] | None = None,
    /,
    *,
    chat: bool = False,
    max_new_tokens: int = 64,
    stop: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
    batch_size: int | None = None,
) -> list[list[int]] | str | list[str]:
    """Generate a continuation of each prompt, or an answer to it, with the active adapters.

    `generate(model, tokenizer, "text")` returns a text, and a list of texts for a list of texts.
    `generate(model, [[1, 2, 3]])` returns token ids. All prompts run in one batch, unless `batch_size` is given. They are
    padded on the left, so that prompts of similar length share one compiled function. It is compiled again for another
    number of prompts in a batch, another `max_new_tokens` or another `top_k`, but not for another temperature or
    `top_p`.

    Args:
        model: A decoder or an encoder-decoder, as `peftjax.load_model` returns, or what `peftjax.rows` returns for a decoder.
        prompts: Token ids, at least one per prompt; or the tokenizer of the texts.
        texts: One prompt, or several. With `chat`, a prompt may also be a conversation: a list of messages
            {"role": ..., "content": ...}, for example with a system message or earlier turns, or a record
            {"messages": [...], "tools": [...]}.
        chat: Whether each prompt is rendered with the chat template; a text is then a user message.
        max_new_tokens: Maximum number of new tokens per prompt.
        stop: Token ids that end an answer. With a tokenizer, its `stop_ids` are added: the eos tokens of
            generation_config.json, and in a chat also the end-of-turn token of the chat template.
        sampling: How the next token is chosen; by default the most likely one.
        seed: Random seed for sampling; each further batch takes the next seed.
        batch_size: Maximum number of prompts that run at the same time, for many prompts. None: all of them.

    Returns:
        The answers, without the stop token.

    Raises:
        UserError: A prompt is empty or holds a token without a row in the embedding, the tokenizer has no chat template, the
            model does not generate text, or a prompt and the new tokens exceed its positions.
        NotFiniteError: The logits are NaN or infinite.

    Examples:
        >>> import peftjax
        >>> model, tokenizer = peftjax.load_model("embedded"), peftjax.load_tokenizer("embedded")
        >>> answer = peftjax.generate(model, tokenizer, "March 7th, 2024 ->", max_new_tokens=4)
        >>> answers = peftjax.generate(model, [[5, 6, 7], [8]], max_new_tokens=4)
        >>> [len(answer) for answer in answers]
        [4, 4]
    """
    if isinstance(stop, Sequence) and any(isinstance(token, str) for token in stop):
        raise UserError("generate: stop takes token ids, not texts; tokenizer.token_id(text) is the id of a token")
    if (ends := _ids(stop)) is None:
        raise UserError(f"generate: stop must be a list of token ids, not {stop!r}")
    if not isinstance(sampling, Sampling):
        raise UserError(
            f"generate: sampling must be a peftjax.Sampling, such as Sampling(temperature=0.7), not {sampling!r}"
        )
    if batch_size is not None and (not isinstance(batch_size, int | np.integer) or batch_size < 1):
        raise UserError(f"generate: batch_size={batch_size!r} must be an integer of at least 1, or None")
    answer = partial(_generate, model, batch_size, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed)
    if not isinstance(prompts, Tokenizer):
        if callable(prompts):  # a tokenizer of transformers
            raise UserError(
                f"generate: {type(prompts).__name__} is not a peftjax tokenizer; use peftjax.load_tokenizer(DIR)"
            )
        given = list(prompts) if isinstance(prompts, Iterable) else [prompts]
        if texts is not None or chat or any(isinstance(prompt, str) for prompt in given):
            raise UserError(
                "generate: texts need a tokenizer: generate(model, tokenizer, texts), where tokenizer comes from "
                "peftjax.load_tokenizer"
            )
        found = [ids for ids in map(_ids, given) if ids is not None]
        if len(found) < len(given):
            raise UserError("generate: prompts must be a list of token ids for each prompt, such as [[1, 2, 3]]")
        return answer(found, stop=ends)
    if texts is None:
        raise UserError("generate: no prompt is given; use generate(model, tokenizer, text)")
    tokenizer = prompts
    one = isinstance(texts, str | Mapping) or _is_conversation(texts) or not isinstance(texts, Iterable)
    several: list[Any] = [texts] if one else list(texts)
    if unsuitable := [text for text in several if not (isinstance(text, str) or _is_conversation(text))]:
        raise UserError(
            f"generate: a prompt must be a string, or with chat=True a list of messages, not {unsuitable[0]!r:.80}; give one, or "
            "a list of them"
        )
    if not chat and not all(isinstance(text, str) for text in several):
        raise UserError("generate: messages are rendered with the chat template; set chat=True")
    tokens = [_encode(text, tokenizer, chat) for text in several]
    rows = model.embedding_rows if isinstance(model, Model) else None
    for text, ids in zip(several, tokens, strict=True):
        check_token_rows(ids, rows, tokenizer, f"prompt {str(text)[:60]!r}")
    answers = [tokenizer.decode(ids) for ids in answer(tokens, stop=[*tokenizer.stop_ids(chat), *ends])]
    return answers[0] if one else answers


def _generate(model: nnx.Module, batch_size: int | None, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """The answers to all prompts."""
    size = min(batch_size or len(prompts), len(prompts))
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)] if prompts else [prompts]
    return [answer for answers in generate_batches(model, batches, size, **options) for answer in answers]


def _is_conversation(prompt: object) -> TypeGuard[Conversation]:
    messages = prompt.get("messages") if isinstance(prompt, Mapping) else prompt
    return (
        isinstance(messages, list | tuple)
        and bool(messages)
        and all(isinstance(message, Mapping) and "role" in message for message in messages)
    )


def _encode(prompt: str | Conversation, tokenizer: Tokenizer, chat: bool) -> list[int]:
    """The tokens of a prompt that generation continues."""
    if isinstance(prompt, str):
        return tokenizer.encode_prompt(prompt, chat)
    record = prompt if isinstance(prompt, Mapping) else {"messages": prompt}
    return encode_conversation(record, tokenizer, f"generate: the prompt {prompt!r:.60}")


def _ids(values: object) -> list[int] | None:
    """Token ids as a list; None if the values are something else."""
    try:
        array = np.asarray(list(values) if isinstance(values, Set | Iterator) else values)
    except ValueError:  # lists of several lengths
        return None
    ids: list[int] | None = array.tolist() if array.ndim == 1 and (array.dtype.kind in "iu" or not array.size) else None
    return ids
