"""Losses for your own training loop: scalar means over the tokens or examples of a batch.

`next_token`, `seq2seq`, `classification`, `token_classification`, `multi_label`, `regression` and `image_classification`
take a model and a batch and return the mean loss. They share two arguments:

- `train`: Whether dropout is active, in the adapters and in the base model. True for training; False for
  evaluation. The model itself keeps its mode and its keys.
- `key`: A JAX random key for dropout. By default it is derived from the batch and the trainable parameters, so that the
  masks change from step to step and a run is reproducible; see `training_view`.

Two methods need more than a loss. AdaLoRA minimizes the mean loss plus `method.penalty(model)`, which is None for all
other methods and is not included here. It also prunes ranks during training, and LoRA+ scales the learning rate of B:
`peftjax.wrap_optimizer` adds this to an optimizer.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
from flax import nnx

from peftjax.core.errors import UserError
from peftjax.nn.dropout import evaluation_view, training_view
from peftjax.totals import (
    DecoderLike,
    EncoderDecoderLike,
    Totals,
    classification_loss,
    multi_label_loss,
    next_token_loss,
    regression_loss,
    seq2seq_loss,
)

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


Arrays = Mapping[str, Any]  # arrays of JAX or NumPy


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


def next_token(
    model: DecoderLike | nnx.Module,
    batch: Arrays,
    *,
    key: jax.Array | None = None,
    train: bool = True,
    chunk: int = 128,
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
        UserError: The batch lacks an array or has one of a wrong shape, or `chunk` is less than 1.

    Examples:
        >>> import jax, jax.numpy as jnp, peftjax
        >>> from peftjax import losses
        >>> model = peftjax.load_model("embedded")
        >>> tokens = jnp.array([[5, 6, 7, 8]])
        >>> batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:],
        ...          "loss_weights": jnp.ones((1, 3))}
        >>> loss = jax.jit(lambda batch: losses.next_token(model, batch))(batch)
        >>> loss.shape, loss.dtype
        ((), dtype('float32'))
    """
    _require("next_token", batch, "tokens", "targets", "loss_weights")
    _require_shape("next_token", batch, batch["tokens"].shape, "targets", "loss_weights")
    return _mean(next_token_loss(_view(model, batch, key, train), batch, chunk))


