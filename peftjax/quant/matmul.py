"""The one place that looks at what a kernel is made of."""

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel: [..., in] x [in, out] -> [..., out] in the dtype of x, accumulated in at least float32.

    The kernel is cast to the dtype of x first: float32 parameters under bfloat16 computation are master weights.
    """
    accumulator = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=accumulator).astype(x.dtype)
