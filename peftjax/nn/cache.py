"""The key/value cache of causal attention."""

import dataclasses

import jax

KeysValues = tuple[jax.Array, jax.Array]  # of one layer, [B, S, K, H] each, or of all layers, [L, B, S, K, H]
Carry = tuple[jax.Array, KeysValues | None]  # through the layers: hidden states [B, T, D], and the arrays of a cache


@jax.tree_util.register_dataclass
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


@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer of a cache.

    It holds the arrays of all layers. The loop over layers carries them, and each layer writes its new tokens in place. If
    each layer got a slice and returned a new one, every new token would copy the whole cache.

    Attributes:
        key: [L, B, S, K, H].
        value: [L, B, S, K, H].
        layer: int32 [], index of the layer.
    """

    key: jax.Array
    value: jax.Array
    layer: jax.Array

    def extend(self, k: jax.Array, v: jax.Array, start: jax.Array | int) -> tuple[KeysValues, "LayerCache"]:
        """Write keys and values of T tokens, [B, T, K, H] each, from position `start` on.

        Returns:
            All keys and values of the layer, and the cache with the new ones.
        """
        place = (self.layer, 0, start, 0, 0)
        key, value = (
            jax.lax.dynamic_update_slice(stack, new[None].astype(stack.dtype), place)
            for stack, new in ((self.key, k), (self.value, v))
        )
        k, v = (jax.lax.dynamic_index_in_dim(stack, self.layer, keepdims=False) for stack in (key, value))
        return (k, v), LayerCache(key, value, self.layer)


def extend_valid(cache: Cache | None, mask: jax.Array) -> jax.Array:
    """Return which keys are real tokens once T tokens with `mask`, bool [B, T], are written: bool [B, S]."""
    if cache is None:
        return mask
    return jax.lax.dynamic_update_slice(cache.valid, mask, (0, cache.length))
