"""The key/value cache of causal attention."""

import dataclasses
from functools import partial

import jax

LayerCache = tuple[jax.Array, jax.Array]  # keys and values of one layer, [B, S, K, H] each


@partial(jax.tree_util.register_dataclass, data_fields=["key", "value", "valid", "length"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far.

    Attributes:
        key: [L, B, S, K, H].
        value: [L, B, S, K, H].
        valid: bool [B, S], true where a real token was written.
        length: int32 [], number of positions in use.
    """

    key: jax.Array
    value: jax.Array
    valid: jax.Array
    length: jax.Array


def extend_valid(cache: Cache | None, mask: jax.Array) -> jax.Array:
    """Return which keys are real tokens once T tokens with `mask`, bool [B, T], are written: bool [B, S]."""
    if cache is None:
        return mask
    return jax.lax.dynamic_update_slice(cache.valid, mask, (0, cache.length))
