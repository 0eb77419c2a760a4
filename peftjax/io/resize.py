"""Add rows to a model's embedding table for tokens that were added to its tokenizer."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from peftjax import sharding
from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.models.base import LanguageModelConfig, Model, ModelConfig
from peftjax.models.text_encoder import TextEncoderConfig
from peftjax.quant import nf4
from peftjax.quant.base import Quantized

_WithVocabulary = LanguageModelConfig | TextEncoderConfig


def resized(config: ModelConfig, rows: int | None) -> ModelConfig:
    """Return the configuration with a vocabulary of at least `rows` tokens; None: as it is.

    Raises:
        UserError: The model has no vocabulary, or `rows` is not a number.
    """
    if rows is None:
        return config
    if isinstance(rows, bool) or not isinstance(rows, int):
        raise UserError(f"resize_embeddings must be a number of tokens, such as tokenizer.vocab_size, not {rows!r:.80}")
    if not isinstance(config, _WithVocabulary):
        raise UserError(f"resize_embeddings={rows} (model.resize_embeddings): the model reads no tokens; leave it out")
    if rows <= config.vocab:
        return config
    return dataclasses.replace(config, vocab=rows, hf=json.dumps(json.loads(config.hf) | {"vocab_size": rows}))


def with_rows(model: Model, rows: int | None, mesh: Mesh) -> Model:
    """Return the model with at least `rows` rows in its embedding table and its head; it must not have adapters.

    Every new row is the mean of the old ones, as in transformers' `resize_token_embeddings`, which adds noise to it that is
    five orders of magnitude smaller than the rows (a multivariate normal with 1e-9 times their covariance).
    If `rows` is None, the model stays as it is.

    Raises:
        UserError: The model has no vocabulary, or its head is quantized.
    """
    config = resized(model.config, rows)
    if config is model.config:
        return model
    larger = config.abstract()
    shapes = variables.flat(larger)[1]
    values: dict[str, Any] = {}
    for path, variable in variables.flat(model)[1].items():
        value, axes = variable.get_value(), variable.axes
        if "vocab" in axes:
            if isinstance(value, Quantized):
                raise UserError(
                    f"resize_embeddings={rows} (model.resize_embeddings): {path} is quantized and cannot be resized"
                )
            value = _grown(value, shapes[path].shape, axes, mesh)
        values[path] = value
    variables.update(larger, values)
    return larger


def with_stored_rows(model: Model, fields: Mapping[str, Any]) -> Model:
    """Return the model, or its shapes with the vocabulary of config.json if rows were added to its embedding."""
    config, rows = model.config, fields.get("vocab_size")
    if rows is None or not isinstance(config, _WithVocabulary) or rows >= config.vocab:
        return model
    return dataclasses.replace(config, vocab=rows).abstract()


def _grown(value: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh) -> jax.Array:
    """The array with the mean of its rows appended until it has the given shape."""
    axis = axes.index("vocab")
    placed = sharding.placement(jax.ShapeDtypeStruct(shape, value.dtype), axes, mesh)

    def grow(value: jax.Array) -> jax.Array:
        mean = jnp.expand_dims(_mean(value, axis), axis).astype(value.dtype)
        more = [shape[axis] - size if i == axis else size for i, size in enumerate(value.shape)]
        return jnp.concatenate([value, jnp.broadcast_to(mean, more)], axis=axis)

    return jax.jit(grow, out_shardings=sharding.as_jit_returns(placed))(value)


def _mean(value: jax.Array, axis: int) -> jax.Array:
    """The mean along an axis, float32.

    Unlike `jnp.mean`, it has the same bits on every mesh. Otherwise, a run could not resume on another mesh: its base
    would have another fingerprint.
    """
    rows = jnp.moveaxis(value.astype(jnp.float32), axis, -1)
    mean: Callable[[jax.Array], jax.Array] = jnp.vectorize(nf4.mean, signature="(n)->()")
    return mean(jnp.maximum(rows, 0)) - mean(jnp.maximum(-rows, 0))
