"""Implementations of attention beside `jax.nn.dot_product_attention`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from peftjax import sharding
from peftjax.core.errors import UserError
from peftjax.nn.dropout import Dropout

SPLASH_BLOCK = 128  # positions


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float | None) -> jax.Array:
    """Causal attention by cuDNN: q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H], in bfloat16 or float16.

    Raises:
        UserError: cuDNN does not support the device, the dtype or the shape.
    """
    try:
        return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(f"attention='cudnn' is not possible here: {error}; choose 'xla'") from error


def splash(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float | None, interpret: bool = False) -> jax.Array:
    """Causal attention by JAX's flash attention for TPUs: q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H].

    Each device of a mesh computes its own rows, queries and heads.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        scale: Factor on the scores; None: 1 / sqrt(H).
        interpret: Emulate the kernel, on machines without a TPU.

    Raises:
        UserError: T is not a multiple of 128 on each device.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention

    length, head_dim, parts = q.shape[1], q.shape[3], sharding.parts("length", q.shape[1])
    if length % (SPLASH_BLOCK * parts) or k.shape[1] != length:
        each = f" on each of {parts} devices" if parts > 1 else ""
        raise UserError(
            f"attention='splash' takes sequences whose length is a multiple of {SPLASH_BLOCK}{each}, but this one has {length}"
        )
    heads = q.shape[2] // sharding.parts("kv_heads", k.shape[2])  # a query head is on the device of its key head
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
    """dropout(softmax(cap tanh(scale q k^T / cap))) v, with scores and softmax in float32.

    For what `jax.nn.dot_product_attention` does not have: dropout, and the soft cap of Gemma 2 (arXiv:2408.00118,
    section 2).

    Args:
        q: [B, T, N, H].
        k: [B, S, K, H].
        v: [B, S, K, H].
        mask: bool [B or 1, 1, T, S]; None: causal.
        scale: Factor on the scores; None: 1 / sqrt(H).
        cap: Soft cap of the scores; None: no cap.
        dropout: Applied to the attention probabilities.

    Returns:
        [B, T, N, H].
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
