"""Programs on one CPU device, whose compiler needs other options."""

from collections.abc import Iterable

import jax


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
