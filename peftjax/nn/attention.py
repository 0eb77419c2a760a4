"""Multi-head attention with grouped queries, its masks and its key/value cache."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.nn.dropout import Dropout
from peftjax.nn.linear import Linear
from peftjax.nn.norm import RMSNorm
from peftjax.nn.rope import rotate
from peftjax.nn.slot import Slot


@partial(jax.tree_util.register_dataclass, data_fields=["key", "value", "valid", "length"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far.

    key, value: [L, B, S, K, H]; valid: bool [B, S], true where a real token was written; length: int32 [], slots in use.
    """

    key: jax.Array
    value: jax.Array
    valid: jax.Array
    length: jax.Array


def extend_valid(cache: Cache | None, mask: jax.Array) -> jax.Array:
    """Which keys are real tokens once those of `mask` (bool [B, T]) are in: bool [B, S]."""
    if cache is None:
        return mask
    return jax.lax.dynamic_update_slice(cache.valid, mask, (0, cache.length))


def attention_mask(
    length: int,
    *,
    valid: jax.Array | None,
    segments: jax.Array | None,
    offset: jax.Array | int = 0,
    shared: int = 0,
) -> jax.Array:
    """Who may look at whom: bool [B or 1, 1, T, S]; query t is key number offset + t and sees no later key.

    valid: bool [B, S], keys that are real tokens (S = T without it); segments: int [B, T], queries see only keys of
    their own packed document, and the first `shared` keys, a soft prompt, which belong to all.
    """
    keys = length if valid is None else valid.shape[1]
    mask = (jnp.arange(keys)[None, :] <= offset + jnp.arange(length)[:, None])[None, None]  # [1, 1, T, S]
    if valid is not None:
        mask = mask & valid[:, None, None, :]
    if segments is not None:
        same = segments[:, None, :, None] == segments[:, None, None, :]
        mask = mask & (same | (jnp.arange(keys) < shared)[None, None, None])
    return mask


def key_distances(positions: jax.Array, keys: int, offset: jax.Array | int, shared: int) -> jax.Array:
    """How far before each query each key lies: int [B or 1, 1, T, S].

    positions: [B or 1, T], of the queries, counted from the first key of their document; key `offset + t` is query t.
    Within a document slots and positions are as far apart; the first `shared` keys are at positions 0, 1, ... of
    every document.
    """
    queries, slots = offset + jnp.arange(positions.shape[1]), jnp.arange(keys)
    within = (queries[:, None] - slots[None, :])[None, None]  # [1, 1, T, S]
    if not shared:
        return within
    return jnp.where((slots < shared)[None, None, None], (positions[:, :, None] - slots[None, None])[:, None], within)


def within_window(mask: jax.Array, window: jax.Array, distances: jax.Array) -> jax.Array:
    """`mask` without the keys that lie `window` or more positions back; a window of 0 means no limit."""
    return mask & ((distances < window) | (window == 0))


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(H)) v W_out, with rotary q and k or not; K <= N key/value heads are shared by groups of queries.

    Kernels are two-dimensional, heads flattened into one axis: query [D, N*H], key and value [D, K*H], out [N*H, D].
    The slot wraps the core (q, k, v, mask) -> [B, T, N, H]: prefix tuning sits there. dropout: of the softmax, in training,
    for encoders alone (with a mask, and K = N).
    """

    def __init__(
        self,
        features: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool,
        out_bias: bool,
        qk_norm_eps: float | None,
        dropout: float = 0.0,
        stddev: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        common: dict[str, Any] = {"stddev": stddev, "dtype": dtype, "rngs": rngs}
        self.query = Linear(features, heads * head_dim, axes=("embed", "heads"), use_bias=qkv_bias, **common)
        self.key = Linear(features, kv_heads * head_dim, axes=("embed", "kv_heads"), use_bias=qkv_bias, **common)
        self.value = Linear(features, kv_heads * head_dim, axes=("embed", "kv_heads"), use_bias=qkv_bias, **common)
        self.out = Linear(heads * head_dim, features, axes=("heads", "embed"), use_bias=out_bias, **common)
        self.qk_norm = qk_norm_eps is not None
        if qk_norm_eps is not None:
            self.query_norm = RMSNorm(head_dim, eps=qk_norm_eps, axis="head_dim", dtype=dtype)
            self.key_norm = RMSNorm(head_dim, eps=qk_norm_eps, axis="head_dim", dtype=dtype)
        self.dropout = Dropout(dropout)
        self.adapters = Slot()

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array] | None,
        mask: jax.Array | None,
        cache: tuple[jax.Array, jax.Array] | None = None,
        offset: jax.Array | int = 0,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """x [B, T, D] -> ([B, T, D], the cache with T more keys). `cache`: this layer's key and value, [B, S, K, H]."""
        q = self._heads(self.query(x), self.heads)  # [B, T, N, H]
        k = self._heads(self.key(x), self.kv_heads)  # [B, T, K, H]
        v = self._heads(self.value(x), self.kv_heads)
        if self.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            start = (0, offset, 0, 0)
            k = jax.lax.dynamic_update_slice(cache[0], k.astype(cache[0].dtype), start)
            v = jax.lax.dynamic_update_slice(cache[1], v.astype(cache[1].dtype), start)
            cache = (k, v)
        attended = self.adapters(self, self.core, q, k, v, mask)
        return self.out(attended.reshape(*x.shape[:2], -1)), cache

    def core(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
        """The base computation: q [B, T, N, H], k and v [B, S, K, H]; a mask of None means causal."""
        if self.dropout.rate and not self.dropout.deterministic:
            assert mask is not None, "encoders give one"
            return attend_with_dropout(q, k, v, mask, self.dropout)
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None)

    def _heads(self, x: jax.Array, heads: int) -> jax.Array:
        return x.reshape(*x.shape[:2], heads, self.head_dim)


def attend_with_dropout(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, dropout: Dropout) -> jax.Array:
    """dropout(softmax(q k^T / sqrt(H))) v, which jax.nn.dot_product_attention does not have. [B, T, N, H]."""
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    weights = dropout(jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1))  # [B, N, T, S]
    return jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v)
