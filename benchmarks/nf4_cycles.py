"""What products with NF4 kernels cost a TPU against bfloat16 ones, in the estimate of its compiler: no TPU is needed.

    python benchmarks/nf4_cycles.py [8b] [70b] > benchmarks/results/nf4_cycles.txt

The seven projections of a Llama's layer on 2048 tokens, y = x W and dx = dy W^T, compiled for a v5e (extra `tpu`). Prints
the estimated cycles of every projection and their sum, NF4 over bfloat16 (bound 1.10), and the largest temporary memory
of an NF4 product against its decoded kernel.
"""

import functools
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from qlora_memory import DEVICES, LLAMAS, device_mesh

from peftjax.plan import place
from peftjax.quant import nf4
from peftjax.quant.matmul import matmul

TOKENS = 2048


def projections(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(in, out) of a layer's linear layers."""
    embed, mlp = config["hidden_size"], config["intermediate_size"]
    kv = embed // config["num_attention_heads"] * config["num_key_value_heads"]
    return {
        "query": (embed, embed), "key": (embed, kv), "value": (embed, kv), "out": (embed, embed),
        "gate": (embed, mlp), "up": (embed, mlp), "down": (mlp, embed),
    }  # fmt: skip


def both(x: jax.Array, dy: jax.Array, kernel: Any) -> tuple[jax.Array, jax.Array]:
    """y = x W and dx = dy W^T."""
    y, backward = jax.vjp(lambda x: matmul(x, kernel), x)
    return y, backward(dy)[0]


@functools.cache
def compiled(inputs: int, outputs: int, quantized: bool) -> tuple[int, int]:
    """The estimated cycles of both products and their temporary memory in bytes."""
    device = DEVICES["v5e:1x1"]
    mesh = device_mesh(device, {})
    kernel = jax.ShapeDtypeStruct((inputs, outputs), jnp.bfloat16)
    x, dy = (jax.ShapeDtypeStruct((TOKENS, width), jnp.bfloat16) for width in kernel.shape)
    if quantized:
        kernel = jax.eval_shape(nf4.quantize, kernel)
    arguments = [place(value, (None, None), mesh) for value in (x, dy, kernel)]
    program = jax.jit(both).trace(*arguments).lower(lowering_platforms=(device.platform,)).compile()
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', program.as_text())))
    return cycles, program.memory_analysis().temp_size_in_bytes


def main(names: Sequence[str]) -> None:
    for name in names or ("8b", "70b"):
        dense, nested = 0, 0
        print(f"llama-3.1-{name}, {TOKENS} tokens: estimated cycles of y = x W and dx = dy W^T; temporary MiB of NF4")
        for projection, (inputs, outputs) in projections(LLAMAS[f"llama-3.1-{name}"]).items():
            (plain, _), (cycles, temporary) = (compiled(inputs, outputs, quantized) for quantized in (False, True))
            dense, nested = dense + plain, nested + cycles
            print(
                f"{projection:6} {inputs:6} x {outputs:6}  bfloat16 {plain:11,}  NF4 {cycles:11,}  ratio {cycles / plain:.3f}"
                f"  temporary {temporary / 2**20:.1f}, decoded kernel {2 * inputs * outputs / 2**20:.0f}",
                flush=True,
            )
        print(f"sum of the layer: {nested:,} / {dense:,} = {nested / dense:.3f} (bound 1.10)")


if __name__ == "__main__":
    main(sys.argv[1:])
