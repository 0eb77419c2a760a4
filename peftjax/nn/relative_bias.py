"""Relative position bias: learned attention biases for buckets of distances."""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.nn.layer import HfLeaves, Layer


def buckets_of_distances(buckets: int, max_distance: int) -> np.ndarray:
    """Return the bucket of each distance from 0 to `max_distance`, which stands for all larger ones.

    With e = buckets / 2, the bucket is d for distances d < e, and from there e + floor(log(d / e) / log(max_distance / e) *
    (buckets - e)), at most buckets - 1 (Raffel et al. 2020, arXiv:1910.10683, section 2.1). Computed in float32, whose
    rounding decides at powers of two.

    Returns:
        int32 [max_distance + 1].
    """
    exact, distance = buckets // 2, np.arange(max_distance + 1)
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / exact) / np.float32(math.log(max_distance / exact))
    far = exact + (ratio * (buckets - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(far, buckets - 1)).astype(np.int32)


class RelativeBias(Layer):
    """A bias for each head and bucket of the distance from query to key, added to the attention scores.

    Attributes:
        embedding: [buckets, N].

    Args:
        buckets: Number of buckets.
        max_distance: All distances from here on share the last bucket.
        heads: Number of heads, N.
        both_sides: Half of the buckets are for keys after the query. Otherwise those are in the bucket of distance 0.
        stddev: Standard deviation of random weights.
        dtype: Dtype of the parameters.
        rngs: Source of random weights.
    """

    hf_leaves: ClassVar[HfLeaves] = {"embedding": ("weight", None)}

    def __init__(
        self,
        buckets: int,
        max_distance: int,
        heads: int,
        *,
        both_sides: bool,
        stddev: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.both_sides, self.max_distance, self.buckets = both_sides, max_distance, buckets
        value = stddev * jax.random.normal(rngs.params(), (buckets, heads), jnp.float32)
        self.embedding = nnx.Param(value.astype(dtype), axes=(None, "heads"))

    def __call__(self, queries: jax.Array, keys: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Positions of queries, int [T], and of keys, int [S] -> [1, N, T, S]."""
        later = keys[None, :] - queries[:, None]  # [T, S]
        one_side = self.buckets // 2 if self.both_sides else self.buckets
        distance = jnp.abs(later) if self.both_sides else jnp.maximum(-later, 0)
        table = jnp.asarray(buckets_of_distances(one_side, self.max_distance))
        bucket = table[jnp.minimum(distance, self.max_distance)]
        if self.both_sides:
            bucket = bucket + jnp.where(later > 0, one_side, 0)
        return jnp.moveaxis(self.embedding.get_value().astype(dtype)[bucket], -1, 0)[None]
