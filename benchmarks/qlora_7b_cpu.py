"""The peak memory of QLoRA on a 7B Llama on a CPU, from loading a 16-bit checkpoint to taking optimizer steps.

    python benchmarks/qlora_7b_cpu.py DIR [--layers=32] [--dtype=bfloat16] [--steps=3]

DIR holds the checkpoint, 13.5 GB in bfloat16. If there is none, another process writes random weights in LLaMA 7B's shape
there. The script loads it and quantizes each kernel to NF4 as it is read, attaches a rank-16 LoRA to all linear layers and
takes AdamW steps on one sequence of 32 random tokens, always the same, with the train step of `peftjax train`.
It prints the peak resident memory of the process (VmHWM in /proc, so Linux only), including Python and the compiler,
relative to 8 GiB and to the checkpoint's bytes.
"""

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from load_memory import resident

GIB = 2**30
MODEL = Path(__file__).parent / "models" / "llama-7b" / "config.json"
BOUND, LENGTH = 8 * GIB, 32


def write(directory: str, layers: str) -> None:
    from load_memory import write_model

    write_model(Path(directory), json.loads(MODEL.read_text()) | {"num_hidden_layers": int(layers)}, "bfloat16")


def prepare(directory: Path, dtype: str) -> tuple[Any, Any, Any]:
    """Load and quantize the model and attach its LoRA; return the train step, its state and the frozen parameters."""
    from flax import nnx

    import peftjax
    from peftjax import methods
    from peftjax.core import variables
    from peftjax.totals import next_token_loss
    from peftjax.training import optim
    from peftjax.training.step import Objective, init_state, make_train_step

    model = peftjax.load_model(directory, dtype, quantize="nf4", remat="block")
    report("after loading")
    method = methods.Lora(rank=16, targets="all-linear")
    peftjax.attach(model, method, rngs=nnx.Rngs(0))
    graph, leaves = variables.flat(model)
    _, trainable, frozen = variables.split_by_kind(model, method.trains)
    decayed = optim.decay_mask(trainable, {path: leaf.axes for path, leaf in leaves.items()})
    optimizer = optim.make_optimizer(optim.OptimConfig(learning_rate=1e-3), 100, decayed)
    state = init_state(trainable, optimizer, seed=0)
    variables.update(model, state.trainable)  # the state holds copies: let go of the originals, as train.py does
    return make_train_step(Objective(graph, partial(next_token_loss, chunk=LENGTH)), optimizer, state), state, frozen


def report(when: str) -> None:
    peak = resident("VmHWM")
    print(f"peak {when:14} {peak / GIB:5.2f} GiB, {peak / BOUND:4.2f} of 8 GiB; now {current('VmRSS')}, "
          f"{current('RssAnon')} of it anonymous and {current('RssFile')} of mapped files", flush=True)  # fmt: skip


def current(field: str) -> str:
    return f"{resident(field) / GIB:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    if not (options.directory / "config.json").exists():
        subprocess.run([sys.executable, __file__, "write", str(options.directory), str(options.layers)], check=True)
    stored = sum(file.stat().st_size for file in options.directory.glob("*.safetensors"))
    print(f"{options.layers} layers, {stored / GIB:.2f} GiB in bfloat16; compute dtype {options.dtype}")

    import jax
    import numpy as np

    from peftjax import sharding

    report("before")
    started = time.perf_counter()
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        step, state, frozen = prepare(options.directory, options.dtype)
        print(f"ready after {time.perf_counter() - started:.0f} s")
        tokens = np.random.default_rng(0).integers(0, 32000, (1, LENGTH + 1), np.int32)
        rows = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "loss_weights": np.ones((1, LENGTH), np.float32),
        }
        batch = sharding.shard_batch(rows, mesh)
        for number in range(1, options.steps + 1):
            started = time.perf_counter()
            state, measured = step(state, frozen, batch)
            loss = float(measured["loss"])
            print(f"step {number}: loss {loss:.4f}, {time.perf_counter() - started:.0f} s", flush=True)
    report("after the steps")
    print(f"peak / checkpoint bytes: {resident('VmHWM') / stored:.2f}")


if __name__ == "__main__":
    write(*sys.argv[2:]) if sys.argv[1:2] == ["write"] else main()
