"""Losses: scalar means for a training loop of your own, and the sums that the framework's train step accumulates.

`next_token`, `seq2seq`, `classification`, `token_classification`, `multi_label`, `regression` and `image_classification`
take a model and a batch and return the mean loss. They share two arguments:

    train: Whether dropout is active, that of the adapters and that of the base model. True for training; False for
        evaluation. The model itself keeps its mode and its keys.
    key: A JAX random key for dropout. By default it is derived from the batch and the trainable parameters, so that the
        masks change from step to step and a run is reproducible; see `training_view`.

Two methods need more than a loss. AdaLoRA minimizes the mean loss plus `method.penalty(model)`, which is None for all
other methods and is not included here. It also prunes ranks during training, which `method.optimizer(tx, leaves)` adds to
an optimizer; that optimizer works on dicts from path to array, as `peftjax.core.variables.split` returns them.

The functions that end in `_loss` return `Totals`, sums that add up over microbatches and devices. They leave the model's
mode alone.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax

from peftjax import sharding
from peftjax.core.errors import UserError
from peftjax.nn.dropout import evaluation_view, training_view

__all__ = [
    "classification",
    "image_classification",
    "multi_label",
    "next_token",
    "regression",
    "seq2seq",
    "token_classification",
    "training_view",
]

Batch = Mapping[str, jax.Array]
AnyModel = TypeVar("AnyModel")


class Decoder(Protocol):
    """A model that predicts the next token; peftjax.models.decoder has the families."""

    def hidden(
        self, tokens: jax.Array, *, positions: jax.Array | None = None, segments: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """States after the last norm, [B, T, D], and a cache."""

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, c, D] -> [B, c, V]."""


class EncoderDecoder(Protocol):
    """A model that predicts a target's next token from a source text, such as T5."""

    def hidden(self, tokens: jax.Array, *, mask: jax.Array | None = None, decoder_tokens: jax.Array) -> jax.Array:
        """The decoder's states after the last norm, [B, T, D]."""

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, c, D] -> [B, c, V]."""


class TextClassifier(Protocol):
    """An encoder with a head, such as BERT."""

    def __call__(
        self, tokens: jax.Array, *, mask: jax.Array | None = None, token_types: jax.Array | None = None
    ) -> jax.Array:
        """Logits [B, C], or [B, T, C] for token classification."""


class ImageClassifier(Protocol):
    """A vision model with a head, such as ViT."""

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Logits [B, C]."""


# --- Scalar means, for a training loop of your own ---


def next_token(
    model: Decoder, batch: Batch, *, key: jax.Array | None = None, train: bool = True, chunk: int = 128
) -> jax.Array:
    """Mean cross entropy of a decoder's next-token predictions, float32 [].

    sum_bt weights[b, t] * -log p(targets[b, t] | tokens[b, :t + 1]) / sum_bt weights[b, t].

    Args:
        model: A decoder.
        batch: tokens and targets, int [B, T]; loss_weights [B, T], 0 where there is no loss (such as in a prompt or in
            padding, which must be on the right). For packed documents also positions and segments, int [B, T].
        key: A JAX random key for dropout; by default it is derived from the batch and the trainable parameters.
        train: Whether dropout is active.
        chunk: Positions of each sequence whose logits exist at one time.

    Raises:
        UserError: The batch lacks an array, or `chunk` is less than 1.

    Example:
        >>> import jax, jax.numpy as jnp, peftjax
        >>> from peftjax import losses
        >>> model = peftjax.load_model("embedded")
        >>> tokens = jnp.array([[5, 6, 7, 8]])
        >>> batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": jnp.ones((1, 3))}
        >>> loss = jax.jit(lambda batch: losses.next_token(model, batch))(batch)
        >>> loss.shape, loss.dtype
        ((), dtype('float32'))
    """
    _require("next_token", batch, "tokens", "targets", "loss_weights")
    return _mean(next_token_loss(_view(model, batch, key, train), batch, chunk))


