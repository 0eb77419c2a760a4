"""The devices that `--device` names: their number, memory, mesh and compiler. They need not be attached."""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from peftjax import sharding
from peftjax.core.errors import UserError
from peftjax.core.memory import host_memory
from peftjax.core.paths import suggest
from peftjax.plan.chips import CHIPS, Chip

_MAX_GPUS, _MAX_CPUS = 8, 256  # GPUs of one host; CPU devices simulated on one


@dataclasses.dataclass(frozen=True)
class Device:
    """All devices of a `--device` option, such as v5e:4x4, h100:8 or cpu.

    Attributes:
        name: The full name, with the topology or the count.
        kind: The name of one device, a key of `CHIPS` or "cpu".
        count: Number of devices.
        platform: "tpu", "cuda" or "cpu".
        memory: Bytes that a program can allocate on each device.
        chip: The data sheet; None for this machine's CPU.
    """

    name: str
    kind: str
    count: int
    platform: str
    memory: int
    chip: Chip | None

    def environment(self) -> dict[str, str]:
        """Return the environment variables with which a process can compile for these devices without looking for
        attached ones. They must be set before jax is imported."""
        own = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
        # libtpu: let other processes compile as well, and keep its log off stderr
        own |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
        if self.platform == "cuda":  # nvidia-cuda-nvcc installs ptxas outside of PATH
            own["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *map(str, _nvcc())])
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={self.count}"
        return own | {"XLA_FLAGS": flags}  # the last of two equal flags wins

    def missing(self) -> str:
        """Return how to install the compiler, or an empty string if it is installed."""
        if self.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
            return 'the TPU compiler is not installed: pip install "peftjax[tpu]"'
        if self.platform != "cuda":
            return ""
        try:
            plugin = importlib.metadata.version("jax-cuda13-plugin")
        except importlib.metadata.PackageNotFoundError:
            return 'XLA:GPU is not installed: pip install "peftjax[cuda-plan]" (needs no GPU and no CUDA)'
        if plugin != jax.__version__:
            return (
                f"jax-cuda13-plugin {plugin} does not match jax {jax.__version__}: "
                f"pip install jax-cuda13-plugin=={jax.__version__}"
            )
        if not shutil.which("ptxas") and not _nvcc():
            return 'ptxas is not installed: pip install "peftjax[cuda-plan]"'
        return ""

    def mesh_shape(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the size of every mesh axis, with -1 replaced by the remaining number of devices.

        Raises:
            UserError: The sizes do not multiply to the number of devices.
        """
        shape = {axis: int(sizes.get(axis, 1)) for axis in sharding.MESH_AXES}
        known = abs(math.prod(shape.values()))
        rest = self.count // known if -1 in shape.values() and self.count % known == 0 else 1
        if known * rest != self.count:
            given = ", ".join(f"mesh.{axis}={size}" for axis, size in shape.items())
            raise UserError(
                f"--device={self.name} is {self.count} devices, but the mesh sizes in the config ({given}) do not "
                "multiply to that number; --config.mesh.fsdp=-1 uses all remaining devices"
            )
        return {axis: rest if size == -1 else size for axis, size in shape.items()}

    def mesh(self, sizes: Mapping[str, int], *, simulated: bool = False) -> Mesh:
        """Return a mesh of all these devices, with sizes as for `mesh_shape`.

        `simulated` takes as many CPU devices instead, to trace without the devices' compiler.
        """
        found = jax.devices("cpu")[: self.count] if simulated or self.chip is None else _topology(self, self.chip)
        return sharding.make_mesh(self.mesh_shape(sizes), devices=found)

    @property
    def compiler_options(self) -> dict[str, str | int | bool]:
        """Options for compiling without the device: autotuning would run kernels on a GPU."""
        return {"xla_gpu_autotune_level": 0} if self.platform == "cuda" else {}


def find(name: str) -> Device:
    """Return the devices called `name`.

    Args:
        name: A TPU topology (v5e:4x4; v5e alone is one chip), a GPU with or without a count (h100:8, a6000), or this
            machine's CPU (cpu, or cpu:8 for eight simulated devices that share its memory).

    Raises:
        UserError: There is no such device. The message has suggestions and lists all devices.
    """
    kind, _, rest = name.lower().partition(":")
    if kind == "cpu":
        count = _parse_count(name, rest, _MAX_CPUS)
        return Device(f"cpu:{count}" if count > 1 else kind, kind, count, "cpu", host_memory() // count, None)
    if kind not in CHIPS:
        raise UserError(f"--device={name}: no such device.{suggest(kind, [*CHIPS, 'cpu'])} Available: {_listing()}")
    chip = CHIPS[kind]
    if chip.gpu is not None:
        count = _parse_count(name, rest, _MAX_GPUS)
        return Device(f"{kind}:{count}" if count > 1 else kind, kind, count, "cuda", chip.memory, chip)
    shape = rest or chip.shapes[0]
    if shape not in chip.shapes:
        raise UserError(
            f"--device={name}: {kind} comes in {', '.join(chip.shapes)}; for example --device={kind}:{chip.shapes[2]}"
        )
    return Device(f"{kind}:{shape}", kind, math.prod(map(int, shape.split("x"))), "tpu", chip.memory, chip)


def _parse_count(name: str, text: str, largest: int) -> int:
    if text and not (re.fullmatch(r"\d+", text) and 1 <= int(text) <= largest):
        raise UserError(f"--device={name}: the colon must be followed by a number of devices from 1 to {largest}")
    return int(text or 1)


def _listing() -> str:
    tpus = [f"{name}:{chip.shapes[2]}" for name, chip in CHIPS.items() if chip.gpu is None]
    gpus = [name for name, chip in CHIPS.items() if chip.gpu is not None]
    return (
        f"TPUs {', '.join(tpus)} and other topologies; GPUs {', '.join(gpus)}, optionally with a count "
        f"({gpus[-1]}:8); cpu"
    )


def _topology(device: Device, chip: Chip) -> Sequence[jax.Device]:
    """The compile-only devices of the platform's compiler."""
    from jax.experimental import topologies

    if chip.gpu is None:
        alone = {"chips_per_host_bounds": (1, 1, 1)} if device.count == 1 else {}
        return list(topologies.get_topology_desc(device.name, platform="tpu", **alone).devices)
    target = chip.gpu.target(device.memory, chip.bandwidth)
    shape = f"1x1x{device.count}"  # slices x hosts x GPUs
    return list(topologies.get_topology_desc("", platform="cuda", topology=shape, target_config=target).devices)


def _nvcc() -> list[Path]:
    """The directories where nvidia-cuda-nvcc installs its programs."""
    return sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"))
