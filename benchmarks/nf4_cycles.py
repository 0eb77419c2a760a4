"""The cost of matrix products with NF4 kernels relative to bfloat16 kernels on a TPU, as its compiler estimates it.

    python benchmarks/nf4_cycles.py

The seven projections of a Llama layer on 2048 tokens, y = x W and dx = dy W^T, are compiled for a v5e (extra `tpu`; no TPU
is needed): each product alone; all of them as one program in which projections share their inputs; and as in a train
step, the gradients of rank-16 LoRAs in four scanned and rematerialized layers. In each program the compiler chooses the
layouts of the activations, as it does between the layers of a model. Prints the sums of the estimated cycles of all
operations (the compiler has no estimate for the absmax lookup), the ratio of NF4 to bfloat16, and the temporary memory.
"""

import functools
import os
import re
import sys
from collections.abc import Callable
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}  # before jax

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from qlora_memory import sizes

from peftjax.plan import devices
from peftjax.quant import nf4
from peftjax.quant.matmul import matmul

TOKENS, LAYERS = 2048, 4
Cost = tuple[int, int]


def projections(config: dict[str, Any]) -> dict[str, dict[str, tuple[int, int]]]:
    """(in, out) of a layer's projections, grouped by their input."""
    embed, mlp = config["hidden_size"], config["intermediate_size"]
    kv = embed // config["num_attention_heads"] * config["num_key_value_heads"]
    return {
        "attention": {"query": (embed, embed), "key": (embed, kv), "value": (embed, kv)},
        "attended": {"out": (embed, embed)},
        "feedforward": {"gate": (embed, mlp), "up": (embed, mlp)},
        "gated": {"down": (mlp, embed)},
    }


def both_passes(activations: tuple[Any, Any], kernels: Any) -> Any:
    """y = x W for every kernel, and for every input dx = sum of dy W^T over the kernels that read it.

    activations: the inputs, and the gradients of the outputs.
    """
    inputs, gradients = activations

    def products(inputs: Any) -> Any:
        return {name: {one: matmul(x, kernel) for one, kernel in kernels[name].items()} for name, x in inputs.items()}

    outputs, backward = jax.vjp(products, inputs)
    return outputs, backward(gradients)[0]


