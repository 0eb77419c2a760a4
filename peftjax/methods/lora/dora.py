"""DoRA: y = x W' + b with W' = m (W + s A B) / ||W + s A B||, column by column; m is initialized to ||W||.

Liu et al. 2024 (arXiv:2402.09353), eq. 5: direction and magnitude are trained separately. The norm is taken over each
column of the kernel, one per output. It depends on A and B, but no gradient flows through it (section 4.3). W + s A B is
never formed: with s included in A, the squares of its column j add up to

    sum_i W_ij^2 + sum_r B_rj (2 (A^T W)_rj + (A^T A B)_rj)
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, LayerMask, over_layers
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.methods.lora.adapter import LoraEmbedding, LoraLinear
from peftjax.methods.lora.residual import ResidualLora
from peftjax.nn.slot import Base
from peftjax.quant.matmul import Kernel


class DoraLinear(LoraLinear):
    """x W + u + f (x W + u) + b, where u = s (x A) B and f = m / ||W + s A B|| - 1.

    Computed in this order, nothing changes where f and u are 0. At initialization f is 0 up to rounding of the norm. In
    training with dropout, f also multiplies a dropped-out x, as in peft.

    Attributes:
        magnitude: m, [*stack, out].
    """

    names: ClassVar = LoraLinear.names | {"lora_magnitude_vector": HfLeaf("magnitude")}

    def __init__(
        self, ranks: tuple[int, ...], scale: PeftConstant, a: nnx.Variable, b: nnx.Variable, dropout: float = 0.0
    ) -> None:
        super().__init__(ranks, scale, a, b, dropout)
        self.layers = LayerMask(rank > 0 for rank in ranks)
        self.magnitude: Any = nnx.data(None)

    def measure(self, kernel: jax.Array) -> None:
        """Set the magnitudes to the norms ||W + s A B|| of the kernel [*stack, in, out] and the current A and B."""
        norm = over_layers(self, lambda one, kernel: one.norm(kernel), kernel)
        self.magnitude = nnx.data(PeftParam(norm, axes=(*self.b.axes[:-2], self.b.axes[-1])))

    def apply(self, base: Base, x: jax.Array) -> jax.Array:
        biases = self.biases(base)
        y = base(x, **biases)
        update, dropped = self.update(x).astype(y.dtype), self.dropout(x)
        turned = y if dropped is x else base(dropped, **biases)  # one product without dropout
        if base.has("bias"):
            bias = biases["bias"] if biases else base.parameter("bias")
            turned = turned - jnp.broadcast_to(bias.astype(y.dtype), y.shape)
        ratio = self.ratio(base.parameter(self.kernel))
        factor = (ratio - 1).astype(y.dtype)  # a ratio near 1 would lose its digits in bfloat16
        return y + update + jnp.broadcast_to(factor, y.shape) * (turned + update)

    def ratio(self, kernel: Kernel) -> jax.Array:
        """m / ||W + s A B|| of one layer, [out]; kernel: [in, out]."""
        return self.layers.or_one(self.magnitude.get_value() / jax.lax.stop_gradient(self.norm(kernel)))

    def norm(self, kernel: Kernel) -> jax.Array:
        """||W + s A B|| of one layer, [out]."""
        return column_norms(kernel.astype(jnp.float32), *self.factors())

    def changed(self, kernel: jax.Array) -> jax.Array:
        return super().changed(kernel) * self.ratio(kernel)[..., None, :]


def column_norms(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """||W + A B||, [out]; positive, so that an output that is always 0 stays 0.

    Args:
        kernel: W, float32 [in, out].
        a: Float32 [in, R].
        b: Float32 [R, out].
    """
    cross = jnp.matmul(a.T, kernel, precision="highest")  # [R, out]
    gram = jnp.matmul(jnp.matmul(a.T, a, precision="highest"), b, precision="highest")  # [R, out]
    square = jnp.square(kernel).sum(0) + (b * (2 * cross + gram)).sum(0)
    return jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))


class DoraEmbedding(DoraLinear, LoraEmbedding):
    """DoRA of a table [V, D], whose columns are the features."""

    names: ClassVar = LoraEmbedding.names | {"lora_magnitude_vector": HfLeaf("magnitude")}


class DoraResidual(DoraLinear, ResidualLora):
    """DoRA whose A and B are initialized from the kernel."""

    plain: ClassVar = DoraLinear
