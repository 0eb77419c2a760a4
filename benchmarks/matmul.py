"""The time of a feed-forward layer's gradient with flattened leading axes, relative to `jnp.matmul` without flattening.

JAX_PLATFORMS=cpu python benchmarks/matmul.py
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.quant.matmul import matmul

BATCH, LENGTH, EMBED, MLP = 16, 128, 128, 352


def best_of(function: Callable, *arguments: Any, repeats: int = 10) -> float:
    """The shortest time of a compiled call in seconds."""
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - started)
    return min(times)


def gradients(product: Callable) -> Callable:
    def loss(kernels: tuple[jax.Array, ...], x: jax.Array, weights: jax.Array) -> jax.Array:
        gate, up, down = kernels
        return jnp.sum(product(jax.nn.silu(product(x, gate)) * product(x, up), down) * weights)

    return jax.grad(loss, argnums=(0, 1))


def main() -> None:
    shapes = [(EMBED, MLP), (EMBED, MLP), (MLP, EMBED), (BATCH, LENGTH, EMBED), (BATCH, LENGTH, EMBED)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    gate, up, down, x, weights = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    arguments = ((gate, up, down), x, weights)
    plain, ours = best_of(gradients(jnp.matmul), *arguments), best_of(gradients(matmul), *arguments)
    print(f"jnp.matmul {plain * 1e3:.1f} ms, flattened {ours * 1e3:.1f} ms, ratio {ours / plain:.2f}")


if __name__ == "__main__":
    main()
