"""What each kind of task minimises: cross entropy over a large vocabulary, a chunk of the sequence at a time, and losses
of labelled examples."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peftjax import sharding


class Totals(NamedTuple):
    """Sums over tokens, or over labelled examples, float32 scalars: they add up over chunks and microbatches, and
    loss / tokens is the mean."""

    loss: jax.Array  # sum of weight * loss
    tokens: jax.Array  # sum of weight
    correct: jax.Array  # sum of weight where the target has the largest logit; 0 for numbers and for several classes


Loss = Callable[[Any, Mapping[str, jax.Array]], Totals]  # of a model on a batch, summed over its tokens or examples


def chunked_cross_entropy(
    logits_fn: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int,
) -> Totals:
    """sum_bt weights[b, t] * (logsumexp_v logits[b, t, v] - logits[b, t, targets[b, t]]), never holding all logits.

    hidden: [B, T, D]; targets: [B, T] int; weights: [B, T], 0 where there is no loss; `logits_fn`: [B, c, D] ->
    [B, c, V], which may close over parameters that get gradients. The head is applied to `chunk` positions of every
    sequence at a time and again in the backward pass, so the largest array of either pass is one chunk's float32
    logits, [B, chunk, V]. Cutting along T leaves the batch dimension sharded as it is. A last chunk that is not full
    is padded with weight 0; `chunk >= T` is one chunk, without a loop and without computing anything twice.

    Logits may have any dtype; the softmax is float32. A target is not looked at where the weight is 0; outside [0, V)
    under any other weight it makes the loss NaN, because a loss that ignored it would look healthy.

    Raises ValueError if `chunk` is less than 1. Recomputing instead of storing: Chen et al. 2016 (arXiv:1604.06174),
    section 4, applied to the head alone.
    """
    if chunk < 1:
        raise ValueError(f"The loss is computed over {chunk} positions at a time (loss_chunk); give 1 or more.")
    weights = weights.astype(jnp.float32)
    length = targets.shape[1]
    if chunk >= length:
        return _totals(logits_fn(hidden), targets, weights)

    # Of each part of the length that lies on other devices a chunk takes as much, so that all of them are busy with it.
    parts = sharding.parts("length", length)
    own, step = length // parts, -(-chunk // parts)
    chunks = -(-own // step)

    def cut(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [chunks, B, chunk, ...]
        rows, rest = x.shape[0], x.shape[2:]
        x = x.reshape(rows, parts, own, *rest)
        x = jnp.pad(x, [(0, 0), (0, 0), (0, chunks * step - own)] + [(0, 0)] * len(rest))
        x = jnp.moveaxis(x.reshape(rows, parts, chunks, step, *rest), 2, 0)
        return x.reshape(chunks, rows, parts * step, *rest)

    @partial(jax.checkpoint, prevent_cse=False)  # a scan keeps the two passes apart by itself
    def add_chunk(sums: Totals, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Totals, None]:
        hidden, targets, weights = part
        hidden = sharding.constrain(hidden, "batch", "length", None)
        return jax.tree.map(jnp.add, sums, _totals(logits_fn(hidden), targets, weights)), None

    zero = jnp.zeros((), jnp.float32)
    sums, _ = jax.lax.scan(add_chunk, Totals(zero, zero, zero), (cut(hidden), cut(targets), cut(weights)))
    return sums


def next_token_loss(model: Any, batch: Mapping[str, jax.Array], chunk: int) -> Totals:
    """The cross entropy of a decoder on a batch: tokens, targets, loss_weights [B, T], and when documents are packed
    also positions and segments. Padding stands on the right, so without packing causal attention needs no mask."""
    inputs = {name: batch[name] for name in ("positions", "segments") if name in batch}
    hidden, _ = model.hidden(batch["tokens"], **inputs)
    return chunked_cross_entropy(model.logits, hidden, batch["targets"], batch["loss_weights"], chunk)


def seq2seq_loss(model: Any, batch: Mapping[str, jax.Array], chunk: int) -> Totals:
    """The cross entropy of an encoder-decoder on a batch: tokens and mask [B, S]; decoder_tokens, targets, loss_weights
    [B, T]. The target's padding stands on its right."""
    hidden = model.hidden(batch["tokens"], mask=batch["mask"], decoder_tokens=batch["decoder_tokens"])
    return chunked_cross_entropy(model.logits, hidden, batch["targets"], batch["loss_weights"], chunk)


def outputs(model: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The logits of a model's head on a batch of labelled examples: pixels, or tokens, mask and token_types."""
    if "pixels" in batch:
        return model(batch["pixels"])
    return model(batch["tokens"], mask=batch["mask"], token_types=batch["token_types"])


def classification_loss(logits: jax.Array, batch: Mapping[str, jax.Array]) -> Totals:
    """The cross entropy of `outputs` with labels and loss_weights, of examples [B] or of their tokens [B, T]."""
    labels, weights = batch["labels"], batch["loss_weights"]
    if labels.ndim == 1:
        logits, labels, weights = logits[:, None], labels[:, None], weights[:, None]
    return _totals(logits, labels, weights)


def multi_label_loss(logits: jax.Array, batch: Mapping[str, jax.Array]) -> Totals:
    """The binary cross entropy of each class, its mean over the classes, as transformers has it. labels: [B, C], 0 or 1."""
    logits, labels, weights = logits.astype(jnp.float32), batch["labels"], batch["loss_weights"]
    each = jnp.mean(jax.nn.softplus(logits) - labels * logits, axis=-1)
    return Totals(jnp.sum(weights * each), jnp.sum(weights), jnp.zeros((), jnp.float32))


def regression_loss(logits: jax.Array, batch: Mapping[str, jax.Array]) -> Totals:
    """(output - label)^2. labels: float32 [B]."""
    numbers, weights = logits.astype(jnp.float32)[:, 0], batch["loss_weights"]
    squares = jnp.square(numbers - batch["labels"])
    return Totals(jnp.sum(weights * squares), jnp.sum(weights), jnp.zeros((), jnp.float32))


def _totals(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> Totals:
    """Totals of logits [B, c, V] for targets and weights [B, c]."""
    logits = logits.astype(jnp.float32)
    vocab = logits.shape[-1]
    targets = jnp.where(weights == 0, 0, targets)
    # A comparison with every id instead of a gather: its gradient is a select instead of a scatter, and both stay
    # local to each device's share of a sharded vocabulary.
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2)
    at_target = ids == targets[..., None]  # [B, c, V]
    target_logits = jnp.sum(jnp.where(at_target, logits, 0.0), axis=-1)
    target_logits = jnp.where((targets >= 0) & (targets < vocab), target_logits, jnp.nan)
    losses = jax.nn.logsumexp(logits, axis=-1) - target_logits
    hits = jnp.argmax(logits, axis=-1) == targets
    return Totals(jnp.sum(weights * losses), jnp.sum(weights), jnp.sum(weights * hits))
