"""Multi-head attention with grouped queries, its masks and its key/value cache."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from peftjax import sharding
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
    """softmax(scale q k^T) v W_out, with rotary q and k or not; K <= N key/value heads are shared by groups of queries.

    Kernels are two-dimensional, heads flattened into one axis: query [D, N*H], key and value [D, K*H], out [N*H, D].
    scale: by default 1 / sqrt(H). softcap: scores s are cap tanh(s / cap) before the softmax. norm: of q and k, where
    `qk_norm_eps` is given. dropout: of the softmax, in training. The slot wraps the core (q, k, v, mask) -> [B, T, N, H]:
    prefix tuning sits there. implementation: what computes causal attention without a mask, by `use_kernel`.
    """

    implementation: str = "xla"

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
        norm: type[RMSNorm] = RMSNorm,
        scale: float | None = None,
        softcap: float | None = None,
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
            self.query_norm = norm(head_dim, eps=qk_norm_eps, axis="head_dim", dtype=dtype)
            self.key_norm = norm(head_dim, eps=qk_norm_eps, axis="head_dim", dtype=dtype)
        self.scale, self.softcap, self.dropout = scale, softcap, Dropout(dropout)
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
        q, k, v = self.project(x)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            start = (0, offset, 0, 0)
            k = jax.lax.dynamic_update_slice(cache[0], k.astype(cache[0].dtype), start)
            v = jax.lax.dynamic_update_slice(cache[1], v.astype(cache[1].dtype), start)
            cache = (k, v)
        attended = self.adapters(self, self.core, q, sharding.whole_length(k), sharding.whole_length(v), mask)
        return self.out(attended.reshape(*x.shape[:2], -1)), cache

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D] -> q [B, T, N, H], k and v [B, T, K, H], q and k not yet rotated."""
        q = self._heads(self.query(x), self.heads)
        k = self._heads(self.key(x), self.kv_heads)
        v = self._heads(self.value(x), self.kv_heads)
        if self.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k, v

    def core(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
        """The base computation: q [B, T, N, H], k and v [B, S, K, H]; a mask of None means causal."""
        if mask is None and self.implementation == "splash":
            return splash(q, k, v, scale=self.scale)
        if mask is None and self.implementation == "cudnn":
            return cudnn(q, k, v, scale=self.scale)
        if self.softcap is None and self.dropout.idle:
            return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=self.scale, is_causal=mask is None)
        return attend(q, k, v, mask, scale=self.scale, cap=self.softcap, dropout=self.dropout)

    def _heads(self, x: jax.Array, heads: int) -> jax.Array:
        return x.reshape(*x.shape[:2], heads, self.head_dim)


class FusedAttention(Attention):
    """Attention whose queries, keys and values are made by one layer, [D, (N + 2 K) * H], in this order.

    linear: the kind of its layers.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        use_bias: bool,
        scale: float | None = None,
        linear: type[Linear] = Linear,
        stddev: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.scale, self.softcap, self.dropout = scale, None, Dropout(0.0)
        common: dict[str, Any] = {"use_bias": use_bias, "stddev": stddev, "dtype": dtype, "rngs": rngs}
        self.qkv = linear(features, (heads + 2 * kv_heads) * head_dim, axes=("embed", "heads"), **common)
        self.out = linear(heads * head_dim, features, axes=("heads", "embed"), **common)
        self.adapters = Slot()

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        ends = (self.heads * self.head_dim, (self.heads + self.kv_heads) * self.head_dim)
        q, k, v = jnp.split(self.qkv(x), ends, axis=-1)
        return self._heads(q, self.heads), self._heads(k, self.kv_heads), self._heads(v, self.kv_heads)


def use_kernel(model: nnx.Module, kernel: str) -> None:
    """Let a fused kernel compute the causal attention of a model's layers: "cudnn" (NVIDIA GPUs) or "splash" (TPUs); "xla"
    has none. Neither holds the scores in memory, [B, N, T, S] in float32. What has a mask stays with XLA.

    Raises:
        ValueError: attention of this model is never causal and without a mask, or has a soft cap or dropout.
    """
    layers = [module for _, module in nnx.iter_modules(model) if isinstance(module, Attention)]
    if kernel != "xla":
        reasons = {
            "sliding windows": any(getattr(getattr(model, "config", None), "windows", ())),
            "a soft cap": any(layer.softcap is not None for layer in layers),
            "dropout": any(layer.dropout.rate for layer in layers),
            "prefix tuning": any(layer.adapters.virtual for layer in layers),
            "no such attention": not layers,
        }
        if found := [reason for reason, holds in reasons.items() if holds]:
            raise ValueError(
                f"attention={kernel!r} is causal attention alone, and a {type(model).__name__} as it is here has "
                f"{' and '.join(found)}; choose 'xla'"
            )
    for layer in layers:
        layer.implementation = kernel


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float | None) -> jax.Array:
    """Causal attention by cuDNN: [B, T, N, H], k and v [B, T, K, H], in bfloat16 or float16."""
    try:
        return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"attention='cudnn' is not possible here: {error}; choose 'xla'") from error


def splash(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float | None, interpret: bool = False) -> jax.Array:
    """Causal attention by jax's flash attention for TPUs: [B, T, N, H], k and v [B, T, K, H]; T a multiple of 128. Each
    device of a mesh takes its own rows, queries and heads. interpret: on another machine than a TPU."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    length, head_dim, parts = q.shape[1], q.shape[3], sharding.parts("length", q.shape[1])
    if length % (128 * parts) or k.shape[1] != length:
        each = f" on each of {parts} devices" if parts > 1 else ""
        raise ValueError(
            f"attention='splash' takes sequences whose length is a multiple of 128{each}, this one has {length}"
        )
    heads = q.shape[2] // sharding.parts("kv_heads", k.shape[2])  # a query's head lies with its key's
    masks = splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length), shard_count=parts)] * heads)
    kernel = splash_attention.make_splash_mha(mask=masks, head_shards=1, q_seq_shards=parts, interpret=interpret)

    def local(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.vmap(kernel)(*(array.swapaxes(1, 2) for array in (q, k, v))).swapaxes(1, 2)

    q = q * jnp.asarray(head_dim**-0.5 if scale is None else scale, q.dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(kernel, q, k, v)
    queries, keys = (
        sharding.partition(("batch", axis, "kv_heads", None), k.shape, mesh)  # type: ignore[arg-type]
        for axis in ("length", None)
    )
    masked = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, queries[1])))
    split = jax.shard_map(local, mesh=mesh, in_specs=(masked, queries, keys, keys), out_specs=queries, check_vma=False)
    return split(kernel, q, k, v)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float | None,
    cap: float | None,
    dropout: Dropout,
) -> jax.Array:
    """dropout(softmax(cap tanh(scale q k^T / cap))) v, scores and softmax in float32 (the cap: Gemma 2, arXiv:2408.00118,
    section 2): what `jax.nn.dot_product_attention` does not have.

    q: [B, T, N, H]; k, v: [B, S, K, H]; mask: bool [B or 1, 1, T, S], None means causal. -> [B, T, N, H].
    """
    batch, length, heads, head_dim = q.shape
    if mask is None:
        mask = jnp.tril(jnp.ones((1, 1, length, k.shape[1]), bool))
    grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)  # [B, T, K, N/K, H]
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores, axis=-1)).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(batch, length, heads, head_dim)