def seq2seq(
    model: EncoderDecoder, batch: Batch, *, key: jax.Array | None = None, train: bool = True, chunk: int = 128
) -> jax.Array:
    """Mean cross entropy of an encoder-decoder's target tokens, float32 [].

    Args:
        model: An encoder-decoder.
        batch: tokens, int [B, S], and mask, bool [B, S], true for real tokens; decoder_tokens and targets, int [B, T], and
            loss_weights [B, T], 0 in the target's padding, which must be on the right.
        key: A JAX random key for dropout; by default it is derived from the batch and the trainable parameters.
        train: Whether dropout is active.
        chunk: Positions of each target whose logits exist at one time.

    Raises:
        UserError: The batch lacks an array, or `chunk` is less than 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from peftjax import losses, models
        >>> sizes = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        >>> model = models.from_hf_config({"model_type": "t5", **sizes}).make(nnx.Rngs(0))
        >>> source, target = jnp.array([[5, 6, 1]]), jnp.array([[7, 1]])
        >>> batch = {"tokens": source, "mask": source > 0, "decoder_tokens": jnp.array([[0, 7]])}
        >>> losses.seq2seq(model, batch | {"targets": target, "loss_weights": jnp.ones((1, 2))}).shape
        ()
    """
    _require("seq2seq", batch, "tokens", "mask", "decoder_tokens", "targets", "loss_weights")
    return _mean(seq2seq_loss(_view(model, batch, key, train), batch, chunk))


def classification(
    model: TextClassifier, batch: Batch, *, key: jax.Array | None = None, train: bool = True
) -> jax.Array:
    """Mean cross entropy of a sequence classifier, float32 [].

    Args:
        model: An encoder with a classification head of C classes.
        batch: tokens, int [B, T]; mask, bool [B, T], true for real tokens; optionally token_types, int [B, T]; labels,
            int [B], in [0, C); loss_weights [B].
        key: A JAX random key for dropout; by default it is derived from the batch and the trainable parameters.
        train: Whether dropout is active.

    Raises:
        UserError: The batch lacks an array.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from peftjax import losses
        >>> class Classifier(nnx.Module):
        ...     def __call__(self, tokens, mask=None, token_types=None):
        ...         return jnp.zeros((1, 2))  # logits
        >>> model = Classifier()
        >>> batch = {"tokens": jnp.ones((1, 4), int), "mask": jnp.ones((1, 4), bool), "loss_weights": jnp.ones(1)}
        >>> print(f"{losses.classification(model, batch | {'labels': jnp.array([0])}):.4f}")
        0.6931
    """
    return _mean(classification_loss(_text_logits("classification", model, batch, key, train), batch))


def token_classification(
    model: TextClassifier, batch: Batch, *, key: jax.Array | None = None, train: bool = True
) -> jax.Array:
    """Mean cross entropy of a token classifier, float32 [].

    Args:
        model: An encoder with a classification head of C classes.
        batch: As for `classification`, but labels, int [B, T], in [0, C), and loss_weights [B, T], 0 for tokens without
            a label, such as special tokens.
        key: A JAX random key for dropout; by default it is derived from the batch and the trainable parameters.
        train: Whether dropout is active.

    Raises:
        UserError: The batch lacks an array.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from peftjax import losses
        >>> class Classifier(nnx.Module):
        ...     def __call__(self, tokens, mask=None, token_types=None):
        ...         return jnp.zeros((1, 4, 2))  # logits
        >>> model = Classifier()
        >>> batch = {"tokens": jnp.ones((1, 4), int), "mask": jnp.ones((1, 4), bool), "loss_weights": jnp.ones((1, 4))}
        >>> print(f"{losses.token_classification(model, batch | {'labels': jnp.zeros((1, 4), int)}):.4f}")
        0.6931
    """
    return _mean(classification_loss(_text_logits("token_classification", model, batch, key, train), batch))


