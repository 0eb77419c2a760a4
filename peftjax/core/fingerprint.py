"""Fingerprints of arrays, computed on their devices.

They identify the base model of an adapter and verify that a restored checkpoint equals the one that was saved.
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

from peftjax.core import host_arrays


def fingerprint(tree: Any) -> str:
    """Compute a 64-bit digest, 16 hexadecimal digits, of the names, shapes, dtypes and contents of a tree of arrays.

    The digest does not depend on the sharding or the number of devices. Any flipped bit changes it, and so does any
    exchange of elements, except with a probability of about 2^-60. Only two integers per array are copied to the host,
    and no temporary array is allocated. The digest detects accidental changes; it does not resist deliberate collisions.

    Args:
        tree: Pytree of `jax.Array` of any float, integer (including int4), bool or PRNG key dtype, usually a flat
            {path: array} dictionary. Nodes without leaves, such as `optax.MaskedNode` and None, are ignored.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = []
    for _, leaf in leaves:  # dispatch all before copying the first
        sums.append(_mixed_sums(leaf))
        host_arrays.wait_on_cpus(sums[-1])
    rows = []
    for (path, leaf), pair in zip(leaves, sums, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        rows.append([name, list(leaf.shape), str(leaf.dtype), *np.asarray(pair).tolist()])
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()[:16]


def marks(arrays: Mapping[str, jax.Array | np.ndarray]) -> dict[str, str]:
    """Compute a digest, 16 hexadecimal digits, of a sample of each array of any float dtype, rounded to bfloat16.

    The sample covers at most 64 x 64 evenly spaced positions of the last two axes, at every index of the other axes. The
    same weights stored in float32 and in bfloat16 therefore have the same marks, and further training changes them. For
    the largest models the computation takes no longer than the forward pass of one token.
    """
    sums = jax.device_get(_sampled_sums(dict(arrays)))
    return {path: "{:08x}{:08x}".format(*pair) for path, pair in sums.items()}


@jax.jit
def _sampled_sums(arrays: dict[str, Any]) -> dict[str, jax.Array]:
    def sample(x: Any) -> Any:
        spread = [slice(None, None, -(-size // 64)) for size in x.shape[-2:]]
        return x[(..., *spread)].astype(jnp.bfloat16)

    return {path: _mixed_sums(sample(x)) for path, x in arrays.items()}


@jax.jit
def _mixed_sums(x: jax.Array) -> jax.Array:
    """Sum two position-dependent mixes of the bits of x modulo 2^32.

    y_i = mix(x_i ^ k_i) and z_i = y_i (k'_i | 1), where k and k' are hashes of the position i. Both are one-to-one in
    x_i, so a change of one element always changes both sums. An odd multiplier alone (x_i k_i) would miss an exchange of
    1.0 and -1.0: their bits differ by 2^31, and 2^31 times an even difference of multipliers is 0 modulo 2^32. Therefore
    mix is applied first. Integer sums are exact in any order, so the sharding of x does not matter. A position is a pair
    of a row (all axes but the last) and a column, because an array may have more than 2^32 elements. One reduction
    computes both sums; with two, XLA would materialize y.

    Returns:
        [2] uint32.
    """
    bits = _bits(x)
    row = jnp.zeros((*bits.shape[:-1], 1), jnp.uint32)
    for axis in range(bits.ndim - 1):
        stride = math.prod(bits.shape[axis + 1 : -1]) % 2**32
        row += lax.broadcasted_iota(jnp.uint32, row.shape, axis) * np.uint32(stride)
    column = lax.broadcasted_iota(jnp.uint32, bits.shape, bits.ndim - 1)
    key = mix(row ^ np.uint32(0x68E31DA4)) + column * np.uint32(0x9E3779B1)
    odd = (mix(row ^ np.uint32(0xB5297A4D)) + column * np.uint32(0x7FEB352D)) | np.uint32(1)
    y = mix(bits ^ key)
    zero = np.uint32(0)
    sums = lax.reduce((y, y * odd), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(bits.ndim)))
    return jnp.stack(sums)


def mix(x: jax.Array) -> jax.Array:
    """Apply fmix32 of MurmurHash3, a bijection of uint32 in which every input bit affects every output bit."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _bits(x: jax.Array) -> jax.Array:
    """Reinterpret x as uint32 with at least one axis: one word per element, two for 64-bit dtypes."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    x = jnp.atleast_1d(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = jnp.finfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).bits
    if width >= 32:
        return lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
