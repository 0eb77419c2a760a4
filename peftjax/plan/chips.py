"""Data sheets: memory, speed and links of the accelerators that a plan can be made for."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's compiler needs to know about an NVIDIA GPU (from NVIDIA's tuning guide of its compute capability).

    Attributes:
        capability: CUDA compute capability, such as "8.6".
        cores: Number of streaming multiprocessors (SMs).
        clock_ghz: Boost clock in GHz.
        cache: L2 cache in bytes.
        threads: Maximum number of threads per SM.
        shared: Shared memory per SM in bytes. One block can use 1 KiB less.
        lanes: FP32 lanes per SM.
    """

    capability: str
    cores: int
    clock_ghz: float
    cache: int
    threads: int
    shared: int
    lanes: int = 128

    def target(self, memory: int, bandwidth: float) -> str:
        """Return XLA's GpuTargetConfig in protobuf text format."""
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
    """The data sheet of one accelerator.

    Attributes:
        memory: Bytes that a program can allocate.
        flops: Peak dense bfloat16 FLOP per second, with float32 accumulation.
        bandwidth: Bytes per second between the chip and its memory.
        links: Bytes per second that the chip can send to other chips over all of its links.
        gpu: The compiler's description of a GPU; None for a TPU.
        shapes: The topologies in which a TPU is available; empty for a GPU.
    """

    memory: int
    flops: float
    bandwidth: float
    links: float
    gpu: Gpu | None = None
    shapes: tuple[str, ...] = ()


def _gib(value: float) -> int:
    return int(value * GIB)


def _cuda(total: float) -> int:
    """Bytes available on a GPU with `total` GiB as reported by CUDA: the CUDA context and the libraries' workspaces take
    half a GiB."""
    return _gib(total - 0.5)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x12", "8x8x16", "8x16x16",
    "16x16x16", "16x16x24",
)  # fmt: skip

# TPUs: memory as their compiler reports it when a program does not fit; the rest from Google Cloud's page on each
# version, with links of 1600, 4800 and 3584 Gbit/s. GPUs: memory as CUDA reports it; the rest from NVIDIA's data sheets
# (A100, H100 and H200 as SXM modules). GPU links: one direction of NVLink, or of PCIe 4.0 x16 where there is no NVLink.
CHIPS: dict[str, Chip] = {
    "v5e": Chip(_gib(15.75), 197e12, 819e9, 200e9, shapes=_FLAT),
    "v5p": Chip(_gib(95.74), 459e12, 2765e9, 600e9, shapes=_CUBES),
    "v6e": Chip(_gib(31.25), 918e12, 1640e9, 448e9, shapes=_FLAT),
    "rtx3090": Chip(_cuda(23.69), 71e12, 936e9, 32e9, Gpu("8.6", 82, 1.7, 6 << 20, 1536, 100 << 10)),
    "rtx4080": Chip(_cuda(15.6), 97.5e12, 716.8e9, 32e9, Gpu("8.9", 76, 2.505, 64 << 20, 1536, 100 << 10)),
    "rtx4090": Chip(_cuda(23.65), 165.2e12, 1008e9, 32e9, Gpu("8.9", 128, 2.52, 72 << 20, 1536, 100 << 10)),
    "l4": Chip(_cuda(22.17), 121e12, 300e9, 32e9, Gpu("8.9", 58, 2.04, 48 << 20, 1536, 100 << 10)),
    "a6000": Chip(_cuda(47.54), 154.8e12, 768e9, 32e9, Gpu("8.6", 84, 1.8, 6 << 20, 1536, 100 << 10)),
    "a100-40gb": Chip(_cuda(39.39), 312e12, 1555e9, 300e9, Gpu("8.0", 108, 1.41, 40 << 20, 2048, 164 << 10, 64)),
    "a100-80gb": Chip(_cuda(79.15), 312e12, 2039e9, 300e9, Gpu("8.0", 108, 1.41, 40 << 20, 2048, 164 << 10, 64)),
    "h100": Chip(_cuda(79.11), 989.4e12, 3350e9, 450e9, Gpu("9.0", 132, 1.98, 50 << 20, 2048, 228 << 10)),
    "h200": Chip(_cuda(139.81), 989.4e12, 4800e9, 450e9, Gpu("9.0", 132, 1.98, 50 << 20, 2048, 228 << 10)),
}
