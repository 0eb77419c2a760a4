"""Residual connections, with slots for bottleneck adapters."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from peftjax.nn.layer import SlottedLayer
from peftjax.nn.slot import Slot


class Residual(SlottedLayer):
    """x + f(x), with a slot for adapters that wrap f."""

    def __init__(self) -> None:
        self.adapters = Slot()

    def __call__(self, x: jax.Array, sublayer: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return self.join(x, self.adapters(self, sublayer, x))

    def join(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Combine the input and output of the sublayer, [B, T, D] each."""
        return x + y


class ScaledResidual(Residual):
    """x + factor * f(x), with the product in float32."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def join(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return x + scaled(y, self.factor)


class NormedResidual(Residual):
    """norm(x + f(x)): post-norm (Vaswani et al. 2017, section 3.1)."""

    def __init__(self, norm: Callable[[jax.Array], jax.Array]) -> None:
        super().__init__()
        self.norm = norm

    def join(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return self.norm(x + y)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """factor * x, computed in float32, because bfloat16 would also round the factor."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)
