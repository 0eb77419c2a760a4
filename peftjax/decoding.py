"""Batched generation of tokens in one compiled function, with a key/value cache."""

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax import sharding
from peftjax.adapters import active_view
from peftjax.adapters.mixed_batch import Rows
from peftjax.core import host_arrays, variables
from peftjax.core.errors import NotFiniteError, UserError
from peftjax.core.one_cpu import compiler_options
from peftjax.models.base import LanguageModel, LanguageModelConfig
from peftjax.nn.dropout import remove_dropout
from peftjax.sampling import GREEDY, Sampling, draw


class Answers(NamedTuple):
    """The answers to a batch of prompts.

    Attributes:
        tokens: New tokens, int32 [B, max_new].
        lengths: The number of them before the stop token, int32 [B].
        failed: bool [B], whether the logits after these are NaN or infinite.
        done: bool [B], whether a row has ended.
    """

    tokens: jax.Array
    lengths: jax.Array
    failed: jax.Array
    done: jax.Array


def generate_ids(
    model: nnx.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> list[list[int]]:
    """Generate up to `max_new_tokens` tokens for each prompt in one batch, with the active adapters.

    A decoder continues the prompt; an encoder-decoder encodes the prompt and generates a target. Prompts are padded on the left
    to a multiple of 32 tokens, or beyond 512 tokens to a coarser multiple that adds at most an eighth.

    Args:
        model: A decoder or an encoder-decoder, as `peftjax.load_model` returns, or what `peftjax.rows` returns for a decoder.
        prompts: Token ids, at least one per prompt.
        max_new_tokens: Maximum number of new tokens per prompt.
        stop: Token ids that end a text, such as `tokenizer.eos_ids`. Ids without a row in the embedding, such as -1, are never
            generated and have no effect.
        sampling: How the next token is chosen; by default the most likely one.
        seed: Random seed for sampling.

    Returns:
        The new token ids of each prompt, without the stop token.

    Raises:
        UserError: max_new_tokens is less than 1, a prompt is empty or holds a token without a row in the embedding, the model
            does not generate text, a prompt and the new tokens exceed its positions, or the seed is not an integer of 64 bits.
        NotFiniteError: The logits are NaN or infinite.
    """
    arguments = _arguments(model, prompts, max_new_tokens, stop)
    try:
        seed = operator.index(seed)
    except TypeError:
        raise UserError(f"generate: seed={seed!r} must be an integer") from None
    if not -(2**63) <= seed < 2**63:
        raise UserError(f"generate: seed={seed} has more than 64 bits; use a smaller number")
    view = active_view(model)
    remove_dropout(view)
    graph, state = nnx.split(view)
    decode = _compiled(_decode, frozenset(jax.tree.leaves(state)[0].sharding.device_set))
    chosen = {"sampling": sampling.traced, "top_k": sampling.kept}
    answers = decode(graph, state, *arguments, jax.random.key(seed), **chosen, max_new=max_new_tokens)
    return _token_ids(jax.tree.map(host_arrays.whole, answers))


def generate_batches(
    model: nnx.Module, batches: Iterable[list[list[int]]], size: int, *, seed: int = 0, **options: Any
) -> Iterator[list[list[int]]]:
    """`generate_ids` for each batch of prompts when its answers are needed.

    Each further batch takes the next seed. In a batch of less than `size` prompts, the last one is repeated, so that all batches
    have one shape.
    """
    for number, prompts in enumerate(batches):
        filled = prompts + prompts[-1:] * (size - len(prompts))
        yield generate_ids(model, filled, seed=seed + number if number else seed, **options)[: len(prompts)]


def generate_each(
    model: nnx.Module,
    own: Sequence[variables.FlatTree],
    shared: variables.FlatTree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[int] = (),
) -> list[list[list[int]] | NotFiniteError]:
    """Generate greedily with several models that differ in some leaves, in one program.

    Each model answers as in `generate_ids`. Every model gets all prompts.

    Args:
        model: One of the models, in evaluation mode.
        own: For each model, the leaves that are not in `shared`, of the same shapes in all models; see `variables.filled`.
        shared: The leaves that all models share, such as the base, which is read and dequantized once.
        prompts, max_new_tokens, stop: As in `generate_ids`.

    Returns:
        For each model, the new token ids of each prompt, or the error if its logits are NaN or infinite.

    Raises:
        UserError: As in `generate_ids`.
    """
    arguments = _arguments(model, prompts, max_new_tokens, stop)
    decode = _compiled(_decode_each, frozenset(jax.tree.leaves(own)[0].sharding.device_set))
    graph, key = variables.flat(model)[0], jax.random.key(0)
    answers = decode(graph, own, shared, *arguments, key, sampling={}, top_k=0, max_new=max_new_tokens)
    answers = jax.tree.map(host_arrays.whole, answers)
    found: list[list[list[int]] | NotFiniteError] = []
    for index in range(len(own)):
        try:
            found.append(_token_ids(jax.tree.map(lambda leaf, index=index: leaf[index], answers)))
        except NotFiniteError as error:
            found.append(error)
    return found


def check_positions(model: LanguageModel | Rows, length: int, max_new_tokens: int, name: str) -> None:
    """Check that a prompt of `length` tokens, which messages call `name`, and the new tokens fit the positions of the model.

    Raises:
        UserError: They do not.
    """
    if length + max_new_tokens > model.config.max_positions - model.virtual:
        virtual = f" less its {model.virtual} virtual tokens" if model.virtual else ""
        raise UserError(
            f"{name}: a prompt of {length} tokens and {max_new_tokens} new tokens exceed the model's "
            f"{model.config.max_positions} positions{virtual}; shorten the prompt or lower max_new_tokens"
        )


def _arguments(
    model: nnx.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The prompts as tokens and mask [B, W], padded on the left, and whether each token ends a text, bool [V]."""
    # The config distinguishes rows of a decoder from rows of an encoder.
    if not isinstance(model, LanguageModel | Rows) or not isinstance(model.config, LanguageModelConfig):
        raise UserError(
            f"generate: a {type(model).__name__} does not generate text; use a decoder or an encoder-decoder"
        )
    if not prompts or not all(prompts):
        raise UserError(
            "generate: every prompt needs at least one token; use the tokenizer's bos token for an empty prompt"
        )
    if not isinstance(max_new_tokens, int | np.integer):
        raise UserError(f"generate: max_new_tokens={max_new_tokens!r} must be an integer")
    if max_new_tokens < 1:
        raise UserError(f"generate: max_new_tokens={max_new_tokens} generates nothing; use 1 or more")
    longest = max(map(len, prompts))
    check_positions(model, longest, max_new_tokens, "generate")
    vocab = model.config.vocab
    for row, prompt in enumerate(prompts):
        if beyond := [token for token in prompt if not 0 <= token < vocab]:
            raise UserError(
                f"generate: prompts[{row}] holds the token id {beyond[0]}, but the embedding has {vocab} rows; if the token was "
                "added to the tokenizer, load the model with resize_embeddings=tokenizer.vocab_size"
            )
    width = min(_padded(longest), model.config.max_positions - model.virtual - max_new_tokens)
    tokens = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, True
    ends = np.zeros(vocab, bool)
    ends[[token for token in stop if 0 <= token < vocab]] = True
    return tokens, mask, ends


def _token_ids(answers: Answers) -> list[list[int]]:
    """The new token ids of each row, without the stop token."""
    if answers.failed.any():
        row = int(np.argmax(answers.failed))
        raise NotFiniteError(
            f"generate: the logits after {answers.lengths[row]} new tokens of prompts[{row}] are NaN or Inf; the adapter may "
            'have diverged in training, or the dtype is too narrow: try dtype="float32"'
        )
    return [row[:length].tolist() for row, length in zip(answers.tokens, answers.lengths, strict=True)]


def _padded(length: int) -> int:
    """The length to which a batch of prompts is padded: a multiple of 32, or one of 8 lengths between two powers of two."""
    step = max(32, 2 ** ((length - 1).bit_length() - 4))
    return -(-length // step) * step


@functools.cache
def _compiled(decode: Callable[..., Answers], devices: frozenset[jax.Device]) -> jax.stages.Wrapped:
    """The jitted `_decode` or `_decode_each` for models on these devices."""
    options = compiler_options(devices)
    return jax.jit(decode, static_argnames=("graph", "top_k", "max_new"), compiler_options=options)


def _decode_each(
    graph: nnx.GraphDef,
    own: Sequence[variables.FlatTree],
    shared: variables.FlatTree,
    *arguments: jax.Array,
    sampling: Mapping[str, jax.Array | float],
    top_k: int,
    max_new: int,
) -> Answers:
    """`_decode` of each model; the leaves of the result have a leading axis of models."""

    def decode(own: variables.FlatTree) -> Answers:
        state = nnx.state(variables.join(graph, own, shared))
        return _decode(graph, state, *arguments, sampling=sampling, top_k=top_k, max_new=max_new, axis="models")

    over_models = jax.vmap(decode, axis_name="models", spmd_axis_name=sharding.members_axis(len(own)))
    return over_models(variables.stack(own))


def _decode(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: jax.Array,
    mask: jax.Array,
    ends: jax.Array,
    key: jax.Array,
    *,
    sampling: Mapping[str, jax.Array | float],
    top_k: int,
    max_new: int,
    axis: str | None = None,
) -> Answers:
    """Generate from tokens and mask [B, W], padded on the left.

    Args:
        ends: bool [V], true for stop tokens.
        sampling: `Sampling.traced`.
        top_k: `Sampling.kept`.
        axis: The axis of `jax.vmap` that all models of a population are on. The loop ends for all at once: if each ended
            alone, every step would select between the old and the new cache, which copies it.
    """
    model: LanguageModel | Rows = nnx.merge(graph, state)
    batch = len(tokens)
    hidden, cache, read = model.read_prompts(tokens, mask, max_new)

    def choose(index: jax.Array | int, hidden: jax.Array, answers: Answers) -> Answers:
        """Choose new token number `index` from the hidden states [B, T, D] of the tokens before it."""
        logits = model.logits(hidden[:, -1:])[:, 0]  # [B, V]
        token = draw(logits, jax.random.fold_in(key, index), top_k, **sampling).astype(jnp.int32)
        failed = answers.failed | ~(answers.done | jnp.isfinite(jnp.max(logits, axis=-1)))
        done = answers.done | failed | ends[token]
        lengths = jnp.where(done, answers.lengths, index + 1)
        return Answers(answers.tokens.at[:, index].set(token), lengths, failed, done)

    def unfinished(carry: tuple[jax.Array, Answers, Any]) -> jax.Array:
        count, answers, _ = carry
        going = jnp.any(~answers.done)
        return (count < max_new) & (going if axis is None else jax.lax.pmax(going, axis))

    def step(carry: tuple[jax.Array, Answers, Any]) -> tuple[jax.Array, Answers, Any]:
        count, answers, cache = carry
        last = jax.lax.dynamic_slice_in_dim(answers.tokens, count - 1, 1, axis=1)
        hidden, cache = read(last, count - 1, cache)
        return count + 1, choose(count, hidden, answers), cache

    none, no = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), bool)
    answers = choose(0, hidden, Answers(jnp.zeros((batch, max_new), jnp.int32), none, no, no))
    _, answers, _ = jax.lax.while_loop(unfinished, step, (jnp.int32(1), answers, cache))
    return answers
