"""Attention block by block, whose memory grows linearly with the length: Rabe and Staats 2021 (arXiv:2112.05682).

Scores exist for one block of queries and one block of keys at a time. The softmax is computed online, and the backward pass
computes the scores again from the queries, the keys and the saved logsumexp (Dao 2023, arXiv:2307.08691, algorithms 1 and
2). Blocks in which no query may attend to any key are skipped where positions alone decide it.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from peftjax import sharding
from peftjax.nn.attention_mask import AttentionMask, reach

BLOCK = 512  # queries or keys: scores of 1 MiB for each head and row
_LOWEST = -0.7 * float(np.finfo(np.float32).max)  # below every score; the difference of two of them is finite

_Arrays = Mapping[str, jax.Array]  # of a mask, by name
_Pairs = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static part of the computation: the sizes, and which pairs of blocks are computed.

    Attributes:
        scale: Factor on the scores.
        cap: Soft cap of the scores; None: no cap.
        queries, keys: Size of a block of queries, and of keys.
        length: Number of keys, P + S.
        prefix, shared, chunked: As in `AttentionMask`.
        pairs: The indices of the blocks of queries and of keys to compute, sorted by the former.
    """

    scale: float
    cap: float | None
    queries: int
    keys: int
    length: int
    prefix: int
    shared: int
    chunked: bool
    pairs: tuple[tuple[int, int], ...]


def blockwise(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: AttentionMask,
    *,
    scale: float | None,
    cap: float | None,
    sinks: jax.Array | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """softmax(cap tanh(scale q k^T / cap)) v in blocks, with scores and sums in float32.

    A query that may attend to no key gets zeros, whereas dense attention averages all values. Such a query is padding.

    Args:
        q: Queries [B, T, N, H].
        k: Keys [B, P + S, K, H], prefix keys first.
        v: Values [B, P + S, K, H].
        mask: Which keys each query attends to; its offset is 0.
        scale: Factor on the scores; None: 1 / sqrt(H).
        cap: Soft cap of the scores; None: no cap.
        sinks: [N], the score of an additional key in each head, whose value is zero; None: no sinks.
        block: The largest number of queries or keys in a block.

    Returns:
        [B, T, N, H].
    """
    parts = sharding.shard_count("length", q.shape[1])
    plan = _plan(q, k, mask, scale, cap, block, parts)
    arrays = {
        name: array
        for name, array in (
            ("valid", mask.valid),
            ("query_segments", mask.segments),
            ("key_segments", mask.segments),
            ("positions", mask.positions if mask.windows and (mask.prefix or mask.shared or mask.chunked) else None),
            ("window", mask.window),
        )
        if array is not None
    }
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _attention(plan, q, k, v, sinks, arrays | {"offset": jnp.zeros((), jnp.int32)})
    queries, keys = sharding.attention_partitions(q, k)
    of_sinks = None if sinks is None else PartitionSpec(queries[2])
    specs = {
        name: sharding.partition(("batch", "length" if name in _BY_QUERY else None)[: array.ndim], array.shape, mesh)
        for name, array in arrays.items()
    }
    names = queries[1] or ()

    def local(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, arrays: _Arrays) -> jax.Array:
        first = jax.lax.axis_index(names) * q.shape[1] if parts > 1 else jnp.zeros((), jnp.int32)
        return _attention(plan, q, k, v, sinks, {**arrays, "offset": first})

    in_specs = (queries, keys, keys, of_sinks, specs)
    split = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=queries, check_vma=False)
    return split(q, k, v, sinks, arrays)


_BY_QUERY = ("query_segments", "positions")  # sharded as the queries are


