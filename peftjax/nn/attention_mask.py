"""Attention masks (causal, padding, packed documents, sliding windows), as a description and as arrays."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """Which keys each query of causal attention attends to, without an array of queries times keys.

    Query t is key number offset + t of S keys. It attends to keys s <= offset + t, unless one of these fields excludes
    them, and to the P keys of a prefix, which precede the S keys. `dense` writes this out; `nn.blockwise` and the fused
    kernels read the fields.

    Attributes:
        length: Number of queries, T.
        valid: bool [B, S], false for keys that are padding; None: S = T and none are.
        segments: int [B, T], document index; queries attend only to keys of their own document. None: one document.
        positions: int [B or 1, T], of the queries, counted from the first of the S keys.
        offset: Number of cached keys before the first query.
        shared: Number of first keys, a soft prompt's, that all documents attend to.
        prefix: Number of keys of a prefix, P, that all documents attend to.
        windows: The different windows of the model's layers, 0 for none; empty if no layer has one.
        window: int32 [], one of `windows`: keys at this distance or further are excluded. None: not yet set for a layer.
        chunked: Whether the windows are sizes of chunks (see `reach`). Chunks start at the first key of a prefix.
        implementation: The implementation to use, one of `nn.fused.IMPLEMENTATIONS`.
    """

    length: int
    positions: jax.Array
    valid: jax.Array | None = None
    segments: jax.Array | None = None
    offset: jax.Array | int = 0
    shared: int = 0
    prefix: int = 0
    windows: tuple[int, ...] = ()
    window: jax.Array | None = None
    chunked: bool = False
    implementation: str = "blockwise"

    def of_layer(self, window: jax.Array) -> "AttentionMask":
        """The mask of a layer with this window."""
        return dataclasses.replace(self, window=window) if self.windows else self

    def dense(self) -> "DenseMask":
        """The mask as arrays. With windows, they cover the prefix; without, the prefix adapter extends them."""
        if self.valid is None and self.segments is None and not self.windows:
            return DenseMask(None, None)
        allowed = attention_mask(
            self.length, valid=self.valid, segments=self.segments, offset=self.offset, shared=self.shared
        )
        if not self.windows:
            return DenseMask(allowed, None)
        distances = key_distances(self.positions, allowed.shape[3], self.offset, self.shared)
        if self.prefix:  # its keys are at the positions 0, 1, ... of every document, before those counted here
            back = self.positions[:, None, :, None] + self.prefix - jnp.arange(self.prefix)[None, None, None]
            rows = max(len(back), len(distances))
            both = [jnp.broadcast_to(part, (rows, *part.shape[1:])) for part in (back, distances)]
            distances = jnp.concatenate(both, axis=3)  # [B or 1, 1, T, P + S]
            allowed = jnp.pad(allowed, ((0, 0),) * 3 + ((self.prefix, 0),), constant_values=True)
        places = self.positions[:, None, :, None] + self.prefix if self.chunked else None
        return DenseMask(allowed, distances, places)


@dataclasses.dataclass(frozen=True)
class DenseMask:
    """An attention mask as arrays.

    Attributes:
        allowed: bool [B or 1, 1, T, S], without windows; None: causal.
        distances: int [B or 1, 1, T, S], from each query back to each key; None for a model without windows.
        places: int [B or 1, 1, T, 1], the positions of the queries if windows are chunks; else None.
    """

    allowed: jax.Array | None
    distances: jax.Array | None
    places: jax.Array | None = None

    def of_layer(self, window: jax.Array) -> jax.Array | None:
        """The mask of a layer with this window, bool [B or 1, 1, T, S]; None: causal."""
        if self.allowed is None or self.distances is None:
            return self.allowed
        reached = window if self.places is None else reach(window, self.places)
        return within_window(self.allowed, reached, self.distances)


def reach(chunk: jax.Array, places: jax.Array) -> jax.Array:
    """Return the windows in which queries at positions p see only their own chunk: p mod chunk + 1, or 0 if chunk is 0."""
    return jnp.where(chunk == 0, 0, places % jnp.maximum(chunk, 1) + 1)


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
        positions: int [B or 1, T], of the queries, counted from the first key of their document. Within a document, two
            keys are as far apart as their positions.
        keys: Number of keys, S.
        offset: Index of the first query among the keys.
        shared: Number of first keys, at positions 0, 1, ... of every document.
    """
    queries, slots = offset + jnp.arange(positions.shape[1]), jnp.arange(keys)
    within = (queries[:, None] - slots[None, :])[None, None]  # [1, 1, T, S]
    if not shared:
        return within
    return jnp.where((slots < shared)[None, None, None], (positions[:, :, None] - slots[None, None])[:, None], within)


def within_window(mask: jax.Array, window: jax.Array, distances: jax.Array) -> jax.Array:
    """Remove keys that are `window` or more positions back from a mask; a window of 0 has no limit."""
    return mask & ((distances < window) | (window == 0))
