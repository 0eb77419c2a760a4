"""int8 with one scale per output: W = codes * scale, scale = max |w| / 127 over each column.

The vector-wise quantization of Dettmers et al. 2022 (arXiv:2208.07339), section 2, applied to the weights only.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from peftjax.quant.base import Quantized
from peftjax.quant.products import dot, dot_transposed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8(Quantized):
    """A kernel [*stack, in, out] in int8.

    Attributes:
        codes: int8 [*stack, in, out], from -127 to 127.
        scale: float32 [*stack, out].
        dtype: The dtype that it decodes to.
    """

    codes: jax.Array
    scale: jax.Array
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @property
    def format(self) -> str:
        return "int8"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def astype(self, dtype: DTypeLike) -> jax.Array:
        return (self.codes.astype(jnp.float32) * self.scale[..., None, :]).astype(self.dtype).astype(dtype)

    def axes(self, kernel: tuple[str | None, ...]) -> list[tuple[str | None, ...]]:
        return [kernel, (*kernel[:-2], kernel[-1])]

    def dot(self, x: jax.Array) -> jax.Array:
        return _scaled(dot(x, self.codes), self.scale).astype(x.dtype)

    def dot_transposed(self, y: jax.Array) -> jax.Array:
        return dot_transposed(_scaled(y, self.scale).astype(y.dtype), self.codes).astype(y.dtype)


def _scaled(y: jax.Array, scale: jax.Array) -> jax.Array:
    return y * jnp.broadcast_to(scale, y.shape)


def quantize(kernel: jax.Array) -> Int8:
    """Quantize a kernel [in, out] to int8, rounding each weight to the nearest code."""
    values = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(values), axis=0) / 127
    codes = jnp.round(values / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)[None]).astype(jnp.int8)
    return Int8(codes, scale, np.dtype(kernel.dtype))
