"""Sharding inside of a program, on the current mesh (`jax.set_mesh`)."""

from collections.abc import Sequence
from typing import TypeVar

import jax
from jax.sharding import PartitionSpec

from peftjax.quant.base import Quantized
from peftjax.sharding.table import TABLE, count_shards, partition

K = TypeVar("K", bound=jax.Array | Quantized)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Shard x by the table on the current mesh (`jax.set_mesh`); without one x is unchanged."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, mesh))


def constrain_looked_up(x: jax.Array, features: str | None) -> jax.Array:
    """Shard rows of a table, [B, T, D], that were looked up on the current mesh: by features, as the table, and by "data".

    The compiler can go from there to rows sharded by batch and length. By itself it does not shard looked-up rows by "data",
    and then has to replicate them: each device would hold the rows of the whole batch.

    Args:
        x: The rows.
        features: The logical axis of their features.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.ndim != 3 or min(mesh.shape.get("data", 1), shard_count(features or "", x.shape[-1])) == 1:
        return x
    batch = "data" if x.shape[0] % mesh.shape["data"] == 0 else None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(batch, None, *partition((features,), x.shape[-1:], mesh)))


def on_current_mesh(axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """Return how the current mesh shards an array with these logical axes."""
    return partition(axes, shape, jax.sharding.get_abstract_mesh())


def shard_count(axis: str, size: int) -> int:
    """Return the number of parts into which the current mesh shards a dimension."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else count_shards(partition((axis,), (size,), mesh), mesh)


def _splits_length() -> bool:
    """Whether the current mesh shards the length."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape.get("sequence", 1) > 1


def whole_length(x: jax.Array) -> jax.Array:
    """Replicate keys or values, [B, S, K, H], over the devices that shard the length: each query needs all of them.

    Unchanged if the current mesh does not shard the length.
    """
    return constrain(x, "batch", None, "kv_heads", None) if _splits_length() else x


def attention_partitions(q: jax.Array, k: jax.Array) -> tuple[PartitionSpec, PartitionSpec]:
    """Return how the current mesh shards queries [B, T, N, H], and keys and values [B, S, K, H].

    A query head is on the device of its key head. Each device has the keys of all positions.
    """
    queries = on_current_mesh(("batch", "length", "kv_heads", None), (k.shape[0], q.shape[1], *k.shape[2:]))
    return queries, on_current_mesh(("batch", None, "kv_heads", None), k.shape)


def gathered(kernel: K, axes: Sequence[str | None]) -> K:
    """Gather a kernel onto the devices of the current mesh that shard the batch or the length.

    Used where the compiler alone would do worse. It would decode a quantized kernel before sending it, which takes four times
    as much communication and memory. If the length is sharded, as the kernel's inputs are, it would shard the activations by
    features instead, and each device would compute all positions.

    Args:
        kernel: An array or a quantized kernel.
        axes: Its logical axes.
    """
    if not (isinstance(kernel, Quantized) or _splits_length()):
        return kernel
    split = {*TABLE["batch"], *TABLE["length"]}
    kept = tuple(None if set(TABLE.get(axis or "", ())) & split else axis for axis in axes)
    leaves, structure = jax.tree.flatten(kernel)
    of_leaves = kernel.axes(kept) if isinstance(kernel, Quantized) else [kept]
    placed = [constrain(leaf, *own) for leaf, own in zip(leaves, of_leaves, strict=True)]
    gathered: K = jax.tree.unflatten(structure, placed)
    return gathered
