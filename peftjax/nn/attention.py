"""Multi-head attention with grouped queries."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax import sharding
from peftjax.nn.attention_kernels import attend
from peftjax.nn.attention_mask import AttentionMask, DenseMask
from peftjax.nn.cache import LayerCache
from peftjax.nn.dropout import Dropout
from peftjax.nn.fused import choose_implementation, fused
from peftjax.nn.layer import HfLeaves, SlottedLayer
from peftjax.nn.linear import Linear
from peftjax.nn.norm import RMSNorm, l2_norm
from peftjax.nn.recompute import recomputed
from peftjax.nn.rope import RopeTables, rotate
from peftjax.nn.slot import Slot


class Attention(SlottedLayer):
    """softmax(scale q k^T) v W_out, with optional rotary embedding; groups of queries share K <= N key/value heads.

    Kernels are two-dimensional, with heads flattened into one axis: query [D, N*H], key and value [D, K*H], out [N*H, D].
    The slot wraps the core (q, k, v, mask) -> [B, T, N, H], where prefix tuning sits.

    Attributes:
        sinks: [N], the score of an additional key in each head, whose value is zero; None: no sinks.
        implementation: The implementation of causal attention without a cache: "xla", "auto", or one of
            `nn.fused.IMPLEMENTATIONS`. Set by `models.kernels.use_kernel`.
        platform: The platform for which "auto" chooses.

    Args:
        features: Width of input and output, D.
        heads: Number of query heads, N.
        kv_heads: Number of key and value heads, K.
        head_dim: Width of one head, H.
        qkv_bias: Whether the query, key and value layers have biases.
        out_bias: Whether the output layer has a bias.
        qk_norm_eps: Epsilon of the norms of queries and keys; None: no norms.
        qk_norm_whole: Whether these norms are taken over all heads together instead of over each head.
        l2_norm_eps: Epsilon of norms without scales of rotated queries and keys (Llama 4); None: no such norms.
        dropout: Dropout rate of the attention probabilities.
        norm: Class of the norms of queries and keys.
        scale: Factor on the scores; default: 1 / sqrt(H).
        softcap: Scores s become c tanh(s / c) for a soft cap c.
        sinks: Whether the layer has attention sinks.
        interleaved: Whether the rotary embedding rotates pairs of neighboring elements, as in `nn.rope.rotate`.
        linear: Class of the linear layers.
        stddev: Standard deviation of random kernels.
        dtype: Dtype of the parameters.
        rngs: Source of random weights.
    """

    hf_leaves: ClassVar[HfLeaves] = {"sinks": ("sinks", None)}
    sinks: nnx.Param | None = None
    implementation: str = "xla"
    platform: str = "cpu"

    def __init__(
        self,
        features: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm_eps: float | None = None,
        qk_norm_whole: bool = False,
        l2_norm_eps: float | None = None,
        dropout: float = 0.0,
        norm: type[RMSNorm] = RMSNorm,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        interleaved: bool = False,
        linear: type[Linear] = Linear,
        stddev: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        make = partial(linear, stddev=stddev, dtype=dtype, rngs=rngs)
        self.make_inputs(features, partial(make, use_bias=qkv_bias))
        self.out = make(heads * head_dim, features, axes=("heads", "embed"), use_bias=out_bias)
        self.qk_norm, self.qk_norm_whole = qk_norm_eps is not None, qk_norm_whole
        if qk_norm_eps is not None:
            make_norm = partial(norm, eps=qk_norm_eps, dtype=dtype)
            if qk_norm_whole:
                self.query_norm = make_norm(heads * head_dim, axis="heads")
                self.key_norm = make_norm(kv_heads * head_dim, axis="kv_heads")
            else:
                self.query_norm, self.key_norm = (make_norm(head_dim, axis="head_dim") for _ in range(2))
        self.l2_norm_eps = l2_norm_eps
        self.scale, self.softcap, self.dropout, self.interleaved = scale, softcap, Dropout(dropout), interleaved
        if sinks:
            self.sinks = nnx.Param(jnp.zeros((heads,), dtype), axes=("heads",))
        self.adapters = Slot()

    def make_inputs(self, features: int, make: Callable[..., Linear]) -> None:
        """Build the layers that read the input."""
        self.query = make(features, self.heads * self.head_dim, axes=("embed", "heads"))
        self.key, self.value = (
            make(features, self.kv_heads * self.head_dim, axes=("embed", "kv_heads")) for _ in range(2)
        )

    def __call__(
        self,
        x: jax.Array,
        rope: RopeTables | None,
        mask: AttentionMask | jax.Array | None,
        cache: LayerCache | None = None,
        offset: jax.Array | int = 0,
        query_factors: jax.Array | None = None,
        rotated: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """[B, T, D] -> ([B, T, D], the cache extended by T keys).

        Args:
            x: [B, T, D].
            rope: Rotary tables of the T positions; None: no rotary embedding.
            mask: The result of `prepared` for this layer, or bool [B or 1, 1, T or 1, S]; None: causal.
            cache: The keys and values of earlier tokens.
            offset: Number of keys in the cache.
            query_factors: Factors of the queries, [B or 1, T]; None: 1.
            rotated: bool [], whether this layer rotates queries and keys; `l2_norm_eps` applies only then. None: it does.
        """
        q, k, v = self.project(x)
        if rope is not None:
            q, k = rotate(q, *rope, self.interleaved), rotate(k, *rope, self.interleaved)
        if self.l2_norm_eps is not None:
            normed_q, normed_k = l2_norm(q, self.l2_norm_eps), l2_norm(k, self.l2_norm_eps)
            if rotated is not None:
                normed_q, normed_k = jnp.where(rotated, normed_q, q), jnp.where(rotated, normed_k, k)
            q, k = normed_q, normed_k
        if query_factors is not None:
            q = q * query_factors[:, :, None, None].astype(q.dtype)
        if cache is not None:
            (k, v), cache = cache.extend(k, v, offset)
        attended = self.adapters(self, self.core, q, sharding.whole_length(k), sharding.whole_length(v), mask)
        return self.out(attended.reshape(*x.shape[:2], -1)), cache

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D] -> q [B, T, N, H], k and v [B, T, K, H], before rotation."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.qk_norm and self.qk_norm_whole:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = self._heads(q, self.heads), self._heads(k, self.kv_heads), self._heads(v, self.kv_heads)
        if self.qk_norm and not self.qk_norm_whole:
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k, v

    def chosen(self, mask: AttentionMask, dtype: jnp.dtype) -> str:
        """The implementation for a batch in a compute dtype, as `nn.fused.choose_implementation` returns it."""
        return choose_implementation(
            self.implementation,
            self.platform,
            mask,
            dtype,
            cap=self.softcap,
            head_dim=self.head_dim,
            sinks=self.sinks is not None,
        )

    def prepared(self, mask: AttentionMask, x: jax.Array) -> AttentionMask | DenseMask:
        """The mask in the form that the implementation for x [B, T, D] takes. All layers of a stack share it.

        Raises:
            UserError: The implementation does not support the batch.
        """
        name = self.chosen(mask, x.dtype)
        return mask.dense() if name == "xla" else dataclasses.replace(mask, implementation=name)

    def core(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask | jax.Array | None) -> jax.Array:
        """The base computation: q [B, T, N, H], k and v [B, S, K, H] -> [B, T, N, H]; mask None: causal."""
        sinks = None if self.sinks is None else self.sinks.get_value()
        if isinstance(mask, AttentionMask):
            return fused(q, k, v, mask, scale=self.scale, cap=self.softcap, sinks=sinks)
        if self.softcap is None and self.dropout.idle and sinks is None:
            form = partial(jax.nn.dot_product_attention, scale=self.scale, is_causal=mask is None)
        else:
            form = partial(attend, scale=self.scale, cap=self.softcap, dropout=self.dropout, sinks=sinks)
        return recomputed(lambda q, k, v, mask: form(q, k, v, mask=mask))(q, k, v, mask)

    def _heads(self, x: jax.Array, heads: int) -> jax.Array:
        return x.reshape(*x.shape[:2], heads, self.head_dim)


class FusedAttention(Attention):
    """Attention whose queries, keys and values come from one layer, [D, (N + 2 K) * H], in this order, and have no norms."""

    def make_inputs(self, features: int, make: Callable[..., Linear]) -> None:
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = make(features, width, axes=("embed", "heads"))

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        ends = (self.heads * self.head_dim, (self.heads + self.kv_heads) * self.head_dim)
        q, k, v = jnp.split(self.qkv(x), ends, axis=-1)
        return self._heads(q, self.heads), self._heads(k, self.kv_heads), self._heads(v, self.kv_heads)
