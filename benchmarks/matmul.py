"""The time of the matrix products of linear layers, relative to the plain einsum or `jnp.matmul`, on a CPU.

JAX_PLATFORMS=cpu python benchmarks/matmul.py
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.quant.matmul import matmul
from peftjax.quant.products import dot, dot_transposed, kernel_gradient, product

BATCH, LENGTH, EMBED, MLP = 16, 128, 128, 352

# Name, product, einsum, dtype, and [rows, in, out].
PRODUCTS = [
    ("x W", dot, "ri,io->ro", "bfloat16", (1, 2048, 32000)),
    ("y W^T", dot_transposed, "ro,io->ri", "bfloat16", (1, 49152, 576)),
    ("x W", dot, "ri,io->ro", "bfloat16", (64, 2048, 5632)),
    ("y W^T", dot_transposed, "ro,io->ri", "bfloat16", (64, 2048, 5632)),
    ("x^T y", kernel_gradient, "ri,ro->io", "bfloat16", (512, 768, 2048)),
    ("x^T y", kernel_gradient, "ri,ro->io", "bfloat16", (512, 2048, 768)),
    ("x^T y", kernel_gradient, "ri,ro->io", "bfloat16", (512, 2048, 16)),
    ("x^T y", kernel_gradient, "ri,ro->io", "float32", (512, 2048, 16)),
]


def best_of(functions: list[Callable], *arguments: Any, repeats: int = 30) -> list[float]:
    """The shortest time of a compiled call of each function in seconds; the functions take turns."""
    compiled = [jax.jit(function) for function in functions]
    for function in compiled:
        jax.block_until_ready(function(*arguments))
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, of_function in zip(compiled, times, strict=True):
            started = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            of_function.append(time.perf_counter() - started)
    return [min(of_function) for of_function in times]


def gradients(product: Callable) -> Callable:
    def loss(kernels: tuple[jax.Array, ...], x: jax.Array, weights: jax.Array) -> jax.Array:
        gate, up, down = kernels
        return jnp.sum(product(jax.nn.silu(product(x, gate)) * product(x, up), down) * weights)

    return jax.grad(loss, argnums=(0, 1))


def flattened() -> None:
    """The gradients of a feed-forward layer with flattened leading axes."""
    shapes = [(EMBED, MLP), (EMBED, MLP), (MLP, EMBED), (BATCH, LENGTH, EMBED), (BATCH, LENGTH, EMBED)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    gate, up, down, x, weights = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    plain, ours = best_of([gradients(jnp.matmul), gradients(matmul)], (gate, up, down), x, weights)
    print(f"gradients with flattened axes  {plain * 1e3:.2f} -> {ours * 1e3:.2f} ms, ratio {ours / plain:.2f}")


def main() -> None:
    for name, ours, subscripts, dtype, (rows, inputs, outputs) in PRODUCTS:
        sizes = {"r": rows, "i": inputs, "o": outputs}
        first, second = subscripts.split("->")[0].split(",")
        x, y = (jnp.ones([sizes[axis] for axis in axes], dtype) for axes in (first, second))
        before, after = best_of([lambda x, y, form=subscripts: product(form, x, y), ours], x, y)
        what = f"{name:6} {dtype:9} {rows} rows, {inputs} x {outputs}"
        print(f"{what:39} {before * 1e3:.2f} -> {after * 1e3:.2f} ms, ratio {after / before:.2f}")
    flattened()


if __name__ == "__main__":
    main()
