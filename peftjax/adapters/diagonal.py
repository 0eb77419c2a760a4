"""The product with a diagonal matrix."""

import jax
import jax.numpy as jnp

from peftjax.nn.recompute import recomputed


@recomputed
def times(x: jax.Array, diagonal: jax.Array) -> jax.Array:
    """x * diagonal over the last axis, [..., R] x [R] -> [..., R], in the dtype of x; or with several diagonals [..., R]."""
    return x * jnp.broadcast_to(diagonal.astype(x.dtype), x.shape)
