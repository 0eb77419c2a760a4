"""The memory that loading and saving a model takes in addition to the model itself.

    python benchmarks/load_memory.py

Writes random Llamas of about 315 million and, in TinyLlama's shape, 1.1 billion parameters to a temporary directory. Each
line of the table comes from a fresh process that loads one of them. "peak MB" is the growth of the process's peak resident
memory (VmHWM in /proc, so Linux only) after a small model was loaded; "ratio" is that growth relative to the model's bytes;
"beyond" is the growth beyond the model's bytes, in units of the largest tensor that is read at once, the embedding (in the
wider of its two dtypes). "saving MB" is the further growth while the model is saved: one shard of at most 2 GB.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 22,
    "num_attention_heads": 16,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
TINYLLAMA = SMALL | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
BYTES = {"float32": 4, "bfloat16": 2}
# (config, stored dtype, dtype in memory, format of the kernels, devices, mesh)
CASES: tuple[tuple[dict[str, Any], str, str, str, int, dict[str, int]], ...] = (
    (SMALL, "float32", "float32", "", 1, {}),
    (SMALL, "bfloat16", "bfloat16", "", 1, {}),
    (SMALL, "float32", "bfloat16", "", 1, {}),
    (SMALL, "bfloat16", "float32", "", 1, {}),
    (SMALL, "float32", "float32", "", 4, {"fsdp": 2, "tensor": 2}),
    (TINYLLAMA, "bfloat16", "bfloat16", "", 1, {}),
    (TINYLLAMA, "bfloat16", "bfloat16", "nf4", 1, {}),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print("width  stored    loaded    kernels  devices  model MB  peak MB  ratio  beyond  saving MB")
        for config, stored, loaded, quantize, devices, mesh in CASES:
            width = config["hidden_size"]
            directory = Path(folder, f"{width}-{stored}")
            if not directory.exists():
                write_model(directory, config, stored)
            flags = f"--xla_force_host_platform_device_count={devices}"
            arguments = [str(directory), str(Path(folder, "saved")), loaded, quantize, json.dumps(mesh)]
            command = [sys.executable, __file__, "child", *arguments]
            environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
            found = json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
            size, peak = found["model"], found["loading"]
            beyond = (peak - size) / (config["vocab_size"] * width * max(BYTES[stored], BYTES[loaded]))
            sizes = (
                f"{size / 1e6:8.0f} {peak / 1e6:8.0f} {peak / size:6.2f} {beyond:7.2f} {found['saving'] / 1e6:10.0f}"
            )
            print(f"{width:5}  {stored:9} {loaded:9} {quantize or 'dense':8} {devices:6}  {sizes}", flush=True)


def write_model(directory: Path, config: dict, dtype: str) -> None:
    """Write random weights, drawn from 65536 normal numbers, and norms of 1: one file per layer and one for the rest. Only
    one file is in memory at a time."""
    import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
    from safetensors.numpy import save_file

    from peftjax import models
    from peftjax.io import entries, hf_files

    model = models.from_hf_config(config).abstract()
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for entry in entries.entries(model):
        for layer, key in enumerate(entry.keys):
            files.setdefault(f"model-{layer if entry.stacked else 'rest'}.safetensors", {})[key] = entry.stored_shape
    directory.mkdir(parents=True)
    random = np.random.default_rng(0)
    table = (0.02 * random.standard_normal(2**16)).astype(dtype)
    for file, shapes in files.items():
        tensors = {
            key: np.ones(shape, dtype) if len(shape) == 1 else table[random.integers(0, 2**16, shape, np.uint16)]
            for key, shape in shapes.items()
        }
        save_file(tensors, directory / file, {"format": "pt"})
    where = {key: file for file, shapes in files.items() for key in shapes}
    (directory / hf_files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (directory / "config.json").write_text(json.dumps(config))  # last: a directory with it is complete


def child(directory: str, target: str, dtype: str, quantize: str, mesh_sizes: str) -> None:
    import jax

    from peftjax import sharding
    from peftjax.core import variables
    from peftjax.io.load import load_model
    from peftjax.io.save import save_model

    mesh = sharding.make_mesh(json.loads(mesh_sizes))
    load_model("embedded", dtype, quantize or None, mesh=mesh)  # so that the compiler's own memory does not count
    before = resident("VmRSS")
    model = load_model(directory, dtype, quantize or None, mesh=mesh)
    loading = resident("VmHWM") - before
    leaves = jax.tree.leaves([variable.get_value() for variable in variables.flat(model)[1].values()])
    size = sum(leaf.size * (4 if leaf.dtype == jax.numpy.int4 else 8 * leaf.dtype.itemsize) // 8 for leaf in leaves)
    save_model(model, target)
    saving = resident("VmHWM") - before - loading
    print(json.dumps({"model": size, "loading": loading, "saving": saving}))


def resident(field: str) -> int:
    """Bytes of resident memory: current (VmRSS) or peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["child"] else main()
