"""A short digest of every bit of a tree of arrays, computed where the arrays are.

It says which base an adapter was trained on, and whether a checkpoint read back is the one that was written.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def fingerprint(tree: Any) -> str:
    """Digests the names, shapes, dtypes and all bits of a tree of arrays into 16 hexadecimal digits.

    The same on any sharding and any number of devices; any flipped bit and (but for chance, about 2^-60) any exchange
    of elements changes it. Nothing is copied to the host but two integers an array, and no temporary array is made.
    It guards against accidents, not against somebody who builds a collision on purpose.

    Args:
        tree: a pytree of `jax.Array` (any float, integer, bool, int4 or PRNG key dtype), usually a flat {path: array};
            nodes without leaves (`optax.MaskedNode`, None) count for nothing.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = [_mixed_sums(leaf) for _, leaf in leaves]  # all dispatched before the first one is waited for
    rows = []
    for (path, leaf), pair in zip(leaves, sums, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        rows.append([name, list(leaf.shape), str(leaf.dtype), *np.asarray(pair).tolist()])
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()[:16]


def marks(arrays: Mapping[str, jax.Array | np.ndarray]) -> dict[str, str]:
    """A short digest of a sample of each array: of 64 x 64 elements, spread over its last two axes and in all of the
    others, rounded to bfloat16. So the same weights in float32 and in bfloat16 have the same marks, weights that were
    trained further have others, and the largest model takes no longer than a forward pass of a token."""
    sums = jax.device_get(_sampled_sums(dict(arrays)))
    return {path: "{:08x}{:08x}".format(*pair) for path, pair in sums.items()}


@jax.jit
def _sampled_sums(arrays: dict[str, Any]) -> dict[str, jax.Array]:
    spread = lambda x: tuple(slice(None, None, -(-size // 64)) for size in x.shape[-2:])  # noqa: E731
    return {path: _mixed_sums(x[(..., *spread(x))].astype(jnp.bfloat16)) for path, x in arrays.items()}


@jax.jit
def _mixed_sums(x: jax.Array) -> jax.Array:
    """Sums two position-dependent mixes of the bits of x, modulo 2^32: [2] uint32.

    y_i = mix(x_i ^ k_i) and z_i = y_i (k'_i | 1), with k and k' hashes of the position i. Both are one-to-one in x_i,
    so one changed element always changes both sums. An odd multiplier alone (x_i k_i) would miss the exchange of 1.0
    and -1.0: they differ by 2^31, and 2^31 times an even difference of multipliers is 0 modulo 2^32; hence mix comes
    first. Integer sums are exact in any order: how x is sharded does not matter. Positions are a row (all axes but the
    last) and a column, because an array may hold more than 2^32 elements. Both sums come from one reduction, as two of
    them would make XLA keep y in memory.
    """
    bits = _bits(x)
    row = jnp.zeros((*bits.shape[:-1], 1), jnp.uint32)
    for axis in range(bits.ndim - 1):
        stride = math.prod(bits.shape[axis + 1 : -1]) % 2**32
        row += lax.broadcasted_iota(jnp.uint32, row.shape, axis) * np.uint32(stride)
    column = lax.broadcasted_iota(jnp.uint32, bits.shape, bits.ndim - 1)
    key = _mix(row ^ np.uint32(0x68E31DA4)) + column * np.uint32(0x9E3779B1)
    odd = (_mix(row ^ np.uint32(0xB5297A4D)) + column * np.uint32(0x7FEB352D)) | np.uint32(1)
    y = _mix(bits ^ key)
    zero = np.uint32(0)
    sums = lax.reduce((y, y * odd), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(bits.ndim)))
    return jnp.stack(sums)


def _mix(x: jax.Array) -> jax.Array:
    """Scrambles uint32 one-to-one, so that every bit of x moves every bit of the result (MurmurHash3's fmix32)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _bits(x: jax.Array) -> jax.Array:
    """Reinterprets x as uint32, one word an element (two for 64-bit dtypes), with at least one axis."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    x = jnp.atleast_1d(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = jnp.finfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).bits
    if width >= 32:
        return lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
