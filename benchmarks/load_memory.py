"""How much memory loading and saving a model takes, beyond the model itself.

    python benchmarks/load_memory.py

Writes a Llama of about 315 million random parameters to a temporary directory, then loads it in a fresh process for
each line of the table and prints by how much the peak of the process's resident memory (VmHWM of /proc, so Linux) grew
above what it had once JAX was up: in all, as a multiple of the model's bytes, and what was beyond them in units of the
largest tensor that is read at once (in the wider of its two dtypes). "saving" is how much further the peak grew while
the model was written again: by one shard, which here is all of the model.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

CONFIG = {
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
LARGEST = CONFIG["vocab_size"] * CONFIG["hidden_size"]  # parameters of the embedding
BYTES = {"float32": 4, "bfloat16": 2}
# (stored dtype, dtype in memory, devices, mesh)
CASES = (
    ("float32", "float32", 1, {}),
    ("bfloat16", "bfloat16", 1, {}),
    ("float32", "bfloat16", 1, {}),
    ("bfloat16", "float32", 1, {}),
    ("float32", "float32", 4, {"fsdp": 2, "tensor": 2}),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print("stored    loaded    devices  model MB  peak MB  ratio  beyond  saving MB")
        for stored, loaded, devices, mesh in CASES:
            directory = Path(folder, stored)
            if not directory.exists():
                write_model(directory, stored)
            flags = f"--xla_force_host_platform_device_count={devices}"
            arguments = [str(directory), str(Path(folder, "saved")), loaded, json.dumps(mesh)]
            command = [sys.executable, __file__, "child", *arguments]
            environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
            found = json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
            size, peak = found["model"], found["loading"]
            beyond = (peak - size) / (LARGEST * max(BYTES[stored], BYTES[loaded]))
            sizes = (
                f"{size / 1e6:8.0f} {peak / 1e6:8.0f} {peak / size:6.2f} {beyond:7.2f} {found['saving'] / 1e6:10.0f}"
            )
            print(f"{stored:9} {loaded:9} {devices:7}  {sizes}", flush=True)


def write_model(directory: Path, dtype: str) -> None:
    """Random weights."""
    import ml_dtypes  # noqa: F401  NumPy knows bfloat16 by its name from then on
    from flax import nnx
    from safetensors.numpy import save_file

    from peftjax import models
    from peftjax.io import hf_files, hf_model

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    model = nnx.eval_shape(lambda: models.from_hf_config(CONFIG).make(nnx.Rngs(0)))
    random = np.random.default_rng(0)
    tensors = {
        key: random.standard_normal(entry.stored_shape, np.float32).astype(dtype)
        for entry in hf_model.entries(model)
        for key in entry.keys
    }
    save_file(tensors, directory / hf_files.WEIGHTS, {"format": "pt"})


def child(directory: str, target: str, dtype: str, mesh_sizes: str) -> None:
    import jax

    from peftjax import sharding
    from peftjax.core import variables
    from peftjax.io import hf_model

    mesh = sharding.make_mesh(json.loads(mesh_sizes))
    jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(8))())  # the compiler's own memory is not the model's
    before = resident("VmRSS")
    model = hf_model.load_model(directory, dtype, mesh=mesh)
    loading = resident("VmHWM") - before
    size = sum(variable.get_value().nbytes for variable in variables.flat(model)[1].values())
    hf_model.save_model(model, target)
    saving = resident("VmHWM") - before - loading
    print(json.dumps({"model": size, "loading": loading, "saving": saving}))


def resident(field: str) -> int:
    """Bytes of resident memory: now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["child"] else main()
