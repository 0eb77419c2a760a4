"""What products with NF4 kernels cost a TPU against bfloat16 ones, in the estimate of its compiler: no TPU is needed.

    python benchmarks/nf4_cycles.py [8b] [70b] > benchmarks/results/nf4_cycles.txt

The seven projections of a Llama's layer on 2048 tokens, y = x W and dx = dy W^T, compiled for a v5e (extra `tpu`). Prints
the estimated cycles of every projection and their sum, NF4 over bfloat16 (bound 1.10), and the largest temporary memory
of an NF4 product against its decoded kernel.
"""

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


def forward(x: jax.Array, kernel: Any) -> jax.Array:
    return matmul(x, kernel)


def backward(y: jax.Array, kernel: Any) -> jax.Array:
    x = jnp.zeros((len(y), kernel.shape[0]), y.dtype)
    return jax.vjp(lambda x: matmul(x, kernel), x)[1](y)[0]


def compiled(function: Any, rows: jax.ShapeDtypeStruct, kernel: Any) -> tuple[int, int]:
    """The estimated cycles of a product and its temporary memory in bytes."""
    device = DEVICES["v5e:1x1"]
    mesh = device_mesh(device, {})
    arguments = [place(value, (None,) * value.ndim, mesh) for value in (rows, kernel)]
    program = jax.jit(function).trace(*arguments).lower(lowering_platforms=(device.platform,)).compile()
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', program.as_text())))
    return cycles, program.memory_analysis().temp_size_in_bytes


def main(names: Sequence[str]) -> None:
    for name in names or ("8b", "70b"):
        sums = {"bfloat16": 0, "nf4": 0}
        print(f"llama-3.1-{name}, {TOKENS} tokens: estimated cycles, forward + backward, and temporary MiB (NF4)")
        for projection, (inputs, outputs) in projections(LLAMAS[f"llama-3.1-{name}"]).items():
            dense = jax.ShapeDtypeStruct((inputs, outputs), jnp.bfloat16)
            kernels = {"bfloat16": dense, "nf4": jax.eval_shape(nf4.quantize, dense)}
            line, temporary = "", 0
            for label, kernel in kernels.items():
                ways = ((forward, inputs), (backward, outputs))
                found = [
                    compiled(way, jax.ShapeDtypeStruct((TOKENS, width), jnp.bfloat16), kernel) for way, width in ways
                ]
                sums[label] += sum(cycles for cycles, _ in found)
                temporary = max(temp for _, temp in found)
                line += f"  {label} {found[0][0]:9,} + {found[1][0]:9,}"
            print(
                f"{projection:6} {inputs:6} x {outputs:6}{line}   {temporary / 2**20:6.1f} of "
                f"{dense.size * 2 / 2**20:.0f}",
                flush=True,
            )
        print(f"sum: {sums['nf4']:,} / {sums['bfloat16']:,} = {sums['nf4'] / sums['bfloat16']:.3f} (bound 1.10)")


if __name__ == "__main__":
    main(sys.argv[1:])
