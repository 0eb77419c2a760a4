"""The mesh of devices: its axes, and which device is where."""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from peftjax.core.config import field
from peftjax.core.errors import UserError

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
