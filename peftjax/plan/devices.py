"""Devices that need not be there: what they can do, by their makers' data sheets, and how to ask for their compilers."""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from peftjax import sharding
from peftjax.core.errors import UserError
from peftjax.core.paths import suggest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's compiler is told of an NVIDIA GPU (NVIDIA's tuning guides of its compute capability)."""

    capability: str
    cores: int  # streaming multiprocessors
    clock_ghz: float
    cache: int  # bytes, the second level's
    # of one multiprocessor:
    threads: int
    shared: int  # bytes of shared memory; a block may have 1 KiB less
    lanes: int = 128

    def target(self, memory: int, bandwidth: float) -> str:
        """XLA's GpuTargetConfig, in text form."""
        major, minor = self.capability.split(".")
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
              shared_memory_per_core: {self.shared} threads_per_core_limit: {self.threads} core_count: {self.cores}
              fpus_per_core: {self.lanes} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
              block_dim_limit_z: 65535 memory_bandwidth: {int(bandwidth)} l2_cache_size: {self.cache}
              clock_rate_ghz: {self.clock_ghz} device_memory_size: {memory}
              shared_memory_per_block_optin: {self.shared - 1024}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 }}
            device_description_str: "compute capability {self.capability}"
        """


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device. memory: bytes that a program can have; flops: bfloat16 products with float32 sums, dense, a second;
    bandwidth: bytes a second of its memory; links: bytes a second that it can send to others, over all of its links."""

    memory: int
    flops: float
    bandwidth: float
    links: float
    gpu: Gpu | None = None  # none: a TPU
    shapes: tuple[str, ...] = ()  # in which TPUs are had


def _gib(value: float) -> int:
    return int(value * GIB)


def _cuda(total: float) -> int:
    """Bytes that are left of a GPU's memory, in GiB as CUDA reports it, once a process with a CUDA context and the
    workspaces of its libraries is there: half a GiB less."""
    return _gib(total - 0.5)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x12", "8x8x16", "8x16x16",
    "16x16x16", "16x16x24",
)  # fmt: skip

# TPUs: memory as their compiler says when a program does not fit; the rest as in Google Cloud's pages on each version,
# where links are 1600, 4800 and 3584 Gbit/s. GPUs: memory as CUDA reports it; the rest as in NVIDIA's data sheets
# (SXM modules of A100, H100 and H200). links of GPUs: one direction of NVLink, or of PCIe 4.0 x16 where there is none.
CHIPS: dict[str, Chip] = {
    "v5e": Chip(_gib(15.75), 197e12, 819e9, 200e9, shapes=_FLAT),
    "v5p": Chip(_gib(95.74), 459e12, 2765e9, 600e9, shapes=_CUBES),
    "v6e": Chip(_gib(31.25), 918e12, 1640e9, 448e9, shapes=_FLAT),
    "rtx3090": Chip(_cuda(23.69), 71e12, 936e9, 32e9, Gpu("8.6", 82, 1.7, 6 << 20, 1536, 100 << 10)),
    "rtx4090": Chip(_cuda(23.65), 165.2e12, 1008e9, 32e9, Gpu("8.9", 128, 2.52, 72 << 20, 1536, 100 << 10)),
    "l4": Chip(_cuda(22.17), 121e12, 300e9, 32e9, Gpu("8.9", 58, 2.04, 48 << 20, 1536, 100 << 10)),
    "a6000": Chip(_cuda(47.54), 154.8e12, 768e9, 32e9, Gpu("8.6", 84, 1.8, 6 << 20, 1536, 100 << 10)),
    "a100-40gb": Chip(_cuda(39.39), 312e12, 1555e9, 300e9, Gpu("8.0", 108, 1.41, 40 << 20, 2048, 164 << 10, 64)),
    "a100-80gb": Chip(_cuda(79.15), 312e12, 2039e9, 300e9, Gpu("8.0", 108, 1.41, 40 << 20, 2048, 164 << 10, 64)),
    "h100": Chip(_cuda(79.11), 989.4e12, 3350e9, 450e9, Gpu("9.0", 132, 1.98, 50 << 20, 2048, 228 << 10)),
    "h200": Chip(_cuda(139.81), 989.4e12, 4800e9, 450e9, Gpu("9.0", 132, 1.98, 50 << 20, 2048, 228 << 10)),
}
MOST_GPUS, MOST_CPUS = 8, 256  # of one host; simulated on one


