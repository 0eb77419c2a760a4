"""DoRA: y = x W' + b with W' = m (W + s A B) / ||W + s A B||, column by column; m starts as ||W||.

Liu et al. 2024 (arXiv:2402.09353), eq. 5: direction and magnitude are trained apart. The norm is of the kernel's columns,
one for each output; it follows A and B, but no gradient flows through it (section 4.3). W + s A B is never formed: with s
in A, the squares of its column j add up to

    sum_i W_ij^2 + sum_r B_rj (2 (A^T W)_rj + (A^T A B)_rj)
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, LayerMask, over_layers, parameter
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.methods.lora.adapter import LoraEmbedding, LoraLinear
from peftjax.methods.lora.init import ResidualLora


class DoraLinear(LoraLinear):
    """x W + u + f (x W + u) + b, where u = s (x A) B and f = m / ||W + s A B|| - 1: in this order nothing changes where
    f and u are 0, and at the start f is 0 up to the rounding of the norm. magnitude m: [*stack, out].

    In training with dropout the x that f multiplies is dropped too, as in peft.
    """

    names: ClassVar = LoraLinear.names | {"lora_magnitude_vector": HfLeaf("magnitude")}

    def __init__(
        self, ranks: tuple[int, ...], scale: PeftConstant, a: nnx.Variable, b: nnx.Variable, dropout: float = 0.0
    ) -> None:
        super().__init__(ranks, scale, a, b, dropout)
        self.layers = LayerMask(tuple(rank > 0 for rank in ranks))
        self.magnitude: Any = nnx.data(None)

    def measure(self, kernel: jax.Array) -> None:
        """Make the magnitudes those of the kernel, [*stack, in, out], with the adapter as it is."""
        norm = over_layers(self, lambda one, kernel: one.norm(kernel.astype(jnp.float32)), kernel)
        self.magnitude = nnx.data(PeftParam(norm, axes=(*self.b.axes[:-2], self.b.axes[-1])))

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        (x,) = inputs
        parameters = self.with_bias(owner, parameters)
        y = compute(x, **parameters)
        update, dropped = self.update(x).astype(y.dtype), self.dropout(x)
        turned = y if dropped is x else compute(dropped, **parameters)  # one product where nothing is dropped
        if getattr(owner, "bias", None) is not None:
            bias = parameter(owner, "bias", parameters).astype(y.dtype)
            turned = turned - jnp.broadcast_to(bias, y.shape)
        ratio = self.ratio(parameter(owner, self.kernel, parameters).astype(jnp.float32))
        factor = (ratio - 1).astype(y.dtype)  # a ratio near 1 would lose its digits in bfloat16
        return y + update + jnp.broadcast_to(factor, y.shape) * (turned + update)

    def ratio(self, kernel: jax.Array) -> jax.Array:
        """m / ||W + s A B|| of one layer, [out]; kernel: float32 [in, out]."""
        ratio = self.magnitude.get_value() / jax.lax.stop_gradient(self.norm(kernel))
        return self.layers(ratio, jnp.ones_like(ratio))

    def norm(self, kernel: jax.Array) -> jax.Array:
        """||W + s A B|| of one layer, [out]; above 0, so that an output that is always 0 stays so."""
        a, b = self.factors()
        cross = jnp.matmul(a.T, kernel, precision="highest")  # [R, out]
        gram = jnp.matmul(jnp.matmul(a.T, a, precision="highest"), b, precision="highest")  # [R, out]
        square = jnp.square(kernel).sum(0) + (b * (2 * cross + gram)).sum(0)
        return jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))

    def changed(self, kernel: jax.Array) -> jax.Array:
        return super().changed(kernel) * self.ratio(kernel)[None]


class DoraEmbedding(DoraLinear, LoraEmbedding):
    """The same of a table, [V, D], whose columns are the features."""

    names: ClassVar = LoraEmbedding.names | {"lora_magnitude_vector": HfLeaf("magnitude")}


class DoraResidual(DoraLinear, ResidualLora):
    """DoRA whose A and B start as parts of the kernel."""

    plain: ClassVar = DoraLinear
