"""`peftjax.generate`: texts from texts, or token ids from token ids."""

from collections.abc import Iterable, Iterator, Sequence, Set
from typing import overload

import numpy as np
from flax import nnx

from peftjax.core.errors import UserError
from peftjax.data.token_rows import check_token_rows
from peftjax.data.tokenizer import Tokenizer
from peftjax.decoding import generate_ids
from peftjax.models.base import Model
from peftjax.sampling import GREEDY, Sampling


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
) -> list[list[int]]: ...
@overload
def generate(
    model: nnx.Module,
    tokenizer: Tokenizer,
    text: str,
    /,
    *,
    chat: bool = ...,
    max_new_tokens: int = ...,
    stop: Sequence[int] = ...,
    sampling: Sampling = ...,
    seed: int = ...,
) -> str: ...
@overload
def generate(
    model: nnx.Module,
    tokenizer: Tokenizer,
    texts: list[str] | tuple[str, ...],
    /,
    *,
    chat: bool = ...,
    max_new_tokens: int = ...,
    stop: Sequence[int] = ...,
    sampling: Sampling = ...,
    seed: int = ...,
) -> list[str]: ...
def generate(
    model: nnx.Module,
    prompts: Sequence[Sequence[int]] | Tokenizer,
    texts: str | list[str] | tuple[str, ...] | None = None,
    /,
    *,
    chat: bool = False,
    max_new_tokens: int = 64,
    stop: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> list[list[int]] | str | list[str]:
    """Generate a continuation of each prompt, or an answer to it, with the active adapters.

    `generate(model, tokenizer, "text")` returns a text, and a list of texts for a list of texts.
    `generate(model, [[1, 2, 3]])` returns token ids. All prompts run in one batch. They are padded on the left, so
    that prompts of similar length share one compiled function. It is compiled again for another number of prompts, another
    `max_new_tokens` or another `top_k`, but not for another temperature or `top_p`.

    Args:
        model: A decoder or an encoder-decoder, as `peftjax.load_model` returns, or what `peftjax.rows` returns for a decoder.
        prompts: Token ids, at least one per prompt; or the tokenizer of the texts.
        texts: One prompt, or several.
        chat: Whether each text is a user message, to be rendered with the chat template.
        max_new_tokens: Maximum number of new tokens per prompt.
        stop: Token ids that end an answer. With a tokenizer, its `stop_ids` are added: the eos tokens of
            generation_config.json, and in a chat also the end-of-turn token of the chat template.
        sampling: How the next token is chosen; by default the most likely one.
        seed: Random seed for sampling.

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
    if not isinstance(prompts, Tokenizer):
        if callable(prompts):  # a tokenizer of transformers
            raise UserError(
                f"generate: {type(prompts).__name__} is not a tokenizer of peftjax; use peftjax.load_tokenizer(DIR)"
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
        return generate_ids(model, found, max_new_tokens=max_new_tokens, stop=ends, sampling=sampling, seed=seed)
    if texts is None:
        raise UserError("generate: no prompt is given; use generate(model, tokenizer, text)")
    tokenizer = prompts
    several = [texts] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
    if unsuitable := [text for text in several if not isinstance(text, str)]:
        raise UserError(f"generate: a prompt must be a string, not {unsuitable[0]!r:.80}; give one, or a list of them")
    tokens = [tokenizer.encode_prompt(text, chat) for text in several]
    rows = model.embedding_rows if isinstance(model, Model) else None
    for text, ids in zip(several, tokens, strict=True):
        check_token_rows(ids, rows, tokenizer, f"prompt {text[:60]!r}")
    ends = [*tokenizer.stop_ids(chat), *ends]
    out = generate_ids(model, tokens, max_new_tokens=max_new_tokens, stop=ends, sampling=sampling, seed=seed)
    answers = [tokenizer.decode(ids) for ids in out]
    return answers[0] if isinstance(texts, str) else answers


def _ids(values: object) -> list[int] | None:
    """Token ids as a list; None if the values are something else."""
    try:
        array = np.asarray(list(values) if isinstance(values, Set | Iterator) else values)
    except ValueError:  # lists of several lengths
        return None
    ids: list[int] | None = array.tolist() if array.ndim == 1 and (array.dtype.kind in "iu" or not array.size) else None
    return ids
