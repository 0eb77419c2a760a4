"""What every quantized kernel can do; the rest of the code knows no more of it."""

import math
from typing import Any

import jax
import jax.numpy as jnp


class Quantized:
    """A frozen kernel [*stack, in, out] in a number format of its own: a pytree whose leaves begin with the stack's axes.

    shape, ndim, size and dtype are those of the kernel that it stands for; dtype is what it decodes to.
    """

    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def format(self) -> str:
        """What `quantize=` calls the format."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def astype(self, dtype: Any) -> jax.Array:
        """The kernel decoded, [*stack, in, out], rounded to its own dtype and then given in `dtype`."""
        raise NotImplementedError

    def axes(self, kernel: tuple[str | None, ...]) -> list[tuple[str | None, ...]]:
        """The logical axes of every leaf, in the order of `jax.tree.leaves`, from those of the kernel."""
        raise NotImplementedError

    def dot(self, x: jax.Array) -> jax.Array:
        """x W of one layer: [..., in] -> [..., out], in the dtype of x."""
        raise NotImplementedError

    def dot_transposed(self, y: jax.Array) -> jax.Array:
        """y W^T of one layer: [..., out] -> [..., in], in the dtype of y."""
        raise NotImplementedError


def product(subscripts: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """An einsum in the dtype of x, accumulated and returned in at least float32."""
    accumulator = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(subscripts, x, kernel.astype(x.dtype), preferred_element_type=accumulator)
