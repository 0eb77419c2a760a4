"""What products with NF4 kernels cost a TPU against bfloat16 ones, in the estimate of its compiler: no TPU is needed.

    python benchmarks/nf4_cycles.py

The seven projections of a Llama's layer on 2048 tokens, y = x W and dx = dy W^T, as one program for a v5e (extra `tpu`),
in which those of one input share it. Prints the sum of the estimated cycles of all its operations (the products, and
what brings activations into other layouts), NF4 over bfloat16, and the temporary memory against the decoded kernels.
"""

import os
import re
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}  # before jax

import jax
import jax.numpy as jnp
from qlora_memory import DEVICES, LLAMAS, device_mesh

from peftjax.plan import place
from peftjax.quant import nf4
from peftjax.quant.matmul import matmul

TOKENS = 2048


def projections(config: dict[str, Any]) -> dict[str, dict[str, tuple[int, int]]]:
    """(in, out) of a layer's linear layers, those of one input together."""
    embed, mlp = config["hidden_size"], config["intermediate_size"]
    kv = embed // config["num_attention_heads"] * config["num_key_value_heads"]
    return {
        "attention": {"query": (embed, embed), "key": (embed, kv), "value": (embed, kv)},
        "attended": {"out": (embed, embed)},
        "feedforward": {"gate": (embed, mlp), "up": (embed, mlp)},
        "gated": {"down": (mlp, embed)},
    }


def both_passes(inputs: Any, gradients: Any, kernels: Any) -> Any:
    """y = x W of every kernel, and the gradient of every input, dx = sum of dy W^T over the kernels that it goes into."""

    def products(inputs: Any) -> Any:
        return {name: {one: matmul(x, kernel) for one, kernel in kernels[name].items()} for name, x in inputs.items()}

    outputs, backward = jax.vjp(products, inputs)
    return outputs, backward(gradients)[0]


def compiled(config: dict[str, Any], quantized: bool) -> tuple[int, int]:
    """The estimated cycles of a layer's products and their temporary memory in bytes."""
    device = DEVICES["v5e:1x1"]
    mesh = device_mesh(device, {})
    shapes = projections(config)
    rows = lambda width: jax.ShapeDtypeStruct((TOKENS, width), jnp.bfloat16)  # noqa: E731
    inputs = {name: rows(next(iter(group.values()))[0]) for name, group in shapes.items()}
    gradients = {name: {one: rows(out) for one, (_, out) in group.items()} for name, group in shapes.items()}
    kernels: Any = {
        name: {one: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for one, shape in group.items()}
        for name, group in shapes.items()
    }
    if quantized:
        kernels = jax.tree.map(lambda kernel: jax.eval_shape(nf4.quantize, kernel), kernels)
    arguments = jax.tree.map(lambda leaf: place(leaf, (None,) * leaf.ndim, mesh), (inputs, gradients, kernels))
    program = jax.jit(both_passes).trace(*arguments).lower(lowering_platforms=(device.platform,)).compile()
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', program.as_text())))
    return cycles, program.memory_analysis().temp_size_in_bytes


def main() -> None:
    for name in ("llama-3.1-8b", "llama-3.1-70b"):
        (dense, _), (nested, temporary) = (compiled(LLAMAS[name], quantized) for quantized in (False, True))
        decoded = [2 * a * b for group in projections(LLAMAS[name]).values() for a, b in group.values()]
        print(
            f"{name}, {TOKENS} tokens: NF4 {nested:,} cycles, bfloat16 {dense:,}: {nested / dense:.3f} (bound 1.10); "
            f"temporary memory with NF4 {temporary / 2**20:.0f} MiB, all kernels decoded {sum(decoded) / 2**20:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
