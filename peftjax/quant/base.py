"""The interface of quantized kernels."""

import math

import jax
import numpy as np
from jax.typing import DTypeLike


class Quantized:
    """A frozen kernel [*stack, in, out] in a quantization format: a pytree whose leaves begin with the stack's axes.

    Attributes:
        dtype: The dtype that it decodes to.
    """

    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the decoded kernel."""
        raise NotImplementedError

    @property
    def format(self) -> str:
        """The name of the format, a key of `quant.FORMATS`."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """The number of axes of the decoded kernel."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    def astype(self, dtype: DTypeLike) -> jax.Array:
        """Decode the kernel, [*stack, in, out], rounded to `self.dtype` and then cast to `dtype`."""
        raise NotImplementedError

    def axes(self, kernel: tuple[str | None, ...]) -> list[tuple[str | None, ...]]:
        """Return the logical axes of every leaf, in the order of `jax.tree.leaves`, from the kernel's."""
        raise NotImplementedError

    def dot(self, x: jax.Array) -> jax.Array:
        """x W of one layer: [..., in] -> [..., out], in the dtype of x."""
        raise NotImplementedError

    def dot_transposed(self, y: jax.Array) -> jax.Array:
        """y W^T of one layer: [..., out] -> [..., in], in the dtype of y."""
        raise NotImplementedError
