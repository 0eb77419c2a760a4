"""Embedding of token ids."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax import sharding
from peftjax.core.errors import UserError
from peftjax.nn.layer import HfLeaves, SlottedLayer
from peftjax.nn.slot import Slot


class Embedding(SlottedLayer):
    """Look up rows of a table: int [B, T] -> [B, T, D] in `dtype`.

    Attributes:
        embedding: The table, [V, D].

    Args:
        vocab: Number of rows, V.
        features: Width, D.
        stddev: Standard deviation of random weights.
        dtype: Compute dtype.
        param_dtype: Dtype of the table.
        rngs: Source of random weights.
    """

    hf_leaves: ClassVar[HfLeaves] = {"embedding": ("weight", None)}

    def __init__(
        self,
        vocab: int,
        features: int,
        *,
        stddev: float = 0.02,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features, self.out_features, self.axes = vocab, features, ("vocab", "embed")
        self.dtype = dtype
        value = stddev * jax.random.normal(rngs.params(), (vocab, features), jnp.float32)
        self.embedding = nnx.Param(value.astype(param_dtype), axes=self.axes)
        self.adapters = Slot()

    def __call__(self, tokens: jax.Array) -> jax.Array:
        array = isinstance(tokens, jax.Array | np.ndarray)
        if not (array and tokens.ndim == 2 and jnp.issubdtype(tokens.dtype, jnp.integer)):
            found = (
                f"of shape {list(tokens.shape)} and dtype {tokens.dtype}" if array else f"in a {type(tokens).__name__}"
            )
            raise UserError(f"tokens {found}: a model needs an integer array [B, T], such as jnp.asarray([[1, 2, 3]])")
        return self.adapters(self, self.lookup, tokens)

    def soft_prompt(self) -> jax.Array:
        """Return the active soft prompts, [P, D]."""
        return jnp.concatenate([adapter.prompt() for adapter in self.adapters.active_adapters() if adapter.virtual])

    def prompt(self, batch: int) -> jax.Array:
        """Return the active soft prompts for `batch` rows, [B, P, D] in `dtype`."""
        prompt = self.soft_prompt().astype(self.dtype)
        return jnp.broadcast_to(prompt[None], (batch, *prompt.shape))

    def lookup(self, tokens: jax.Array, embedding: jax.Array | None = None) -> jax.Array:
        """The base computation; `embedding` replaces the layer's own table."""
        table = self.embedding.get_value() if embedding is None else embedding
        return sharding.constrain_looked_up(jnp.take(table, tokens, axis=0).astype(self.dtype), self.axes[1])