def _plan(
    q: jax.Array, k: jax.Array, mask: AttentionMask, scale: float | None, cap: float | None, block: int, parts: int
) -> _Plan:
    own, length = q.shape[1] // parts, k.shape[1]
    queries, keys = _block_size(own, block), _block_size(length, block)
    widest = max(mask.windows, default=0) if all(mask.windows) else 0
    everyone = mask.prefix + mask.shared  # whether a window reaches these keys depends on the values of `positions`

    def seen(i: int, j: int) -> bool:
        first, last = j * keys - mask.prefix, (j + 1) * keys - 1 - mask.prefix  # among the keys of the sequence
        far = widest and i * queries - last >= widest and j * keys >= everyone
        return first < (i + 1) * queries and not far

    pairs = [(i, j) for i in range(-(-own // queries)) for j in range(-(-length // keys)) if parts > 1 or seen(i, j)]
    factor = q.shape[3] ** -0.5 if scale is None else scale
    return _Plan(factor, cap, queries, keys, length, mask.prefix, mask.shared, mask.chunked, tuple(pairs))


def _block_size(length: int, block: int) -> int:
    """The size of as few equal blocks as possible. With several, it is a multiple of the TPU's 128 lanes if `block` is."""
    count = -(-length // block)
    size, multiple = -(-length // count), math.gcd(block, 128)
    return size if count == 1 else -(-size // multiple) * multiple


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    plan: _Plan, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, mask: _Arrays
) -> jax.Array:
    return _forward(plan, q, k, v, sinks, mask)[0]


def _forward(
    plan: _Plan, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, mask: _Arrays
) -> tuple[jax.Array, tuple]:
    """The output, and what the backward pass needs: the arguments, the output and its logsumexp, [B, K, G, T]."""
    queries, masks = _query_blocks(plan, q, k), _mask_blocks(plan, mask)
    keys, values = _key_blocks(plan, k), _key_blocks(plan, v)
    row = (*queries.shape[1:-1],)  # B, K, G, t
    lowest = jnp.full(row, _LOWEST, jnp.float32)
    empty = (
        lowest if sinks is None else jnp.broadcast_to(_of_heads(sinks, row), row),
        jnp.zeros(row, jnp.float32) if sinks is None else jnp.ones(row, jnp.float32),
        jnp.zeros(queries.shape[1:], jnp.float32),
    )

    def step(carry: Any, pair: _Pairs) -> tuple[Any, None]:
        (highest, total, summed), out, logs = carry
        i, j, starts = pair
        highest, total, summed = (
            jnp.where(starts == 1, new, old) for new, old in zip(empty, (highest, total, summed), strict=True)
        )
        scores, allowed = _scores(plan, _at(queries, i), _at(keys, j), masks, i, j)
        new = jnp.maximum(highest, jnp.max(jnp.where(allowed, scores, _LOWEST), axis=-1))
        weights = _weights(scores, allowed, new)
        kept = jnp.exp(highest - new)
        total = kept * total + jnp.sum(weights, axis=-1)
        added = _product("bkgts,bksh->bkgth", weights.astype(v.dtype), _at(values, j))
        summed = kept[..., None] * summed + added
        divisor = jnp.where(total == 0, 1.0, total)  # zeros without any key
        out = _put(out, i, (summed / divisor[..., None]).astype(q.dtype))
        logs = _put(logs, i, jnp.where(total == 0, jnp.inf, new + jnp.log(divisor)))
        return ((new, total, summed), out, logs), None

    logs = jnp.zeros((len(queries), *row), jnp.float32)
    (_, out, logs), _ = jax.lax.scan(step, (empty, jnp.zeros_like(queries), logs), _pairs(plan, q))
    out = _joined(out, q)
    return out, (q, k, v, sinks, mask, out, logs)


def _backward(plan: _Plan, saved: tuple, gradient: jax.Array) -> tuple:
    q, k, v, sinks, mask, out, logs = saved
    queries, masks = _query_blocks(plan, q, k), _mask_blocks(plan, mask)
    keys, values = _key_blocks(plan, k), _key_blocks(plan, v)
    gradients = _query_blocks(plan, gradient, k)
    along = jnp.sum(_query_blocks(plan, out, k).astype(jnp.float32) * gradients.astype(jnp.float32), axis=-1)

    def step(carry: Any, pair: _Pairs) -> tuple[Any, None]:
        d_queries, d_keys, d_values = carry
        i, j, _ = pair
        scores, allowed = _scores(plan, _at(queries, i), _at(keys, j), masks, i, j)
        weights = _weights(scores, allowed, _at(logs, i))  # [B, K, G, t, s]
        d_values = _add(d_values, j, _product("bkgts,bkgth->bksh", weights.astype(q.dtype), _at(gradients, i)))
        d_weights = _product("bkgth,bksh->bkgts", _at(gradients, i), _at(values, j))
        d_scores = weights * (d_weights - _at(along, i)[..., None]) * plan.scale
        if plan.cap is not None:
            d_scores = d_scores * (1 - jnp.square(scores / plan.cap))
        d_scores = d_scores.astype(q.dtype)
        d_queries = _add(d_queries, i, _product("bkgts,bksh->bkgth", d_scores, _at(keys, j)))
        d_keys = _add(d_keys, j, _product("bkgts,bkgth->bksh", d_scores, _at(queries, i)))
        return (d_queries, d_keys, d_values), None

    zeros = tuple(jnp.zeros(blocks.shape, jnp.float32) for blocks in (queries, keys, values))
    (d_queries, d_keys, d_values), _ = jax.lax.scan(step, zeros, _pairs(plan, q))
    d_sinks = None
    if sinks is not None:
        of_block = -jnp.exp(_of_heads(sinks, logs.shape[1:])[None] - logs) * along  # the sink's value is zero
        d_sinks = jnp.sum(of_block, axis=(0, 1, 4)).reshape(sinks.shape)
    d_keys, d_values = d_keys[:, :, :, None], d_values[:, :, :, None]
    return _joined(d_queries, q), _joined(d_keys, k), _joined(d_values, v), d_sinks, None


_attention.defvjp(_forward, _backward)


def _of_heads(sinks: jax.Array, row: tuple[int, ...]) -> jax.Array:
    """[N] -> [1, K, G, 1], for rows [B, K, G, t]."""
    return sinks.reshape(1, *row[1:3], 1)


def _pairs(plan: _Plan, q: jax.Array) -> _Pairs:
    """The block of queries and the block of keys of each step, and 1 where a block of queries starts.

    The barrier makes them depend on the queries. Otherwise JAX would move the masks of all pairs of blocks, which depend on
    these indices alone, out of a scan over layers and keep them in memory. Their size grows with the square of the length.
    """
    i, j = np.array(plan.pairs, np.int32).T
    pairs = jnp.asarray(i), jnp.asarray(j), jnp.asarray(np.diff(i, prepend=-1) != 0, jnp.int32)
    i, j, starts, _ = jax.lax.optimization_barrier((*pairs, jax.lax.stop_gradient(q[:1, :1, :1, :1])))
    return i, j, starts


def _scores(
    plan: _Plan, queries: jax.Array, keys: jax.Array, masks: _Arrays, i: jax.Array, j: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The scores of a pair of blocks, [B, K, G, t, s], and which of them are allowed, bool [B or 1, 1, 1, t, s]."""
    scores = _product("bkgth,bksh->bkgts", queries, keys) * plan.scale
    if plan.cap is not None:
        scores = plan.cap * jnp.tanh(scores / plan.cap)
    index = j * plan.keys + jnp.arange(plan.keys)[None]
    slot = index - plan.prefix  # [1, s], negative in the prefix
    query = masks["offset"] + i * plan.queries + jnp.arange(plan.queries)[:, None]  # [t, 1]
    allowed = ((slot <= query) & (index < plan.length))[None]  # [1, t, s]
    everyones = (slot < plan.shared)[None]
    if "valid" in masks:
        allowed = allowed & _at(masks["valid"], j)[:, None]
    if "query_segments" in masks:
        same = _at(masks["query_segments"], i)[:, :, None] == _at(masks["key_segments"], j)[:, None]
        allowed = allowed & (same | everyones)
    if "window" in masks:
        back = (query - slot)[None]
        if "positions" in masks:
            back = jnp.where(everyones, _at(masks["positions"], i)[:, :, None] - slot[None], back)
        window = masks["window"]
        if plan.chunked:
            window = reach(window, _at(masks["positions"], i)[:, :, None] + plan.prefix)
        allowed = allowed & ((back < window) | (window == 0))
    return scores, allowed[:, None, None]


def _weights(scores: jax.Array, allowed: jax.Array, shift: jax.Array) -> jax.Array:
    """exp(scores - shift) where a key is allowed, else 0: [B, K, G, t, s], with one shift for each query.

    The exponent is masked, not the result. Otherwise the result would be infinite for a query that may attend to no key, and
    a second derivative of the attention would be NaN.
    """
    return jnp.exp(jnp.where(allowed, scores - shift[..., None], _LOWEST))


def _mask_blocks(plan: _Plan, mask: _Arrays) -> _Arrays:
    """The arrays of a mask in blocks: [blocks, B or 1, t or s]."""

    def cut(name: str, array: jax.Array) -> jax.Array:
        if array.ndim == 0:
            return array
        before, size = (0, plan.queries) if name in _BY_QUERY else (plan.prefix, plan.keys)
        after = -(before + array.shape[1]) % size
        array = jnp.pad(array, ((0, 0), (before, after)), constant_values=name == "valid")
        return array.reshape(len(array), -1, size).swapaxes(0, 1)

    return {name: cut(name, array) for name, array in mask.items()}


def _query_blocks(plan: _Plan, x: jax.Array, k: jax.Array) -> jax.Array:
    """[B, T, N, H] -> [blocks, B, K, G, t, H]."""
    batch, length, heads, head_dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % plan.queries), (0, 0), (0, 0)))
    x = x.reshape(batch, -1, plan.queries, k.shape[2], heads // k.shape[2], head_dim)
    return jnp.transpose(x, (1, 0, 3, 4, 2, 5))


def _key_blocks(plan: _Plan, x: jax.Array) -> jax.Array:
    """[B, P + S, K, H] -> [blocks, B, K, s, H]."""
    batch, length, heads, head_dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % plan.keys), (0, 0), (0, 0)))
    return jnp.transpose(x.reshape(batch, -1, plan.keys, heads, head_dim), (1, 0, 3, 2, 4))


def _joined(blocks: jax.Array, x: jax.Array) -> jax.Array:
    """[blocks, B, K, G, t, H] -> the shape [B, T, N, H] and the dtype of x."""
    batch, length, heads, head_dim = x.shape
    joined = jnp.transpose(blocks, (1, 0, 4, 2, 3, 5)).reshape(batch, -1, heads, head_dim)
    return joined[:, :length].astype(x.dtype)


def _product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _at(blocks: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(blocks, index, 0, keepdims=False)


def _put(blocks: jax.Array, index: jax.Array, block: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(blocks, block, index, 0)


def _add(blocks: jax.Array, index: jax.Array, block: jax.Array) -> jax.Array:
    return _put(blocks, index, _at(blocks, index) + block)
