"""Where every array lives: a mesh, and one table from logical axes to mesh axes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from peftjax.core import distributed
from peftjax.core.config import field
from peftjax.core.errors import UserError
from peftjax.quant.base import Quantized

MESH_AXES = ("data", "fsdp", "sequence", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices split what. One axis may be -1."""

    data: int = field(1, "Devices that split the batch; -1: all remaining devices", low=-1)
    fsdp: int = field(1, "Devices that split the batch and the weights; -1: all remaining devices", low=-1)
    sequence: int = field(
        1, "Devices that split the length of sequences and the weights; -1: all remaining devices", low=-1
    )
    tensor: int = field(1, "Devices that split heads and features; -1: all remaining devices", low=-1)

    def __post_init__(self) -> None:
        if none := [axis for axis, size in self.sizes.items() if size == 0]:
            raise UserError(f"mesh.{none[0]}=0 must be a number of devices, or -1 for all remaining devices")
        rest = [f"mesh.{axis}" for axis, size in self.sizes.items() if size == -1]
        if len(rest) > 1:
            raise UserError(f"{' and '.join(rest)} are -1 (all remaining devices); only one of them may be")

    @property
    def sizes(self) -> dict[str, int]:
        """The number of devices on each axis."""
        return dataclasses.asdict(self)


# Logical axis -> the mesh axes that split it. Everything not named here is whole on every device.
TABLE: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "embed": ("fsdp", "sequence"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "rank": ("fsdp", "sequence"),
}


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh (data, fsdp, sequence, tensor) of the given sizes; one size may be -1 and takes the devices that are left.

    Without sizes: a mesh of one device. A process's devices lie side by side, so that its rows of a batch do.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or leave a process without any.
    """
    if sizes is None:
        devices = list(jax.devices())[:1] if devices is None else devices
        sizes = {}
    if everyones := devices is None:
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    devices = list(devices or ())
    shape = [int(sizes.get(axis, 1)) for axis in MESH_AXES]
    if -1 in shape:
        known = -int(np.prod(shape))
        shape[shape.index(-1)] = max(len(devices) // known, 1)
    asked = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))
    if (needed := int(np.prod(shape))) > len(devices):
        there = f"these {jax.process_count()} processes have" if jax.process_count() > 1 else "this machine has"
        raise ValueError(f"mesh {asked} needs {needed} devices, {there} {len(devices)}; one axis may be -1")
    if everyones and needed < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"mesh {asked} takes {needed} of the {len(devices)} devices of {jax.process_count()} processes, which all take "
            "part; one axis may be -1"
        )
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


def undivided(variables: Mapping[str, nnx.Variable], mesh: Mesh) -> dict[str, float]:
    """The parameters with a dimension that the table would split and the mesh does not divide: by how much more of each
    a device has to hold, as a part of the whole. Of a quantized kernel the codes count."""
    found = {}
    for path, variable in variables.items():
        value = variable.get_value()
        quantized = isinstance(value, Quantized)
        axes = value.axes(tuple(variable.axes))[0] if quantized else variable.axes
        shape = jax.tree.leaves(value)[0].shape
        wanted, given = (
            _parts(partition(axes, sizes, mesh), mesh) for sizes in ((0,) * len(shape), shape)
        )  # 0: any divides
        if given < wanted:
            found[path] = 1 / given - 1 / wanted
    return found


def _parts(split: PartitionSpec, mesh: Mesh) -> int:
    """Into how many parts an array is split."""
    each = [(names,) if isinstance(names, str) else names or () for names in split]
    return math.prod(mesh.shape[name] for names in each for name in names)


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


def parts(axis: str, size: int) -> int:
    """Into how many parts the mesh in force splits a dimension."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _parts(partition((axis,), (size,), mesh), mesh)  # type: ignore[arg-type]


def _splits_length() -> bool:
    """Whether the mesh in force does."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape.get("sequence", 1) > 1


def whole_length(x: jax.Array) -> jax.Array:
    """Keys or values, [B, S, K, H], whole in length: whoever has a query of a sequence needs them all. As they are where no
    length is split."""
    return constrain(x, "batch", None, "kv_heads", None) if _splits_length() else x


def gathered(kernel: Any, axes: Sequence[str | None]) -> Any:
    """A kernel with these logical axes, on the mesh in force, whole on the devices that split the batch or the length, where
    the compiler left to itself would do worse. It sends a quantized kernel decoded, four times as much, which then lies in
    memory. And where the length is split, as the kernel's inputs are, it splits the activations by features instead, and each
    device computes with every position."""
    if not (isinstance(kernel, Quantized) or _splits_length()):
        return kernel
    split = {*TABLE["batch"], *TABLE["length"]}
    kept = tuple(None if set(TABLE.get(axis or "", ())) & split else axis for axis in axes)
    leaves, structure = jax.tree.flatten(kernel)
    of_leaves = kernel.axes(kept) if isinstance(kernel, Quantized) else [kept]
    placed = [constrain(leaf, *own) for leaf, own in zip(leaves, of_leaves, strict=True)]
    return jax.tree.unflatten(structure, placed)


def place(model: Any, mesh: Mesh) -> None:
    """Move every variable of a model to where the table puts it."""
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable.get_value()
        variable.set_value(jax.tree.map(_moved, value, placement(value, variable.axes, mesh)))


def _moved(leaf: jax.Array, where: NamedSharding) -> jax.Array:
    if leaf.is_fully_addressable and not where.is_fully_addressable:  # this process's own copy of what all have
        return distributed.placed(np.asarray(leaf), where)
    return jax.device_put(leaf, where)


def batch_share(mesh: Mesh) -> dict[str, int]:
    """Which part of a batch this process's devices hold, of how many equal ones: process_index and process_count of the
    data's functions. Processes between which only features are split hold the same rows.

    Raises:
        ValueError: the processes hold parts that overlap.
    """
    parts = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)  # [rows, features]
    own = [row for row, part in enumerate(parts) if any(device.process_index == jax.process_index() for device in part)]
    count, rest = divmod(len(parts), len(own))
    if rest or own != list(range(own[0], own[0] + len(own))) or own[0] % len(own):
        raise ValueError(
            f"mesh {dict(mesh.shape)}: sequence x tensor must divide the {jax.local_device_count()} devices of a process, or "
            "be a multiple of them, else its rows of a batch are not its own"
        )
    return {"process_index": own[0] // len(own), "process_count": count}


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, microbatches: int = 1) -> dict[str, jax.Array]:
    """This process's rows [b, T] (or [b], or more dimensions) as a part of the global batch, cut into microbatches:
    [A, B / A, T].

    Raises:
        ValueError: with several processes, rows that the devices cannot share evenly.
    """
    placed, count = {}, batch_share(mesh)["process_count"]
    for name, rows in batch.items():
        local = rows.reshape(microbatches, -1, *rows.shape[1:])
        shape = (microbatches, local.shape[1] * count, *rows.shape[1:])
        if count > 1 and shape[1] % (split := mesh.shape["data"] * mesh.shape["fsdp"]):
            raise ValueError(
                f"a batch of {shape[1]} rows on data x fsdp = {split} devices of several processes: train.batch_size / "
                "train.accumulate must be a multiple of them"
            )
        where = spec(batch_axes(rows.ndim - 1), shape, mesh)
        placed[name] = jax.make_array_from_process_local_data(where, local, shape)
    return placed


def batch_axes(ndim: int) -> tuple[str | None, ...]:
    """The logical axes [A, B / A, ...] of rows of so many dimensions."""
    return (None, "batch", "length") if ndim == 1 else (None, "batch", *(None,) * ndim)
