"""The one place that looks at what a kernel is made of."""

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel: [..., in] x [in, out] -> [..., out] in the dtype of x, accumulated in at least float32.

    The kernel is cast to the dtype of x first: float32 parameters under bfloat16 computation are master weights.
    Leading axes are flattened: XLA's CPU backend takes the kernel's gradient, a product that contracts over all of
    them, at less than two thirds of the time that way (benchmarks/matmul.py).
    """
    rows = x.reshape(-1, x.shape[-1])
    accumulator = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.matmul(rows, kernel.astype(x.dtype), preferred_element_type=accumulator).astype(x.dtype)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])
