"""Losses as sums over tokens or examples: they add up over chunks, microbatches and devices.

The functions do not change the model's mode. `peftjax.losses` has means instead, for your own training loop.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from peftjax import sharding
from peftjax.core.errors import UserError

Batch = Mapping[str, jax.Array]


class DecoderLike(Protocol):
    """A model that predicts the next token; peftjax.models.decoder has the families."""

    def hidden(
        self, tokens: jax.Array, *, positions: jax.Array | None = None, segments: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """States after the last norm, [B, T, D], and a cache."""

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, c, D] -> [B, c, V]."""


class MixtureDecoderLike(DecoderLike, Protocol):
    """A decoder with routers; peftjax.models.moe has the families."""

    def hidden_and_balance(
        self,
        tokens: jax.Array,
        counted: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """States after the last norm, [B, T, D], and the load-balancing loss of the tokens `counted`."""


class EncoderDecoderLike(Protocol):
    """A model that predicts a target's next token from a source text, such as T5."""

    def hidden(self, tokens: jax.Array, *, mask: jax.Array | None = None, decoder_tokens: jax.Array) -> jax.Array:
        """The decoder's states after the last norm, [B, T, D]."""

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, c, D] -> [B, c, V]."""


class Totals(NamedTuple):
    """Sums over tokens or labeled examples, float32 []. They add up over chunks and microbatches.

    Attributes:
        loss: The sum of weight * loss. loss / tokens is the mean loss.
        tokens: The sum of the weights.
        correct: The sum of the weights where the target has the largest logit; 0 for regression and multi-label tasks.
        balance: The load-balancing loss times its coefficient and `tokens`, which training minimizes too. None if it is off.
    """

    loss: jax.Array
    tokens: jax.Array
    correct: jax.Array
    balance: jax.Array | None = None


def chunked_cross_entropy(
    logits_fn: Callable[[jax.Array], jax.Array], hidden: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> Totals:
    """sum_bt weights[b, t] * (logsumexp_v logits[b, t, v] - logits[b, t, targets[b, t]]), without storing all logits.

    The head is applied to `chunk` positions of every sequence at a time, and once more in the backward pass. The largest
    array of either pass is the float32 logits of one chunk, [B, chunk, V]. Cutting along T keeps the sharding of the
    batch dimension. An incomplete last chunk is padded with weight 0. If `chunk >= T`, there is one chunk, no loop and
    no recomputation. Chen et al. 2016 (arXiv:1604.06174), section 4, applied to the head alone.

    Args:
        logits_fn: [B, c, D] -> [B, c, V], in any dtype; the softmax is float32. It may close over parameters, which then
            get gradients.
        hidden: [B, T, D].
        targets: int [B, T]. Ignored where the weight is 0. With any other weight, a target outside [0, V) makes the loss
            NaN, because a loss that skipped it would look healthy.
        weights: [B, T], 0 where there is no loss.
        chunk: Positions of each sequence whose logits exist at one time.

    Raises:
        UserError: `chunk` is less than 1.
    """
    if chunk < 1:
        raise UserError(f"chunk={chunk}: the loss cannot be computed over {chunk} positions at a time; use at least 1")
    weights = weights.astype(jnp.float32)
    length = targets.shape[1]
    if chunk >= length:
        return _totals(logits_fn(hidden), targets, weights)

    # Where the length is sharded, every chunk takes the same number of positions from each shard, so that all devices
    # take part in it.
    parts = sharding.shard_count("length", length)
    own, step = length // parts, -(-chunk // parts)
    chunks = -(-own // step)

    def cut(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [chunks, B, chunk, ...]
        rows, rest = x.shape[0], x.shape[2:]
        x = x.reshape(rows, parts, own, *rest)
        x = jnp.pad(x, [(0, 0), (0, 0), (0, chunks * step - own)] + [(0, 0)] * len(rest))
        x = jnp.moveaxis(x.reshape(rows, parts, chunks, step, *rest), 2, 0)
        return x.reshape(chunks, rows, parts * step, *rest)

    @partial(jax.checkpoint, prevent_cse=False)  # inside a scan, XLA cannot merge the two passes anyway
    def add_chunk(sums: Totals, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Totals, None]:
        hidden, targets, weights = part
        hidden = sharding.constrain(hidden, "batch", "length", None)
        return jax.tree.map(jnp.add, sums, _totals(logits_fn(hidden), targets, weights)), None

    zero = jnp.zeros((), jnp.float32)
    sums, _ = jax.lax.scan(add_chunk, Totals(zero, zero, zero), (cut(hidden), cut(targets), cut(weights)))
    return sums


def next_token_loss(model: DecoderLike, batch: Batch, chunk: int) -> Totals:
    """Summed cross entropy of a decoder on a batch as `next_token` takes it.

    Padding is on the right, so that without packing causal attention needs no mask.
    """
    inputs = {name: batch[name] for name in ("positions", "segments") if name in batch}
    hidden, _ = model.hidden(batch["tokens"], **inputs)
    return chunked_cross_entropy(model.logits, hidden, batch["targets"], batch["loss_weights"], chunk)


def balanced_next_token_loss(
    model: MixtureDecoderLike, batch: Batch, counted: jax.Array, chunk: int, coefficient: float
) -> Totals:
    """`next_token_loss`, and the load-balancing loss of the tokens `counted`, bool [B, T]."""
    inputs = {name: batch[name] for name in ("positions", "segments") if name in batch}
    hidden, balance = model.hidden_and_balance(batch["tokens"], counted, **inputs)
    totals = chunked_cross_entropy(model.logits, hidden, batch["targets"], batch["loss_weights"], chunk)
    return totals._replace(balance=coefficient * balance * totals.tokens)


def seq2seq_loss(model: EncoderDecoderLike, batch: Batch, chunk: int) -> Totals:
    """Summed cross entropy of an encoder-decoder on a batch as `seq2seq` takes it."""
    hidden = model.hidden(batch["tokens"], mask=batch["mask"], decoder_tokens=batch["decoder_tokens"])
    return chunked_cross_entropy(model.logits, hidden, batch["targets"], batch["loss_weights"], chunk)


def classification_loss(logits: jax.Array, batch: Batch) -> Totals:
    """Summed cross entropy of logits [B, C] or [B, T, C] with the batch's labels and loss_weights, [B] or [B, T]."""
    labels, weights = batch["labels"], batch["loss_weights"]
    if labels.ndim == 1:
        logits, labels, weights = logits[:, None], labels[:, None], weights[:, None]
    return _totals(logits, labels, weights)