def gradients(shapes: dict[str, tuple[int, int]], kernels: Any) -> Cost:
    """The cost of the gradients of LoRAs on the projections of scanned, rematerialized layers. A product of the same shapes
    stands in for the attention core. The body of a loop counts once."""

    def layer(x: jax.Array, slices: Any) -> tuple[jax.Array, None]:
        linear = lambda name, x: matmul(x, slices[name][0]) + x @ slices[name][1] @ slices[name][2]  # noqa: E731
        h = normed(x)
        shared = jax.nn.softmax(linear("key", h) * linear("value", h))
        query = linear("query", h)
        x = x + linear("out", query * jnp.tile(shared, (1, query.shape[-1] // shared.shape[-1])))
        h = normed(x)
        return x + linear("down", jax.nn.silu(linear("gate", h)) * linear("up", h)), None

    def loss(x: jax.Array, loras: Any, kernels: Any) -> jax.Array:
        stacked = {name: (kernels[name], *lora) for name, lora in loras.items()}
        return jnp.sum(jnp.square(jax.lax.scan(jax.checkpoint(layer), x, stacked)[0].astype(jnp.float32)))

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    loras = {name: (array(LAYERS, inputs, 16), array(LAYERS, 16, out)) for name, (inputs, out) in shapes.items()}
    return cost(jax.grad(loss, argnums=1), rows(shapes["query"][0]), loras, kernels)


def normed(x: jax.Array) -> jax.Array:
    squares = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(squares + 1e-5)).astype(x.dtype)


def layer(config: dict[str, Any]) -> tuple[Any, Any]:
    """The shapes of the activations (the inputs, and the gradients of the outputs) and of the kernels."""
    shapes = projections(config)
    inputs = {name: rows(next(iter(group.values()))[0]) for name, group in shapes.items()}
    gradients = {name: {one: rows(out) for one, (_, out) in group.items()} for name, group in shapes.items()}
    kernels = {
        name: {one: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for one, shape in group.items()}
        for name, group in shapes.items()
    }
    return (inputs, gradients), kernels


def rows(width: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((TOKENS, width), jnp.bfloat16)


def forward(x: jax.Array, kernel: Any) -> jax.Array:
    return matmul(x, kernel)


def backward(y: jax.Array, kernel: Any) -> jax.Array:
    x = jnp.zeros((TOKENS, kernel.shape[0]), y.dtype)
    return jax.vjp(lambda x: matmul(x, kernel), x)[1](y)[0]


@functools.cache
def product(inputs: int, outputs: int, quantized: bool) -> Cost:
    """The cost of y = x W and dx = dy W^T as two programs: their cycles together, and the larger temporary memory."""
    kernel: Any = jax.ShapeDtypeStruct((inputs, outputs), jnp.bfloat16)
    kernel = jax.eval_shape(nf4.quantize, kernel) if quantized else kernel
    one, other = cost(forward, rows(inputs), kernel), cost(backward, rows(outputs), kernel)
    return one[0] + other[0], max(one[1], other[1])


def cost(function: Callable, activations: Any, *parameters: Any) -> Cost:
    """The estimated cycles of the program function(activations, *parameters), and its temporary memory in bytes."""
    device = devices.find("v5e:1x1")
    mesh = device.mesh({"data": 1, "fsdp": 1, "tensor": 1})
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    chosen = Format(Layout.AUTO, sharding)
    jitted = jax.jit(function, in_shardings=(chosen, *[sharding] * len(parameters)), out_shardings=chosen)
    program = jitted.trace(activations, *parameters).lower(lowering_platforms=(device.platform,)).compile()
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', program.as_text())))
    return cycles, program.memory_analysis().temp_size_in_bytes


def main() -> None:
    if missing := devices.find("v5e:1x1").missing():
        sys.exit(missing)
    for name in ("llama-3.1-8b", "llama-3.1-70b"):
        print(f"{name}, {TOKENS} tokens: estimated cycles of NF4 / bfloat16; temporary memory of NF4 in MiB")
        total = {False: 0, True: 0}
        for group in projections(sizes(name)).values():
            for one, (inputs, outputs) in group.items():
                (dense, _), (nested, temporary) = (product(inputs, outputs, quantized) for quantized in (False, True))
                total[False], total[True] = total[False] + dense, total[True] + nested
                print(
                    f"  {one:6} {inputs:5} x {outputs:5} {nested:11,} / {dense:11,} = {nested / dense:.3f}; "
                    f"{temporary / 2**20:.1f}, a decoded kernel has {2 * inputs * outputs / 2**20:.0f}",
                    flush=True,
                )
        print(f"  sum of the single products: {total[True] / total[False]:.3f} (bound 1.10)")
        activations, kernels = layer(sizes(name))
        quantized = jax.tree.map(lambda kernel: jax.eval_shape(nf4.quantize, kernel), kernels)
        dense, _ = cost(both_passes, activations, kernels)
        nested, temporary = cost(both_passes, activations, quantized)
        print(f"  as one program: {nested:,} / {dense:,} = {nested / dense:.3f}; {temporary / 2**20:.0f}", flush=True)
        shapes = {one: shape for group in projections(sizes(name)).values() for one, shape in group.items()}
        stacks = {one: jax.ShapeDtypeStruct((LAYERS, *shape), jnp.bfloat16) for one, shape in shapes.items()}
        nested_stacks = {one: jax.eval_shape(jax.vmap(nf4.quantize), stack) for one, stack in stacks.items()}
        dense, dense_temporary = gradients(shapes, stacks)
        nested, temporary = gradients(shapes, nested_stacks)
        print(
            f"  in layers with LoRA: {nested:,} / {dense:,} = {nested / dense:.3f}; {temporary / 2**20:.0f}, "
            f"bfloat16 has {dense_temporary / 2**20:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
