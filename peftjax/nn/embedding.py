"""Token ids to vectors, with a slot."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.nn.slot import Slot


class Embedding(nnx.Module):
    """Rows of a table: int [B, T] -> [B, T, D] in `dtype`. embedding: [V, D]."""

    hf_leaves: ClassVar = {"embedding": ("weight", None)}

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
        return self.adapters(self, self.lookup, tokens)

    def prompt(self) -> jax.Array:
        """The vectors that active adapters put before every sequence, [P, D] in `dtype`."""
        active = [self.adapters.adapter(name) for name in self.adapters.active]
        return jnp.concatenate([adapter.prompt() for adapter in active if adapter.virtual]).astype(self.dtype)

    def lookup(self, tokens: jax.Array, embedding: jax.Array | None = None) -> jax.Array:
        """The base computation; `embedding` stands in for the layer's own table."""
        table = self.embedding.get_value() if embedding is None else embedding
        return jnp.take(table, tokens, axis=0).astype(self.dtype)
