"""LoRA with a nonzero initial update, which is subtracted again: y = x W + s (x A B - x A0 B0)."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.methods.lora.adapter import LoraLinear


class ResidualLora(LoraLinear):
    """x W + s (x A B - x A0 B0), where A0 and B0 are the initial A and B.

    It equals peft's x (W - s A0 B0) + s x A B without changing W, so other adapters can share the base, and a quantized
    base is not quantized again. The two products have the same shape and are subtracted before x W is added: at
    initialization the difference is exactly zero where the device computes equal products to equal bits. Dropout only
    applies to the input of A, as in peft. The adapter file holds the LoRA of rank 2r that computes the same, with
    [A, A0] and [B; -B0].
    """

    plain: ClassVar[type[LoraLinear]] = LoraLinear  # the adapter that the file holds

    def __init__(
        self, ranks: tuple[int, ...], scale: PeftConstant, a: nnx.Variable, b: nnx.Variable, dropout: float = 0.0
    ) -> None:
        super().__init__(ranks, scale, a, b, dropout)
        self.a0, self.b0 = (PeftConstant(jnp.copy(leaf.get_value()), axes=leaf.axes) for leaf in (a, b))

    def update(self, x: jax.Array) -> jax.Array:
        return super().update(x) - self.product(x, self.a0, self.b0)

    def taken_from_kernel(self) -> jax.Array:
        return jnp.matmul(self.scaled(self.a0.get_value().astype(jnp.float32)), self.b0.get_value().astype(jnp.float32))

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """s [A, A0] [in, 2R] and [B; -B0] [2R, out]. The columns of A and A0 alternate, as do the rows of B and -B0, so
        that those within the rank of a layer come first."""
        a, a0 = (self.scaled(leaf.get_value().astype(jnp.float32)) for leaf in (self.a, self.a0))
        b, b0 = (leaf.get_value().astype(jnp.float32) for leaf in (self.b, self.b0))
        return _alternate(a, a0, -1), _alternate(b, -b0, -2)

    def exported(self) -> LoraLinear:
        a = _alternate(self.a.get_value(), self.a0.get_value(), -1)
        b = _alternate(self.b.get_value(), -self.b0.get_value(), -2)
        plain = self.plain(
            tuple(2 * rank for rank in self.ranks),
            PeftConstant(jnp.repeat(self.scale.get_value(), 2, axis=-1), axes=self.scale.axes),
            PeftParam(a, axes=self.a.axes),
            PeftParam(b, axes=self.b.axes),
        )
        for extra in ("bias", "bias_layers", "shift", "magnitude"):
            if extra in vars(self):
                setattr(plain, extra, nnx.data(getattr(self, extra)))
        return plain


def _alternate(one: Any, other: Any, axis: int) -> Any:
    """Interleave the slices of two arrays along `axis` (-1 or -2), which becomes twice as long."""
    shape = list(one.shape)
    shape[axis] *= 2
    return jnp.stack([one, other], axis=axis).reshape(shape)
