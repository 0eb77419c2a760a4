"""The time to switch from one attached adapter to another, relative to loading the other one from its file.

    JAX_PLATFORMS=cpu python benchmarks/swap.py

A random Llama of 24 layers and width 512 (about 81 million parameters) has two rank-16 LoRAs on all linear layers. A switch
is `use` and the new arguments of a compiled forward pass, which must not compile again. Times are medians.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

import peftjax
from peftjax.adapters import active_view
from peftjax.models import from_hf_config

CONFIG = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 24,
    "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
}  # fmt: skip


def median(function: Callable[[], object], repeats: int = 20) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    model = from_hf_config(CONFIG).make(nnx.Rngs(0))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    for seed, name in enumerate(("one", "two")):
        peftjax.attach(model, peftjax.Lora(rank=16), name, rngs=nnx.Rngs(seed))
    compiled = jax.jit(lambda graph, state, tokens: nnx.merge(graph, state)(tokens), static_argnums=0)
    tokens = jnp.zeros((1, 8), jnp.int32)
    names = iter(["two", "one"] * 1000)

    def switch() -> tuple:
        return nnx.split(active_view(peftjax.use(model, next(names))))

    for _ in range(2):
        jax.block_until_ready(compiled(*switch(), tokens))
    swapped = median(switch)
    with tempfile.TemporaryDirectory() as folder:
        path = peftjax.save_adapter(model, Path(folder) / "adapter", name="one")

        def load() -> None:
            peftjax.detach(peftjax.load_adapter(model, path, name="three"), "three")

        loaded = median(load, repeats=5)
    assert compiled._cache_size() == 1, "a switch caused a compilation"  # type: ignore[attr-defined]
    print(f"{parameters / 1e6:.0f} million parameters; switching takes {1e3 * swapped:.1f} ms, loading from a file "
          f"{1e3 * loaded:.0f} ms, ratio {swapped / loaded:.3f}; compiled once")  # fmt: skip


if __name__ == "__main__":
    main()