def multi_label_loss(logits: jax.Array, batch: Batch) -> Totals:
    """Summed binary cross entropy of logits [B, C] with labels [B, C], 0 or 1; the mean over classes, as in transformers.

    softplus(logit) - label * logit. Its gradients differ from optax.sigmoid_binary_cross_entropy's in the last bit.
    """
    logits, labels, weights = logits.astype(jnp.float32), batch["labels"], batch["loss_weights"]
    each = jnp.mean(jax.nn.softplus(logits) - labels * logits, axis=-1)
    return Totals(jnp.sum(weights * each), jnp.sum(weights), jnp.zeros((), jnp.float32))


def regression_loss(logits: jax.Array, batch: Batch) -> Totals:
    """Summed squared error of logits [B, 1] with labels, float32 [B]."""
    squares = optax.squared_error(logits.astype(jnp.float32)[:, 0], batch["labels"])
    return Totals(jnp.sum(batch["loss_weights"] * squares), jnp.sum(batch["loss_weights"]), jnp.zeros((), jnp.float32))


def _totals(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> Totals:
    """Totals of logits [B, c, V] for targets and weights [B, c]."""
    logits = logits.astype(jnp.float32)
    vocab = logits.shape[-1]
    targets = jnp.where(weights == 0, 0, targets).astype(
        jnp.int32
    )  # uint8 does not hold all ids of a larger vocabulary
    # Compare with every id rather than gather: the gradient is then a select instead of a scatter, and both stay local
    # to each device's shard of the vocabulary.
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2)
    at_target = ids == targets[..., None]  # [B, c, V]
    target_logits = jnp.sum(jnp.where(at_target, logits, 0.0), axis=-1)
    target_logits = jnp.where((targets >= 0) & (targets < vocab), target_logits, jnp.nan)
    losses = jax.nn.logsumexp(logits, axis=-1) - target_logits
    hits = jnp.argmax(logits, axis=-1) == targets
    return Totals(jnp.sum(weights * losses), jnp.sum(weights), jnp.sum(weights * hits))
