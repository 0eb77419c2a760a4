"""What a QLoRA train step needs of a device's memory, by the compiler of that device: no such device is needed.

    python benchmarks/qlora_memory.py 65b-a6000 [--base=bfloat16] [--config.train.loss_chunk=64 ...]

Prints arguments, temporaries and the sum for each device, and what it leaves free; --base=bfloat16 is the same step
over a base that is not quantized. The train step is that of `python -m peftjax.train`, from shapes alone. TPU cases need
the extra `tpu`; GPU cases jax-cuda13-plugin of jax's version, and nvidia-cuda-nvcc for its ptxas.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# before jax: it shall not look for hardware
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from peftjax import methods, sharding
from peftjax.core import config as configs
from peftjax.plan import abstract_model, abstract_step

GIB = 2**30


def llama(layers: int, embed: int, mlp: int, heads: int, kv_heads: int, vocab: int, theta: float = 1e4) -> dict:
    return {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": embed, "intermediate_size": mlp,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab, "rope_theta": theta,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip


LLAMAS = {
    "llama-7b": llama(32, 4096, 11008, 32, 32, 32000),
    "llama-65b": llama(80, 8192, 22016, 64, 64, 32000),
    "llama-3.1-8b": llama(32, 4096, 14336, 32, 8, 128256, 5e5),
    "llama-3.1-70b": llama(80, 8192, 28672, 64, 8, 128256, 5e5),
}


@dataclasses.dataclass(frozen=True)
class Device:
    """A kind of device: how much of its memory a program can have, and how to ask for its compiler."""

    memory: float  # bytes
    platform: str
    topology: str
    options: dict[str, Any]
    used: int | None = None  # how many devices of the topology; None: all


def ampere(cores: int, memory_bytes: int, bandwidth: int) -> dict[str, Any]:
    """XLA's description of a GPU of compute capability 8.6."""
    text = f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
          shared_memory_per_core: 102400 threads_per_core_limit: 1536 core_count: {cores} fpus_per_core: 128
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {bandwidth} l2_cache_size: 6291456 clock_rate_ghz: 1.8 device_memory_size: {memory_bytes}
          shared_memory_per_block_optin: 101376 cuda_compute_capability {{ major: 8 minor: 6 }}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 }}
        device_description_str: "compute capability 8.6"
    """
    return {"topology": "1x1x1", "target_config": text}  # slices x hosts x GPUs


DEVICES = {
    "v5e:4x4": Device(15.75 * GIB, "tpu", "v5e:4x4", {}),
    "v5e:1x1": Device(15.75 * GIB, "tpu", "v5e:1x1", {"chips_per_host_bounds": (1, 1, 1)}),
    "a6000": Device(47.4 * GIB, "cuda", "", ampere(84, 50_900_000_000, 768_000_000_000)),
    "rtx3090": Device(23.5 * GIB, "cuda", "", ampere(82, 25_200_000_000, 936_000_000_000)),
}


def case(model: str, device: str, rank: int, length: int, **fields: Any) -> tuple[str, str, dict[str, Any]]:
    own = {"method.rank": rank, "data.max_length": length, "model.quantize": "nf4", "model.remat": "block"}
    return model, device, own | {"model.dtype": "bfloat16", "train.batch_size": 1} | fields


CASES = {
    "7b-24gb": case("llama-7b", "rtx3090", 16, 512),
    "8b-v5e": case("llama-3.1-8b", "v5e:1x1", 16, 2048),
    "65b-a6000": case("llama-65b", "a6000", 64, 512, **{"optim.momentum_dtype": "bfloat16"}),
    "70b-v5e-4x4": case("llama-3.1-70b", "v5e:4x4", 16, 2048, **{"train.batch_size": 16, "mesh.fsdp": 16}),
}


def make_config(fields: dict[str, Any], overrides: Sequence[str]) -> Any:
    """The config that `python -m peftjax.train --config=configs/base.py` would make of these."""
    base = Path(__file__).parents[1] / "configs" / "base.py"
    given = [f"--config.{name}={value}" for name, value in fields.items()]
    return configs.load(base, [*given, *overrides], method_defaults=methods.method_defaults)


def device_mesh(device: Device, sizes: dict[str, int]) -> Mesh:
    """A mesh of devices that need not be there."""
    topology = topologies.get_topology_desc(device.topology, platform=device.platform, **device.options)
    return sharding.make_mesh(sizes, devices=topology.devices[: device.used])


def compile_step(config: Any, hf_config: dict[str, Any], device: Device) -> Any:
    """The train step compiled for a device."""
    mesh = device_mesh(device, config.mesh)
    options = {"xla_gpu_autotune_level": 0} if device.platform == "cuda" else {}
    model = abstract_model(config, hf_config)
    with jax.set_mesh(mesh):
        step, arguments = abstract_step(config, model, mesh)
        lowered = step.trace(*arguments).lower(lowering_platforms=(device.platform,))
    return lowered.compile(options)


def main(arguments: Sequence[str]) -> None:
    name, *rest = arguments
    model, device_name, fields = CASES[name]
    if dumped := [item.removeprefix("--text=") for item in rest if item.startswith("--text=")]:
        rest = [item for item in rest if not item.startswith("--text=")]
    if "--base=bfloat16" in rest:
        rest.remove("--base=bfloat16")
        fields = fields | {"model.quantize": ""}
    config, device = make_config(fields, rest), DEVICES[device_name]
    print(
        f"{name}: {model} on {device_name}: {' '.join(rest)} {config.model.quantize or config.model.dtype}", flush=True
    )
    started = time.perf_counter()
    compiled = compile_step(config, LLAMAS[model], device)
    found = compiled.memory_analysis()
    if dumped:
        Path(dumped[0]).write_text(compiled.as_text())
    total = (
        found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes
    )
    print(
        f"arguments {found.argument_size_in_bytes / GIB:.2f} GiB, temporaries {found.temp_size_in_bytes / GIB:.2f}, outputs "
        f"{found.output_size_in_bytes / GIB:.2f} (of which in place of arguments {found.alias_size_in_bytes / GIB:.2f}); "
        f"total {total / GIB:.2f} of {device.memory / GIB:.2f}, {(device.memory - total) / GIB:.2f} left"
        f"  [{time.perf_counter() - started:.0f} s to compile]"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