def multi_label(model: TextClassifier, batch: Batch, *, key: jax.Array | None = None, train: bool = True) -> jax.Array:
    """Mean binary cross entropy of a sequence classifier with independent classes, float32 [].

    Args:
        model: An encoder with a classification head of C classes.
        batch: As for `classification`, but labels, float [B, C], 0 or 1.
        key: A JAX random key for dropout; by default it is derived from the batch and the trainable parameters.
        train: Whether dropout is active.

    Raises:
        UserError: The batch lacks an array.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from peftjax import losses
        >>> class Classifier(nnx.Module):
        ...     def __call__(self, tokens, mask=None, token_types=None):
        ...         return jnp.zeros((1, 2))  # logits
        >>> model = Classifier()
        >>> batch = {"tokens": jnp.ones((1, 4), int), "mask": jnp.ones((1, 4), bool), "loss_weights": jnp.ones(1)}
        >>> print(f"{losses.multi_label(model, batch | {'labels': jnp.array([[1.0, 1.0]])}):.4f}")
        0.6931
    """
    return _mean(multi_label_loss(_text_logits("multi_label", model, batch, key, train), batch))


def regression(model: TextClassifier, batch: Batch, *, key: jax.Array | None = None, train: bool = True) -> jax.Array:
    """Mean squared error of an encoder with one output, float32 [].

    Args:
        model: An encoder with a classification head of one output.
        batch: As for `classification`, but labels, float32 [B].
        key: A JAX random key for dropout; by default it is derived from the batch and the trainable parameters.
        train: Whether dropout is active.

    Raises:
        UserError: The batch lacks an array.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from peftjax import losses
        >>> class Classifier(nnx.Module):
        ...     def __call__(self, tokens, mask=None, token_types=None):
        ...         return jnp.zeros((1, 1))  # logits
        >>> model = Classifier()
        >>> batch = {"tokens": jnp.ones((1, 4), int), "mask": jnp.ones((1, 4), bool), "loss_weights": jnp.ones(1)}
        >>> print(f"{losses.regression(model, batch | {'labels': jnp.array([3.0])}):.4f}")
        9.0000
    """
    return _mean(regression_loss(_text_logits("regression", model, batch, key, train), batch))


def image_classification(
    model: ImageClassifier, batch: Batch, *, key: jax.Array | None = None, train: bool = True
) -> jax.Array:
    """Mean cross entropy of an image classifier, float32 [].

    Args:
        model: A vision model with a classification head of C classes.
        batch: pixels, float [B, H, W, 3], as the model's preprocessor scales them; labels, int [B], in [0, C);
            loss_weights [B].
        key: A JAX random key for dropout; by default it is derived from the batch and the trainable parameters.
        train: Whether dropout is active.

    Raises:
        UserError: The batch lacks an array.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from peftjax import losses
        >>> class Classifier(nnx.Module):
        ...     def __call__(self, pixels):
        ...         return jnp.zeros((len(pixels), 2))  # logits
        >>> batch = {"pixels": jnp.zeros((1, 8, 8, 3)), "labels": jnp.array([0]), "loss_weights": jnp.ones(1)}
        >>> print(f"{losses.image_classification(Classifier(), batch):.4f}")
        0.6931
    """
    _require("image_classification", batch, "pixels", "labels", "loss_weights")
    logits = _view(model, batch, key, train)(batch["pixels"])
    return _mean(classification_loss(logits, batch))


def _text_logits(loss: str, model: TextClassifier, batch: Batch, key: jax.Array | None, train: bool) -> jax.Array:
    """The logits of an encoder's head."""
    _require(loss, batch, "tokens", "mask", "labels", "loss_weights")
    view = _view(model, batch, key, train)
    return view(batch["tokens"], mask=batch["mask"], token_types=batch.get("token_types"))


def _view(model: AnyModel, batch: Batch, key: jax.Array | None, train: bool) -> AnyModel:
    return training_view(model, batch, key) if train else evaluation_view(model)


def _mean(totals: "Totals") -> jax.Array:
    return totals.loss / totals.tokens


