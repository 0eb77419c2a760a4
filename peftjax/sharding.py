"""Where every array lives: a mesh, and one table from logical axes to mesh axes."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from peftjax.quant.base import Quantized

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> the mesh axes that split it. Everything not named here is whole on every device.
TABLE: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "rank": ("fsdp",),
}


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh (data, fsdp, tensor) of the given sizes; one size may be -1 and takes the devices that are left.

    Without sizes: a mesh of one device.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    if sizes is None:
        devices = list(jax.devices())[:1] if devices is None else devices
        sizes = {}
    devices = list(jax.devices() if devices is None else devices)
    shape = [int(sizes.get(axis, 1)) for axis in MESH_AXES]
    if -1 in shape:
        known = -int(np.prod(shape))
        shape[shape.index(-1)] = max(len(devices) // known, 1)
    if (needed := int(np.prod(shape))) > len(devices):
        asked = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))
        raise ValueError(f"mesh {asked} needs {needed} devices, this machine has {len(devices)}; one axis may be -1")
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    return Mesh(np.array(devices[:needed]).reshape(shape), MESH_AXES, axis_types=axis_types)


def partition(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """How an array with these logical axes is split. A mesh axis splits one dimension, the first that asks for it, and
    only one that it divides; other dimensions stay whole."""
    free = {name: size for name, size in mesh.shape.items() if size > 1}
    entries: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        names = tuple(name for name in TABLE.get(axis or "", ()) if name in free)
        if names and size % int(np.prod([free[name] for name in names])) == 0:
            for name in names:
                del free[name]
            entries.append(names)
        else:
            entries.append(None)
    return PartitionSpec(*entries)


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """The sharding of an array with these logical axes."""
    return NamedSharding(mesh, partition(axes, shape, mesh))


def placement(value: Any, axes: Sequence[str | None], mesh: Mesh) -> Any:
    """The sharding of a parameter with these logical axes: of an array, or of every leaf of a quantized kernel."""
    leaves, structure = jax.tree.flatten(value)
    of_leaves = value.axes(tuple(axes)) if isinstance(value, Quantized) else [axes]
    placed = [spec(own, leaf.shape, mesh) for own, leaf in zip(of_leaves, leaves, strict=True)]
    return jax.tree.unflatten(structure, placed)


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """Options to compile a program with that fills a stack of NF4 kernels, or takes it apart layer by layer.

    XLA's CPU backend takes int4 for a type without slices of its own, and makes int8 of the whole stack first: before the
    loop of a train step, a byte a weight, and once for each layer that is put into its place. Told to leave int4 alone, it
    slices it as it is, to the same bits. Not where there are several devices: its collectives then mistake int4's size.
    """
    devices = mesh.devices.flat
    alone = len(devices) == 1 and devices[0].platform == "cpu"
    return {"xla_disable_hlo_passes": "float-normalization-s4"} if alone else {}


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, placed by the table on the mesh in force (`jax.set_mesh`); unchanged where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, mesh))  # type: ignore[arg-type]


def gathered(kernel: Any, axes: Sequence[str | None]) -> Any:
    """A quantized kernel with these logical axes, on the mesh in force, whole on the devices that split the batch: its
    codes are sent to them. Left to itself, the compiler sends the decoded kernel, four times as much, which then lies
    in memory. Any other kernel as it is."""
    if not isinstance(kernel, Quantized):
        return kernel
    kept = tuple(None if set(TABLE.get(axis or "", ())) & set(TABLE["batch"]) else axis for axis in axes)
    leaves, structure = jax.tree.flatten(kernel)
    placed = [constrain(leaf, *own) for leaf, own in zip(leaves, kernel.axes(kept), strict=True)]
    return jax.tree.unflatten(structure, placed)


def place(model: Any, mesh: Mesh) -> None:
    """Move every variable of a model to where the table puts it."""
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable.get_value()
        variable.set_value(jax.device_put(value, placement(value, variable.axes, mesh)))


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, microbatches: int = 1) -> dict[str, jax.Array]:
    """This process's rows [b, T] (or [b], or more dimensions) as a part of the global batch, cut into microbatches:
    [A, B / A, T]."""
    placed = {}
    for name, rows in batch.items():
        local = rows.reshape(microbatches, -1, *rows.shape[1:])
        shape = (microbatches, local.shape[1] * jax.process_count(), *rows.shape[1:])
        placed[name] = jax.make_array_from_process_local_data(
            spec(batch_axes(rows.ndim - 1), shape, mesh), local, shape
        )
    return placed


def batch_axes(ndim: int) -> tuple[str | None, ...]:
    """The logical axes [A, B / A, ...] of rows of so many dimensions."""
    return (None, "batch", "length") if ndim == 1 else (None, "batch", *(None,) * ndim)
