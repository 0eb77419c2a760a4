"""Implementations of attention other than `jax.nn.dot_product_attention`."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from peftjax import sharding
from peftjax.core.errors import UserError
from peftjax.nn.attention_mask import AttentionMask
from peftjax.nn.dropout import Dropout

SPLASH_BLOCK = 128  # positions
_SPLASH_BLOCKS = (512, 256, SPLASH_BLOCK)  # larger blocks read the keys less often
_TRITON_BLOCK, _TRITON_BACKWARD = 128, 32  # positions, in the forward and the backward pass
_PADDING = -(2**31)  # segment of keys that are padding


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask, *, scale: float | None) -> jax.Array:
    """Causal attention by cuDNN: q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H], in bfloat16 or float16.

    Only the window of the mask is used.

    Raises:
        UserError: cuDNN does not support the device, the dtype or the shape.
    """

    def compute(window: int) -> jax.Array:
        local = (window - 1, 0) if window else None
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=True, local_window_size=local, implementation="cudnn"
        )

    try:
        return _by_window(mask, compute)
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(f"attention='cudnn' is not possible here: {error}; choose 'xla'") from error


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: AttentionMask,
    *,
    scale: float | None,
    cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention by JAX's flash attention for TPUs: q [B, T, N, H], k and v [B, P + T, K, H] -> [B, T, N, H].

    Each device of a mesh computes its own rows, queries and heads. A query that may attend to no key gets an average of
    some values, whereas dense attention averages all of them.

    Args:
        q: Queries.
        k: Keys, prefix keys first.
        v: Values.
        mask: Which keys each query attends to.
        scale: Factor on the scores; None: 1 / sqrt(H).
        cap: Soft cap of the scores; None: no cap.
        interpret: Emulate the kernel, on machines without a TPU.

    Raises:
        UserError: T is not a multiple of 128 on each device.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention

    length, head_dim, parts = q.shape[1], q.shape[3], sharding.shard_count("length", q.shape[1])
    if length % (SPLASH_BLOCK * parts) or k.shape[1] != mask.prefix + length:
        each = f" on each of {parts} devices" if parts > 1 else ""
        raise UserError(
            f"attention='splash' needs a length that is a multiple of {SPLASH_BLOCK}{each}, got {length}; choose 'auto'"
        )
    q = q * jnp.asarray(head_dim**-0.5 if scale is None else scale, q.dtype)
    segments = _splash_segments(q, mask)
    after = -mask.prefix % SPLASH_BLOCK  # padding after the last query, to which causal attention does not reach
    k, v = (jnp.pad(array, ((0, 0), (0, after), (0, 0), (0, 0))) for array in (k, v))
    shape, own = (length, k.shape[1]), length // parts
    heads = q.shape[2] // sharding.shard_count("kv_heads", k.shape[2])  # a query head is on the device of its key head
    rows, columns = (next(size for size in _SPLASH_BLOCKS if n % size == 0) for n in (own, shape[1]))
    sizes = splash_attention.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )

    def local(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, segments: Any) -> jax.Array:
        ids = None if segments is None else splash_attention.SegmentIds(*segments)
        return jax.vmap(kernel)(*(array.swapaxes(1, 2) for array in (q, k, v)), ids).swapaxes(1, 2)

    def compute(window: int) -> jax.Array:
        one = (
            splash_attention.LocalMask(shape, (window - 1, 0), mask.prefix, shard_count=parts)
            if window
            else splash_attention.CausalMask(shape, mask.prefix, shard_count=parts)
        )
        kernel = splash_attention.make_splash_mha(
            mask=splash_attention.MultiHeadMask([one] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=parts,
            attn_logits_soft_cap=cap,
            interpret=interpret,
        )
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return local(kernel, q, k, v, segments)
        queries, keys = sharding.attention_partitions(q, k)
        masked = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, queries[1])))
        ids = None if segments is None else (PartitionSpec(*queries[:2]), PartitionSpec(*keys[:2]))
        specs = (masked, queries, keys, keys, ids)
        split = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=queries, check_vma=False)
        return split(kernel, q, k, v, segments)

    return _by_window(mask, compute)


def _splash_segments(q: jax.Array, mask: AttentionMask) -> tuple[jax.Array, jax.Array] | None:
    """The segments of the queries, int [B, T], and of the padded keys. Keys that are not valid have their own segment."""
    if mask.segments is None and mask.valid is None:
        return None
    queries = jnp.zeros(q.shape[:2], jnp.int32) if mask.segments is None else mask.segments.astype(jnp.int32)
    keys = queries if mask.valid is None else jnp.where(mask.valid, queries, _PADDING)
    return queries, jnp.pad(keys, ((0, 0), (mask.prefix, -mask.prefix % SPLASH_BLOCK)))


def triton(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: AttentionMask,
    *,
    scale: float | None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention by JAX's flash attention for GPUs: q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H].

    T is a multiple of 128. Only the segments of the mask are used. Each device of a mesh computes its own rows and heads.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: Which keys each query attends to.
        scale: Factor on the scores; None: 1 / sqrt(H).
        interpret: Emulate the kernel, on machines without a GPU.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # jax 0.12 deprecates it in favor of tokamax
        from jax.experimental.pallas.ops.gpu import attention

    sizes = attention.BlockSizes(
        block_q=_TRITON_BLOCK,
        block_k=_TRITON_BLOCK,
        block_q_dkv=_TRITON_BACKWARD,
        block_kv_dkv=_TRITON_BACKWARD,
        block_q_dq=_TRITON_BACKWARD,
        block_kv_dq=_TRITON_BACKWARD,
    )

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
        k, v = (jnp.repeat(array, q.shape[2] // array.shape[2], axis=2) for array in (k, v))
        factor = q.shape[3] ** -0.5 if scale is None else scale
        return attention.mha(q, k, v, segments, sm_scale=factor, causal=True, block_sizes=sizes, interpret=interpret)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q, k, v, mask.segments)
    queries, keys = sharding.attention_partitions(q, k)
    ids = None if mask.segments is None else PartitionSpec(*queries[:2])
    specs = (queries, keys, keys, ids)
    split = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=queries, check_vma=False)
    return split(q, k, v, mask.segments)


def _by_window(mask: AttentionMask, compute: Callable[[int], jax.Array]) -> jax.Array:
    """Call `compute` with the window of the mask's layer as a Python number. In the mask it is an array."""
    if not mask.windows:
        return compute(0)
    if len(mask.windows) == 1:
        return compute(mask.windows[0])
    assert mask.window is not None
    index = jnp.searchsorted(jnp.asarray(mask.windows), mask.window)
    return jax.lax.switch(index, [partial(compute, window) for window in mask.windows])


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float | None,
    cap: float | None,
    dropout: Dropout,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """dropout(softmax(cap tanh(scale q k^T / cap))) v, with scores and softmax in float32.

    For what `jax.nn.dot_product_attention` does not have: dropout, the soft cap of Gemma 2 (arXiv:2408.00118, section 2),
    and the sinks of gpt-oss (Xiao et al. 2023, arXiv:2309.17453, section 3.3).

    Args:
        q: [B, T, N, H].
        k: [B, S, K, H].
        v: [B, S, K, H].
        mask: bool [B or 1, 1, T, S]; None: causal.
        scale: Factor on the scores; None: 1 / sqrt(H).
        cap: Soft cap of the scores; None: no cap.
        dropout: Applied to the attention probabilities.
        sinks: [N], the score of an additional key in each head, whose value is zero; None: no sinks.

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
    if sinks is not None:
        of_heads = sinks.astype(jnp.float32).reshape(1, *scores.shape[1:3], 1, 1)
        scores = jnp.concatenate([jnp.broadcast_to(of_heads, (*scores.shape[:-1], 1)), scores], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)
    weights = dropout(weights if sinks is None else weights[..., 1:]).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(batch, length, heads, head_dim)
