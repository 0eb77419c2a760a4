"""Moving arrays between host and devices, in one process or in several that each hold a part of them."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def wait_on_cpus(tree: Any) -> None:
    """Wait for a pytree of arrays if this process has several CPU devices; otherwise, return immediately.

    XLA's CPU client admits at most 32 programs per device. A loop that dispatches more of them before it waits can
    deadlock: a program may be admitted on some devices only, where it waits for the others in a collective.
    """
    if jax.default_backend() == "cpu" and jax.local_device_count() > 1:
        jax.block_until_ready(tree)


def whole(array: jax.Array) -> np.ndarray:
    """Gather an array with any sharding into the memory of this process. Shape and dtype stay the same.

    If it is sharded across processes, every process must call this function.
    """
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def placed(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Shard a host array, the same full array in every process, across the devices of all processes."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


class OnHost:
    """An array moved to host memory: each process keeps one copy of every distinct shard that its devices held."""

    def __init__(self, array: jax.Array) -> None:
        self.shape, self.dtype, self._sharding = array.shape, array.dtype, array.sharding
        shards = {_where(shard.index): shard for shard in array.addressable_shards}
        self._parts = {where: np.asarray(shard.data) for where, shard in shards.items()}

    def back(self) -> jax.Array:
        """Return the array to the devices with its original sharding."""
        return jax.make_array_from_callback(self.shape, self._sharding, lambda index: self._parts[_where(index)])

    def __reduce__(self) -> tuple[Any, ...]:
        return OnHost, (self.back(),)  # devices cannot be pickled, and the pickle of an array has none


def _where(index: tuple[slice, ...] | None) -> tuple[tuple[int | None, int | None], ...]:
    return tuple((part.start, part.stop) for part in index or ())
