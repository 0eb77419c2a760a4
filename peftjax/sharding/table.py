"""One table from logical axes to mesh axes, and how it shards arrays."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from peftjax.core import host_arrays
from peftjax.quant.base import Quantized

# Logical axis -> the mesh axes that shard it. All other axes are replicated.
TABLE: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "embed": ("fsdp", "sequence"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("tensor",),
    "rank": ("fsdp", "sequence"),
}


def partition(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Return how an array with these logical axes is sharded.

    A mesh axis shards only the first dimension that the table assigns to it, and only if it divides that dimension. Other
    dimensions are replicated.
    """
    free = {name: size for name, size in mesh.shape.items() if size > 1}
    entries: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        names = tuple(name for name in TABLE.get(axis or "", ()) if name in free)
        if names and size % math.prod(free[name] for name in names) == 0:
            for name in names:
                del free[name]
            entries.append(names)
        else:
            entries.append(None)
    return PartitionSpec(*entries)


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array with these logical axes."""
    return NamedSharding(mesh, partition(axes, shape, mesh))


def placement(value: Any, axes: Sequence[str | None], mesh: Mesh) -> Any:
    """Return the sharding of a parameter with these logical axes: an array, or a quantized kernel and its leaves."""
    leaves, structure = jax.tree.flatten(value)
    of_leaves = value.axes(tuple(axes)) if isinstance(value, Quantized) else [axes]
    placed = [spec(own, leaf.shape, mesh) for own, leaf in zip(of_leaves, leaves, strict=True)]
    return jax.tree.unflatten(structure, placed)


def as_jit_returns(shardings: Any) -> Any:
    """Return the same shardings as jit spells them, without trailing Nones.

    A function that gets an array first from here and then from jit may otherwise be compiled twice.
    """

    def trimmed(given: NamedSharding) -> NamedSharding:
        names = list(given.spec)
        while names and names[-1] is None:
            names.pop()
        return NamedSharding(given.mesh, PartitionSpec(*names))

    return jax.tree.map(trimmed, shardings)


def undivided(variables: Mapping[str, nnx.Variable], mesh: Mesh) -> dict[str, float]:
    """Return the parameters that are sharded less than the table says, because the mesh does not divide a dimension.

    Returns:
        By path, the additional fraction of the parameter that each device holds. For a quantized kernel, of its codes.
    """
    found = {}
    for path, variable in variables.items():
        value = variable.get_value()
        quantized = isinstance(value, Quantized)
        axes = value.axes(tuple(variable.axes))[0] if quantized else variable.axes
        shape = jax.tree.leaves(value)[0].shape
        divisible = (0,) * len(shape)  # by any number of devices
        wanted, given = (count_shards(partition(axes, sizes, mesh), mesh) for sizes in (divisible, shape))
        if given < wanted:
            found[path] = 1 / given - 1 / wanted
    return found


def count_shards(split: PartitionSpec, mesh: Mesh | AbstractMesh) -> int:
    """The number of shards of an array."""
    each = [(names,) if isinstance(names, str) else names or () for names in split]
    return math.prod(mesh.shape[name] for names in each for name in names)


def place(model: nnx.Module, mesh: Mesh) -> None:
    """Shard every variable of a model by the table."""
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable.get_value()
        variable.set_value(jax.tree.map(_moved, value, as_jit_returns(placement(value, variable.axes, mesh))))


def _moved(leaf: jax.Array, where: NamedSharding) -> jax.Array:
    if leaf.is_fully_addressable and not where.is_fully_addressable:  # this process's copy of what all processes have
        return host_arrays.placed(np.asarray(leaf), where)
    return jax.device_put(leaf, where)
