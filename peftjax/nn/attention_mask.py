"""Attention masks: causal, padding, packed documents and sliding windows."""

import jax
import jax.numpy as jnp


def attention_mask(
    length: int,
    *,
    valid: jax.Array | None,
    segments: jax.Array | None,
    offset: jax.Array | int = 0,
    shared: int = 0,
) -> jax.Array:
    """Return which keys each query attends to: bool [B or 1, 1, T, S].

    Query t is key number offset + t and attends to no later key.

    Args:
        length: Number of queries, T.
        valid: bool [B, S], true for keys that are real tokens; None: S = T and all are.
        segments: int [B, T], document index; queries attend only to keys of their own document.
        offset: Index of the first query among the keys.
        shared: Number of first keys, a soft prompt's, that all documents attend to.
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
    """Return how many positions each key is before each query: int [B or 1, 1, T, S].

    Args:
        positions: int [B or 1, T], of the queries, counted from the first key of their document. Within a document, the
            distance of two keys equals that of their positions.
        keys: Number of keys, S.
        offset: Index of the first query among the keys.
        shared: Number of first keys, at positions 0, 1, ... of every document.
    """
    queries, slots = offset + jnp.arange(positions.shape[1]), jnp.arange(keys)
    within = (queries[:, None] - slots[None, :])[None, None]  # [1, 1, T, S]
    if not shared:
        return within
    return jnp.where((slots < shared)[None, None, None], (positions[:, :, None] - slots[None, None])[:, None], within)


def with_first_keys(mask: jax.Array, distances: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Put keys that every query may attend to, at distances `first` [B or 1, 1, T, P], before those of a mask.

    Returns:
        The mask and the distances of all P + S keys.
    """
    padded = jnp.pad(mask, ((0, 0),) * 3 + ((first.shape[3], 0),), constant_values=True)
    rows = max(len(distances), len(first))
    both = [jnp.broadcast_to(part, (rows, *part.shape[1:])) for part in (first, distances)]
    return padded, jnp.concatenate(both, axis=3)


def within_window(mask: jax.Array, window: jax.Array, distances: jax.Array) -> jax.Array:
    """Remove keys that are `window` or more positions back from a mask; a window of 0 has no limit."""
    return mask & ((distances < window) | (window == 0))
