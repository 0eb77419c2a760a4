"""Sharding: a mesh of devices, and one table from logical axes to mesh axes."""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from peftjax.core import host_arrays
from peftjax.core.config import field
from peftjax.core.errors import UserError
from peftjax.quant.base import Quantized

K = TypeVar("K", bound=jax.Array | Quantized)

MESH_AXES = ("data", "fsdp", "sequence", "tensor")
MEMBERS = "members"  # the additional axis of a population's mesh


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The number of devices on each axis of the mesh. One of them may be -1."""

    data: int = field(1, "Number of devices that split the batch; -1: all remaining devices", low=-1)
    fsdp: int = field(1, "Number of devices that split the batch and the weights; -1: all remaining devices", low=-1)
    sequence: int = field(
        1, "Number of devices that split the length of sequences and the weights; -1: all remaining devices", low=-1
    )
    tensor: int = field(1, "Number of devices that split heads and features; -1: all remaining devices", low=-1)

    def __post_init__(self) -> None:
        if empty := [axis for axis, size in self.sizes.items() if size == 0]:
            raise UserError(f"mesh.{empty[0]}=0: use at least 1 device, or -1 for all remaining devices")
        rest = [f"mesh.{axis}" for axis, size in self.sizes.items() if size == -1]
        if len(rest) > 1:
            raise UserError(f"{' and '.join(rest)} are -1 (all remaining devices); only one axis may be -1")

    @property
    def sizes(self) -> dict[str, int]:
        """The number of devices on each axis."""
        return dataclasses.asdict(self)


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


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh (data, fsdp, sequence, tensor).

    Neighbors on its last axes, which communicate most, are close in the network. The chips of a TPU slice are arranged by
    their positions in the torus. GPUs and CPUs are in the order of their hosts and processes.

    Args:
        sizes: Size of each mesh axis, by default 1. One may be -1 and takes the remaining devices. None: one device.
        devices: The devices to use; default: all.

    Raises:
        UserError: The sizes need more devices than there are, -1 does not stand for a whole number, a process would have
            no part in the mesh, or data and fsdp cannot split the work between several TPU slices.
    """
    if sizes is None:
        devices = list(jax.devices())[:1] if devices is None else devices
        sizes = {}
    if use_all := devices is None:
        devices = sorted(jax.devices(), key=lambda device: (_slice(device), device.process_index, device.id))
    devices = list(devices or ())
    shape = [int(sizes.get(axis, 1)) for axis in MESH_AXES]
    if -1 in shape:
        known, axis = -math.prod(shape), shape.index(-1)
        if len(devices) > known and len(devices) % known:
            raise UserError(
                f"mesh.{MESH_AXES[axis]}=-1 cannot use all {len(devices)} devices: the other axes take {known}, which does not "
                "divide them; change the other axes, or give a number instead of -1"
            )
        shape[axis] = max(len(devices) // known, 1)
    wanted = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))
    if (needed := math.prod(shape)) > len(devices):
        owner = f"these {jax.process_count()} processes have" if jax.process_count() > 1 else "this machine has"
        raise UserError(f"mesh {wanted} needs {needed} devices, but {owner} {len(devices)}; one axis may be -1")
    if use_all and needed < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"mesh {wanted} uses {needed} of the {len(devices)} devices of {jax.process_count()} processes, but all must take "
            "part; one axis may be -1"
        )
    whole_tpu = needed == len(devices) and devices[0].platform == "tpu"
    arranged = _along_links(devices, shape) if whole_tpu else np.array(devices[:needed]).reshape(shape)
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _slice(device: jax.Device) -> int:
    """The index of a group of devices with fast links between them: a TPU slice, or the GPUs of a host."""
    return getattr(device, "slice_index", 0)