@dataclasses.dataclass(frozen=True)
class Device:
    """Devices of one kind, as `--device` names them: v5e:4x4, h100:8, cpu."""

    name: str
    kind: str
    count: int
    platform: str  # "tpu", "cuda" or "cpu"
    memory: int  # bytes that a program can have on each
    chip: Chip | None  # none: this machine's CPU

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment, before jax is imported, to compile for these devices without looking
        for any that are there. libtpu writes its log where we do not look, and lets other processes compile too."""
        own = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
        own |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
        if self.platform == "cuda":  # nvidia-cuda-nvcc brings ptxas, but not to where it is looked for
            own["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *map(str, _nvcc())])
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={self.count}"
        return own | {"XLA_FLAGS": flags}  # of a flag that is there twice the last one counts

    def missing(self) -> str:
        """How to get the compiler, empty where it is there."""
        if self.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
            return 'the TPU compiler is not installed: pip install "peftjax[tpu]"'
        if self.platform != "cuda":
            return ""
        try:
            plugin = importlib.metadata.version("jax-cuda13-plugin")
        except importlib.metadata.PackageNotFoundError:
            return 'XLA:GPU is not installed: pip install "peftjax[cuda-plan]" (no GPU and no CUDA needed)'
        if plugin != jax.__version__:
            return f"jax-cuda13-plugin is {plugin} and jax {jax.__version__}: pip install jax-cuda13-plugin=={jax.__version__}"
        if not shutil.which("ptxas") and not _nvcc():
            return 'ptxas is not installed: pip install "peftjax[cuda-plan]"'
        return ""

    def mesh_shape(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The size of every mesh axis, -1 replaced by what is left.

        Raises:
            UserError: they do not multiply to the number of devices.
        """
        shape = {axis: int(sizes.get(axis, 1)) for axis in sharding.MESH_AXES}
        known = abs(math.prod(shape.values()))
        rest = self.count // known if -1 in shape.values() and self.count % known == 0 else 1
        if known * rest != self.count:
            told = ", ".join(f"mesh.{axis}={size}" for axis, size in shape.items())
            raise UserError(
                f"--device={self.name} is {self.count} devices, and the config's mesh ({told}) is not that many; "
                "--config.mesh.fsdp=-1 takes all that are left"
            )
        return {axis: rest if size == -1 else size for axis, size in shape.items()}

    def mesh(self, sizes: Mapping[str, int], *, simulated: bool = False) -> Mesh:
        """A mesh of all these devices; simulated: of as many CPU devices."""
        found = jax.devices("cpu")[: self.count] if simulated or self.chip is None else self._topology()
        return sharding.make_mesh(self.mesh_shape(sizes), devices=found)

    def _topology(self) -> Any:
        from jax.experimental import topologies

        assert self.chip is not None
        if self.chip.gpu is None:
            alone = {"chips_per_host_bounds": (1, 1, 1)} if self.count == 1 else {}
            return topologies.get_topology_desc(self.name, platform="tpu", **alone).devices
        target = self.chip.gpu.target(self.memory, self.chip.bandwidth)
        topology = f"1x1x{self.count}"  # slices x hosts x GPUs
        return topologies.get_topology_desc("", platform="cuda", topology=topology, target_config=target).devices

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Autotuning would run kernels on a GPU."""
        return {"xla_gpu_autotune_level": 0} if self.platform == "cuda" else {}


def find(name: str) -> Device:
    """The devices that `name` means: a TPU topology (v5e:4x4; v5e alone is one chip), a GPU with a count or without
    (h100:8, a6000), or this machine's CPU (cpu; cpu:8 are eight simulated devices that share its memory).

    Raises:
        UserError: there are no such devices; names what is near, and all.
    """
    kind, _, rest = name.lower().partition(":")
    if kind == "cpu":
        count = _count(name, rest, MOST_CPUS)
        return Device(f"cpu:{count}" if count > 1 else kind, kind, count, "cpu", _this_machine() // count, None)
    if kind not in CHIPS:
        raise UserError(f"--device={name}: no such device.{suggest(kind, [*CHIPS, 'cpu'])} There are: {_listing()}")
    chip = CHIPS[kind]
    if chip.gpu is not None:
        count = _count(name, rest, MOST_GPUS)
        return Device(f"{kind}:{count}" if count > 1 else kind, kind, count, "cuda", chip.memory, chip)
    shape = rest or chip.shapes[0]
    if shape not in chip.shapes:
        raise UserError(
            f"--device={name}: {kind} comes in {', '.join(chip.shapes)}; for example --device={kind}:{chip.shapes[2]}"
        )
    return Device(f"{kind}:{shape}", kind, math.prod(map(int, shape.split("x"))), "tpu", chip.memory, chip)


def _count(name: str, text: str, most: int) -> int:
    if text and not (re.fullmatch(r"\d+", text) and 1 <= int(text) <= most):
        raise UserError(
            f"--device={name}: after the colon stands a number of devices from 1 to {most}, those of one host"
        )
    return int(text or 1)


def _listing() -> str:
    tpus = [f"{name}:{chip.shapes[2]}" for name, chip in CHIPS.items() if chip.gpu is None]
    gpus = [name for name, chip in CHIPS.items() if chip.gpu is not None]
    return f"{', '.join(tpus)} and other topologies; {', '.join(gpus)}, with a count or without ({gpus[-1]}:8); cpu"


def _this_machine() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _nvcc() -> list[Path]:
    """Where nvidia-cuda-nvcc puts its programs."""
    return sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"))