def seq2seq(
    model: EncoderDecoderLike | nnx.Module,
    batch: Arrays,
    *,
    key: jax.Array | None = None,
    train: bool = True,
    chunk: int = 128,
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
        UserError: The batch lacks an array or has one of a wrong shape, or `chunk` is less than 1.

    Examples:
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
    _require_shape("seq2seq", batch, batch["decoder_tokens"].shape, "targets", "loss_weights")
    return _mean(seq2seq_loss(_view(model, batch, key, train), batch, chunk))


def classification(
    model: TextClassifier, batch: Arrays, *, key: jax.Array | None = None, train: bool = True
) -> jax.Array:
    """Mean cross entropy of a sequence classifier, float32 [].

    Args:
        model: An encoder with a classification head of C classes.
        batch: tokens, int [B, T]; mask, bool [B, T], true for real tokens; optionally token_types, int [B, T]; labels,
            int [B], in [0, C); loss_weights [B].
        key: A JAX random key for dropout; by default it is derived from the batch and the trainable parameters.
        train: Whether dropout is active.

    Raises:
        UserError: The batch lacks an array, or has one of a wrong shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from peftjax import losses
        >>> class Classifier(nnx.Module):
        ...     def __call__(self, tokens, mask=None, token_types=None):
        ...         return jnp.zeros((1, 2))  # logits
        >>> model = Classifier()
        >>> batch = {"tokens": jnp.ones((1, 4), int), "mask": jnp.ones((1, 4), bool),
        ...          "loss_weights": jnp.ones(1)}
        >>> print(f"{losses.classification(model, batch | {'labels': jnp.array([0])}):.4f}")
        0.6931
    """
    logits = _text_logits("classification", model, batch, key, train)
    _require_shape("classification", batch, logits.shape[:-1], "labels", "loss_weights")
    return _mean(classification_loss(logits, batch))


def token_classification(
    model: TextClassifier, batch: Arrays, *, key: jax.Array | None = None, train: bool = True
) -> jax.Array:
    """Mean cross entropy of a token classifier, float32 [].

    Args:
        model: An encoder with a classification head of C classes.
        batch: As for `classification`, but labels, int [B, T], in [0, C), and loss_weights [B, T], 0 for tokens without
            a label, such as special tokens.
        key: A JAX random key for dropout; by default it is derived from the batch and the trainable parameters.
        train: Whether dropout is active.

    Raises:
        UserError: The batch lacks an array, or has one of a wrong shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from peftjax import losses
        >>> class Classifier(nnx.Module):
        ...     def __call__(self, tokens, mask=None, token_types=None):
        ...         return jnp.zeros((1, 4, 2))  # logits
        >>> model = Classifier()
        >>> batch = {"tokens": jnp.ones((1, 4), int), "mask": jnp.ones((1, 4), bool),
        ...          "loss_weights": jnp.ones((1, 4))}
        >>> print(f"{losses.token_classification(model, batch | {'labels': jnp.zeros((1, 4), int)}):.4f}")
        0.6931
    """
    logits = _text_logits("token_classification", model, batch, key, train)
    _require_shape("token_classification", batch, logits.shape[:-1], "labels", "loss_weights")
    return _mean(classification_loss(logits, batch))


def multi_label(model: TextClassifier, batch: Arrays, *, key: jax.Array | None = None, train: bool = True) -> jax.Array:
    """Mean binary cross entropy of a sequence classifier with independent classes, float32 [].

    Args:
        model: An encoder with a classification head of C classes.
        batch: As for `classification`, but labels, float [B, C], 0 or 1.
        key: A JAX random key for dropout; by default it is derived from the batch and the trainable parameters.
        train: Whether dropout is active.

    Raises:
        UserError: The batch lacks an array, or has one of a wrong shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from peftjax import losses
        >>> class Classifier(nnx.Module):
        ...     def __call__(self, tokens, mask=None, token_types=None):
        ...         return jnp.zeros((1, 2))  # logits
        >>> model = Classifier()
        >>> batch = {"tokens": jnp.ones((1, 4), int), "mask": jnp.ones((1, 4), bool),
        ...          "loss_weights": jnp.ones(1)}
        >>> print(f"{losses.multi_label(model, batch | {'labels': jnp.array([[1.0, 1.0]])}):.4f}")
        0.6931
    """
    logits = _text_logits("multi_label", model, batch, key, train)
    _require_shape("multi_label", batch, logits.shape, "labels")
    _require_shape("multi_label", batch, logits.shape[:-1], "loss_weights")
    return _mean(multi_label_loss(logits, batch))


def regression(model: TextClassifier, batch: Arrays, *, key: jax.Array | None = None, train: bool = True) -> jax.Array:
    """Mean squared error of an encoder with one output, float32 [].

    Args:
        model: An encoder with a classification head of one output.
        batch: As for `classification`, but labels, float32 [B].
        key: A JAX random key for dropout; by default it is derived from the batch and the trainable parameters.
        train: Whether dropout is active.

    Raises:
        UserError: The batch lacks an array, or has one of a wrong shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from peftjax import losses
        >>> class Classifier(nnx.Module):
        ...     def __call__(self, tokens, mask=None, token_types=None):
        ...         return jnp.zeros((1, 1))  # logits
        >>> model = Classifier()
        >>> batch = {"tokens": jnp.ones((1, 4), int), "mask": jnp.ones((1, 4), bool),
        ...          "loss_weights": jnp.ones(1)}
        >>> print(f"{losses.regression(model, batch | {'labels': jnp.array([3.0])}):.4f}")
        9.0000
    """
    logits = _text_logits("regression", model, batch, key, train)
    if logits.shape[-1] != 1:
        raise UserError(f"losses.regression: the model has {logits.shape[-1]} outputs; load it with labels=1")
    _require_shape("regression", batch, logits.shape[:-1], "labels", "loss_weights")
    return _mean(regression_loss(logits, batch))


def image_classification(
    model: ImageClassifier, batch: Arrays, *, key: jax.Array | None = None, train: bool = True
) -> jax.Array:
    """Mean cross entropy of an image classifier, float32 [].

    Args:
        model: A vision model with a classification head of C classes.
        batch: pixels, float [B, H, W, 3], as the model's preprocessor scales them; labels, int [B], in [0, C);
            loss_weights [B].
        key: A JAX random key for dropout; by default it is derived from the batch and the trainable parameters.
        train: Whether dropout is active.

    Raises:
        UserError: The batch lacks an array, or has one of a wrong shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from peftjax import losses
        >>> class Classifier(nnx.Module):
        ...     def __call__(self, pixels):
        ...         return jnp.zeros((len(pixels), 2))  # logits
        >>> batch = {"pixels": jnp.zeros((1, 8, 8, 3)), "labels": jnp.array([0]),
        ...          "loss_weights": jnp.ones(1)}
        >>> print(f"{losses.image_classification(Classifier(), batch):.4f}")
        0.6931
    """
    _require("image_classification", batch, "pixels", "labels", "loss_weights")
    logits = _view(model, batch, key, train)(batch["pixels"])
    _require_shape("image_classification", batch, logits.shape[:-1], "labels", "loss_weights")
    return _mean(classification_loss(logits, batch))


def _text_logits(loss: str, model: TextClassifier, batch: Arrays, key: jax.Array | None, train: bool) -> jax.Array:
    """The logits of an encoder's head."""
    _require(loss, batch, "tokens", "mask", "labels", "loss_weights")
    view = _view(model, batch, key, train)
    logits: jax.Array = view(batch["tokens"], mask=batch["mask"], token_types=batch.get("token_types"))
    return logits


def _view(model: Any, batch: Arrays, key: jax.Array | None, train: bool) -> Any:
    return training_view(model, batch, key) if train else evaluation_view(model)


def _mean(totals: Totals) -> jax.Array:
    return totals.loss / totals.tokens


def _require(loss: str, batch: Arrays, *names: str) -> None:
    if missing := [name for name in names if name not in batch]:
        raise UserError(
            f"losses.{loss}: the batch has no {missing[0]!r}; it needs {', '.join(names)} and has {', '.join(batch)}"
        )
    for name in names:
        if not hasattr(batch[name], "shape"):
            raise UserError(f"losses.{loss}: {name} is a {type(batch[name]).__name__}; make it an array")


def _require_shape(loss: str, batch: Arrays, shape: tuple[int, ...], *names: str) -> None:
    """Check the shape of arrays of the batch. Broadcast against the model's output, they would give another loss."""
    for name in names:
        if (given := batch[name].shape) != shape:
            raise UserError(
                f"losses.{loss}: {name} has the shape {list(given)}; with this model it must be {list(shape)}"
            )