def _require(loss: str, batch: Batch, *names: str) -> None:
    if missing := [name for name in names if name not in batch]:
        raise UserError(
            f"losses.{loss}: the batch has no {missing[0]!r}; it needs {', '.join(names)} and has {', '.join(batch)}"
        )


# --- Sums, for a step that accumulates microbatches ---


class Totals(NamedTuple):
    """Sums over tokens or labeled examples, float32 []. They add up over chunks and microbatches.

    Attributes:
        loss: The sum of weight * loss. loss / tokens is the mean loss.
        tokens: The sum of the weights.
        correct: The sum of the weights where the target has the largest logit; 0 for regression and multi-label tasks.
    """

    loss: jax.Array
    tokens: jax.Array
    correct: jax.Array


Loss = Callable[[Any, Batch], Totals]  # (model, batch) -> sums over the batch's tokens or examples


def chunked_cross_entropy(
    logits_fn: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int,
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
        raise UserError(
            f"loss_chunk={chunk}: the loss cannot be computed over {chunk} positions at a time; use at least 1"
        )
    weights = weights.astype(jnp.float32)
    length = targets.shape[1]
    if chunk >= length:
        return _totals(logits_fn(hidden), targets, weights)

    # Where the length is sharded, every chunk takes the same number of positions from each shard, so that all devices
    # take part in it.
    parts = sharding.parts("length", length)
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


def next_token_loss(model: Decoder, batch: Batch, chunk: int) -> Totals:
    """Summed cross entropy of a decoder on a batch as `next_token` takes it.

    Padding is on the right, so that without packing causal attention needs no mask.
    """
    inputs = {name: batch[name] for name in ("positions", "segments") if name in batch}
    hidden, _ = model.hidden(batch["tokens"], **inputs)
    return chunked_cross_entropy(model.logits, hidden, batch["targets"], batch["loss_weights"], chunk)


def seq2seq_loss(model: EncoderDecoder, batch: Batch, chunk: int) -> Totals:
    """Summed cross entropy of an encoder-decoder on a batch as `seq2seq` takes it."""
    hidden = model.hidden(batch["tokens"], mask=batch["mask"], decoder_tokens=batch["decoder_tokens"])
    return chunked_cross_entropy(model.logits, hidden, batch["targets"], batch["loss_weights"], chunk)


def outputs(model: Any, batch: Batch) -> jax.Array:
    """Logits of a model's head on a batch of labeled examples: pixels, or tokens, mask and token_types."""
    if "pixels" in batch:
        return model(batch["pixels"])
    return model(batch["tokens"], mask=batch["mask"], token_types=batch["token_types"])


def classification_loss(logits: jax.Array, batch: Batch) -> Totals:
    """Summed cross entropy of logits [B, C] or [B, T, C] with the batch's labels and loss_weights, [B] or [B, T]."""
    labels, weights = batch["labels"], batch["loss_weights"]
    if labels.ndim == 1:
        logits, labels, weights = logits[:, None], labels[:, None], weights[:, None]
    return _totals(logits, labels, weights)


def multi_label_loss(logits: jax.Array, batch: Batch) -> Totals:
    """Summed binary cross entropy of logits [B, C] with labels [B, C], 0 or 1; the mean over classes, as in transformers.

    softplus(logit) - label * logit. Its gradients differ from those of optax.sigmoid_binary_cross_entropy in the last bit.
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
    targets = jnp.where(weights == 0, 0, targets)
    # Compare with every id rather than gather: the gradient is then a select instead of a scatter, and both stay local
    # to each device's shard of the vocabulary.
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2)
    at_target = ids == targets[..., None]  # [B, c, V]
    target_logits = jnp.sum(jnp.where(at_target, logits, 0.0), axis=-1)
    target_logits = jnp.where((targets >= 0) & (targets < vocab), target_logits, jnp.nan)
    losses = jax.nn.logsumexp(logits, axis=-1) - target_logits
    hits = jnp.argmax(logits, axis=-1) == targets
    return Totals(jnp.sum(weights * losses), jnp.sum(weights), jnp.sum(weights * hits))
