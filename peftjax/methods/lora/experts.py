"""LoRA of experts, x W_e + s (x A_e) B_e in the rows of each expert e, and DoRA of experts."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from peftjax.adapters.adapter import HfLeaf
from peftjax.adapters.diagonal import times
from peftjax.methods.lora.adapter import LoraLinear
from peftjax.methods.lora.dora import DoraLinear, column_norms
from peftjax.nn.experts import Groups
from peftjax.nn.slot import Base
from peftjax.quant.grouped import grouped_matmul
from peftjax.quant.matmul import Kernel


class LoraExperts(LoraLinear):
    """x W_e + (dropout(x) A_e * scale) B_e for the rows x of each expert e.

    The file holds A of all experts as one matrix [E * R, in], and B as [out, R * E], in which the expert index varies faster,
    as in peft's files with `target_parameters`.

    R is the largest rank of all experts in the stack. The scale of an expert is 0 beyond its own rank.

    Attributes:
        ranks: The largest rank of each layer's experts.
        scale: s, [*stack, E, R].
        a: [*stack, E, in, R].
        b: [*stack, E, R, out].
    """

    wraps_experts: ClassVar = True
    names: ClassVar = {"lora_A.weight": HfLeaf("a", axes=(0, 2, 1)), "lora_B.weight": HfLeaf("b", axes=(2, 1, 0))}

    def apply(self, base: Base, x: jax.Array, groups: Groups) -> jax.Array:  # type: ignore[override]
        y = base(x, groups)
        return y + self._update(self.dropout(x), groups).astype(y.dtype)

    def _update(self, x: jax.Array, groups: Groups) -> jax.Array:
        """s (x A_e) B_e: [n, rows, in] -> [n, rows, out]."""
        product = lambda x, factor: grouped_matmul(x, factor.get_value(), groups.owner, groups.used)  # noqa: E731
        scale = self.scale.get_value()[groups.owner, None]  # [n, 1, R]
        return product(times(product(x, self.a), scale), self.b)

    def scaled(self, low: jax.Array) -> jax.Array:
        """s low for each expert, [E, ..., R]."""
        return times(low, self.scale.get_value()[:, None])

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        shapes = self._shapes()
        leaves = super().hf_leaves(layer).items()
        return {key: dataclasses.replace(leaf, shape=shapes.get(key)) for key, leaf in leaves}

    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {"lora_A.weight": (-1, self.a.shape[-2]), "lora_B.weight": (self.b.shape[-1], -1)}


class SwappedLoraExperts(LoraExperts):
    """LoRA of an `UntransposedExpertLinear`, whose kernels peft adapts as transposed ones: its A is B here, and its B is A."""

    names: ClassVar = {"lora_A.weight": HfLeaf("b"), "lora_B.weight": HfLeaf("a", axes=(1, 2, 0))}

    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {"lora_A.weight": (-1, self.b.shape[-1]), "lora_B.weight": (self.a.shape[-2], -1)}


class DoraExperts(LoraExperts, DoraLinear):
    """DoRA of each expert. Where a magnitude is exactly 0, m / ||W + s A B|| is 1, and the magnitude gets no gradient.

    Magnitudes start as norms, which are positive. If a file has only some experts, the magnitudes of the others are 0.

    Attributes:
        magnitude: m, [*stack, E, out].
    """

    names: ClassVar = LoraExperts.names | {"lora_magnitude_vector": HfLeaf("magnitude")}

    def apply(self, base: Base, x: jax.Array, groups: Groups) -> jax.Array:  # type: ignore[override]
        y, dropped = base(x, groups), self.dropout(x)
        update = self._update(dropped, groups).astype(y.dtype)
        turned = y if dropped is x else base(dropped, groups)  # one product without dropout
        factor = (self.ratio(base.parameter(self.kernel)) - 1)[groups.owner, None]  # [n, 1, out]
        return y + update + jnp.broadcast_to(factor.astype(y.dtype), y.shape) * (turned + update)

    def ratio(self, kernel: Kernel) -> jax.Array:
        """m_e / ||W_e + s A_e B_e|| of one layer, [E, out]; 1 where m_e is 0. kernel: [E, in, out]."""
        return jnp.where(self.magnitude.get_value() == 0, 1, super().ratio(kernel))

    def norm(self, kernel: Kernel) -> jax.Array:
        """||W_e + s A_e B_e|| of one layer, [E, out], one expert after another, so that only one is decoded at a time."""
        a, b = jax.lax.stop_gradient(self.factors())  # no derivatives of the loop
        return jax.lax.map(lambda one: column_norms(one[0].astype(jnp.float32), one[1], one[2]), (kernel, a, b))
