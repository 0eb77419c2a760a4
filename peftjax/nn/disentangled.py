"""Disentangled attention: content attends to content, content to relative positions, and relative positions to content.

He et al. 2020 (arXiv:2006.03654), section 3.1.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax import sharding
from peftjax.nn.dropout import Dropout
from peftjax.nn.linear import Linear
from peftjax.nn.recompute import recomputed


def signed_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Return the bucket of each distance from -(length - 1) to length - 1: int32 [2 length - 1].

    With m = buckets / 2, the bucket of d is d for |d| <= m, and from there sign(d) (m + ceil(log(|d| / m) / log((max_distance -
    1) / m) (m - 1))) (He et al. 2021, arXiv:2111.09543, and the code of DeBERTa v2). With `buckets` 0 it is d. Computed in
    float32, because rounding determines the bucket of some distances.
    """
    distance = np.arange(1 - length, length)
    if not buckets:
        return distance.astype(np.int32)
    middle = buckets // 2
    far = np.maximum(np.abs(distance), middle).astype(np.float32) / np.float32(middle)
    scale = np.log(np.float32((max_distance - 1) / middle))
    steps = np.ceil(np.log(far) / scale * np.float32(middle - 1)) + middle
    return np.where(np.abs(distance) <= middle, distance, np.sign(distance) * steps).astype(np.int32)


class DisentangledAttention(nnx.Module):
    """softmax((q_i k_j + q_i k'_d + k_j q'_d) / sqrt(c H)) v W_out, with the bucket d of i - j and c the number of terms.

    k' and q' are projections of the embeddings of relative positions. Kernels are two-dimensional, with heads flattened
    into one axis. There is no slot for prefixes, because they have no positions.

    Args:
        features: Width of input and output, D.
        heads: Number of heads, N.
        terms: The terms in addition to q_i k_j: "c2p" for q_i k'_d, "p2c" for k_j q'_d.
        shared: Whether the key and query layers also project the positions; otherwise there are separate layers.
        relative: Whether there are embeddings of relative positions. Without them, the terms only count in c.
        dropout: Dropout rate of the attention probabilities.
        position_dropout: Dropout rate of the embeddings of relative positions.
        stddev: Standard deviation of random kernels.
        dtype: Dtype of the parameters.
        rngs: Source of random weights.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        terms: tuple[str, ...],
        shared: bool,
        relative: bool,
        dropout: float,
        position_dropout: float,
        stddev: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.heads, self.terms, self.shared = heads, terms if relative else (), shared
        self.scale = ((1 + len(terms)) * (features // heads)) ** -0.5
        common: dict[str, Any] = {"use_bias": True, "stddev": stddev, "dtype": dtype, "rngs": rngs}
        self.query = Linear(features, features, axes=("embed", "heads"), **common)
        self.key = Linear(features, features, axes=("embed", "heads"), **common)
        self.value = Linear(features, features, axes=("embed", "heads"), **common)
        self.out = Linear(features, features, axes=("heads", "embed"), **common)
        if "c2p" in self.terms and not shared:
            self.position_key = Linear(features, features, axes=("embed", "heads"), **common)
        if "p2c" in self.terms and not shared:
            self.position_query = Linear(features, features, axes=("embed", "heads"), **common)
        self.dropout, self.position_dropout = Dropout(dropout), Dropout(position_dropout)

    def __call__(self, x: jax.Array, positions: jax.Array | None, index: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D].

        Args:
            x: [B, T, D].
            positions: Embeddings of the relative positions, [1, R, D]; None: there are none.
            index: int [T, T], the row of `positions` for each query and key.
            mask: bool [B, 1, T, T].
        """
        q, k, v = (self._heads(layer(x)) for layer in (self.query, self.key, self.value))
        position_key = position_query = None
        if positions is not None:
            positions = self.position_dropout(positions)
            if "c2p" in self.terms:
                position_key = self._heads((self.key if self.shared else self.position_key)(positions))[0]
            if "p2c" in self.terms:
                position_query = self._heads((self.query if self.shared else self.position_query)(positions))[0]
        core = recomputed(partial(disentangled, scale=self.scale, dropout=self.dropout))
        k, v = sharding.whole_length(k), sharding.whole_length(v)
        return self.out(core(q, k, v, position_key, position_query, index, mask).reshape(x.shape))

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.heads, -1)


def disentangled(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position_key: jax.Array | None,
    position_query: jax.Array | None,
    index: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    dropout: Dropout,
) -> jax.Array:
    """dropout(softmax(scale (q_i k_j + q_i k'_d + k_j q'_d))) v, with d = index[i, j]; scores and softmax in float32.

    Args:
        q: [B, T, N, H].
        k: [B, T, N, H].
        v: [B, T, N, H].
        position_key: k', [R, N, H]; None: the term is 0.
        position_query: q', [R, N, H]; None: the term is 0.
        index: int [T, T].
        mask: bool [B, 1, T, T]; a query that may attend to no key averages all values.
        scale: Factor of the scores.
        dropout: Applied to the attention probabilities.

    Returns:
        [B, T, N, H].
    """
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("btnh,bsnh->bnts", q, k)
    if position_key is not None:
        by_row = product("btnh,rnh->bntr", q, position_key)
        scores = scores + jnp.take_along_axis(by_row, index[None, None], axis=-1)
    if position_query is not None:
        by_row = product("bsnh,rnh->bnsr", k, position_query)
        scores = scores + jnp.take_along_axis(by_row, index.T[None, None], axis=-1).swapaxes(-1, -2)
    scores = jnp.where(mask, scores * scale, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores, axis=-1)).astype(v.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def rows_of_positions(length: int, span: int, buckets: int, max_distance: int) -> jax.Array:
    """Return the row, of 2 `span` rows, of the bucket of i - j for queries i and keys j: int [length, length]."""
    rows = np.clip(signed_buckets(length, buckets, max_distance) + span, 0, 2 * span - 1)
    steps = jnp.arange(length)
    return jnp.asarray(rows)[steps[:, None] - steps[None, :] + length - 1]