def _along_links(devices: Sequence[jax.Device], shape: Sequence[int]) -> np.ndarray:
    """Arrange the chips of TPU slices so that each mesh axis follows their links. Only data and fsdp cross between slices."""
    slices: dict[int, list[jax.Device]] = collections.defaultdict(list)
    for device in devices:
        slices[_slice(device)].append(device)
    count, (data, fsdp, *others) = len(slices), shape
    if data * fsdp % count:
        raise UserError(
            f"mesh data={data}, fsdp={fsdp} on {count} TPU slices: data x fsdp must be a multiple of {count}, because sequence "
            f"and tensor cannot use the slow network between slices; use mesh.data={count}"
        )
    of_data = math.gcd(data, count)
    of_fsdp = count // of_data
    within = (data // of_data, fsdp // of_fsdp, *others)
    arranged = np.stack([_on_torus(slices[index], within) for index in sorted(slices)])
    return arranged.reshape(of_data, of_fsdp, *within).swapaxes(1, 2).reshape(shape)


def _on_torus(devices: Sequence[jax.Device], shape: Sequence[int]) -> np.ndarray:
    """Arrange the chips of one TPU slice."""
    # create_device_mesh makes a ring of up to 8 chips, which is worse than their order for several axes.
    if len(devices) > 8:
        # It fails if the chips do not fill a box. In jax 0.10, it also fails for some sizes with a prime factor above 3.
        with contextlib.suppress(AssertionError, TypeError, ValueError):
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.array(devices).reshape(shape)


def split_members(mesh: Mesh, count: int) -> Mesh:
    """Return the mesh of a population with `count` members: its axis "members" takes over a part of the axis "data".

    Each device then computes whole batches of some members, instead of a part of every batch. The size of the axis is the
    greatest common divisor of `count` and "data"; if that is 1, the mesh stays as it is.
    """
    data = mesh.shape["data"]
    members = math.gcd(count, data)
    if members == 1:
        return mesh
    devices = mesh.devices.reshape(members, data // members, *mesh.devices.shape[1:])
    return Mesh(devices, (MEMBERS, *MESH_AXES), axis_types=(AxisType.Auto,) * devices.ndim)


def members_axis(count: int) -> str | None:
    """Return the axis of the current mesh that splits `count` members, for `jax.vmap(..., spmd_axis_name=...)`."""
    size = jax.sharding.get_abstract_mesh().shape.get(MEMBERS, 1)
    return MEMBERS if size > 1 and count % size == 0 else None


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
        wanted, given = (_parts(partition(axes, sizes, mesh), mesh) for sizes in (divisible, shape))
        if given < wanted:
            found[path] = 1 / given - 1 / wanted
    return found


def _parts(split: PartitionSpec, mesh: Mesh | AbstractMesh) -> int:
    """The number of shards of an array."""
    each = [(names,) if isinstance(names, str) else names or () for names in split]
    return math.prod(mesh.shape[name] for names in each for name in names)


def compiler_options(devices: Iterable[jax.Device]) -> dict[str, str]:
    """Return compiler options for a program on these devices with a loop over stacked layers.

    XLA's CPU backend converts bfloat16 to float32 before most operations, and it would move the conversion of a stack of
    kernels out of the loop: a float32 copy of the frozen base. It also assumes that int4 cannot be sliced, and converts a
    stack of NF4 kernels to int8 first: one byte per weight before the loop of a train step, and once for each layer that is
    written. With these options it converts only the slices, with the same result. They are not used with several devices,
    since collectives then get the size of int4 wrong.
    """
    one_cpu = [device.platform for device in devices] == ["cpu"]
    return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion,float-normalization-s4"} if one_cpu else {}


def on_one_cpu() -> bool:
    """Whether the current mesh (`jax.set_mesh`) is one CPU device."""
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    return mesh.size == 1 and device is not None and device.platform == "cpu"


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
    if mesh.empty or x.ndim != 3 or min(mesh.shape.get("data", 1), parts(features or "", x.shape[-1])) == 1:
        return x
    batch = "data" if x.shape[0] % mesh.shape["data"] == 0 else None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(batch, None, *partition((features,), x.shape[-1:], mesh)))


def on_current_mesh(axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """Return how the current mesh shards an array with these logical axes."""
    return partition(axes, shape, jax.sharding.get_abstract_mesh())


def parts(axis: str, size: int) -> int:
    """Return the number of parts into which the current mesh shards a dimension."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _parts(partition((axis,), (size,), mesh), mesh)


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


def place(model: nnx.Module, mesh: Mesh) -> None:
    """Shard every variable of a model by the table."""
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable.get_value()
        variable.set_value(jax.tree.map(_moved, value, as_jit_returns(placement(value, variable.axes, mesh))))


def _moved(leaf: jax.Array, where: NamedSharding) -> jax.Array:
    if leaf.is_fully_addressable and not where.is_fully_addressable:  # this process's copy of what all processes have
        return host_arrays.placed(np.asarray(leaf), where)
    return jax.device_put(leaf, where)


def batch_share(mesh: Mesh) -> dict[str, Any]:
    """Return which rows of a batch this process loads: those that its devices compute.

    Processes between which only features or members are sharded load the same rows.

    Returns:
        `parts` and `own`, arguments of `data.Batching`: the number of equal parts of the rows, and the indices of the parts
        that this process loads. One part if every process loads all rows.
    """
    devices = mesh.devices.reshape(mesh.shape.get(MEMBERS, 1), mesh.shape["data"] * mesh.shape["fsdp"], -1)
    rows = devices.swapaxes(0, 1).reshape(devices.shape[1], -1)  # [rows, members and features]
    processes = [{device.process_index for device in part} for part in rows]
    if all(each == processes[0] for each in processes):
        return {"parts": 1, "own": (0,)}
    return {"parts": len(rows), "own": tuple(i for i, each in enumerate(processes) if jax.process_index() in each)}


def uneven_rows(rows: int, shape: Mapping[str, int]) -> str:
    """Return a warning if a mesh of this shape does not divide the rows of a microbatch; else an empty string."""
    split = shape.get("data", 1) * shape.get("fsdp", 1)
    if rows % split == 0:
        return ""
    return (
        f"a microbatch of {rows} rows cannot be split over data x fsdp = {split} devices, so each of them computes all "
        f"rows; make train.batch_size / train.accumulate a multiple of {split}"
    )


def check_even_rows(rows: int, mesh: Mesh) -> None:
    """Raises a UserError if several processes cannot share the rows of a microbatch evenly among their devices."""
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % split and batch_share(mesh)["parts"] > 1:
        raise UserError(
            f"a batch of {rows} rows on data x fsdp = {split} devices of several processes: train.batch_size / "
            f"train.accumulate must be a multiple of {split}"
        )


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, microbatches: int = 1) -> dict[str, jax.Array]:
    """Make the global batch from this process's rows, split into microbatches.

    Args:
        batch: This process's rows, each array [b, T], [b], or with more dimensions.
        mesh: The mesh.
        microbatches: Number of microbatches, A.

    Returns:
        Sharded arrays [A, B / A, T].

    Raises:
        UserError: With several processes, the devices cannot share the rows evenly.
    """
    placed, share = {}, batch_share(mesh)
    for name, rows in batch.items():
        local = rows.reshape(microbatches, -1, *rows.shape[1:])
        shape = (microbatches, local.shape[1] * share["parts"] // len(share["own"]), *rows.shape[1:])
        check_even_rows(shape[1], mesh)
        where = spec(batch_axes(rows.ndim - 1), shape, mesh)
        placed[name] = jax.make_array_from_process_local_data(where, local, shape)
    return placed


def batch_axes(ndim: int) -> tuple[str | None, ...]:
    """Return the logical axes of microbatches [A, B / A, ...] whose rows have `ndim` dimensions."""
    return (None, "batch", "length") if ndim == 1 else (None, "batch", *(None,) * ndim)
