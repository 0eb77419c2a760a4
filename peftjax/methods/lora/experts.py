"""LoRA of experts: x W_e + s (x A_e) B_e in the rows of each expert e."""

import dataclasses
from typing import ClassVar

import jax

from peftjax.adapters.adapter import HfLeaf
from peftjax.methods.lora.adapter import LoraLinear
from peftjax.nn.experts import Groups
from peftjax.nn.slot import Base
from peftjax.quant.grouped import grouped_matmul


class LoraExperts(LoraLinear):
    """x W_e + (dropout(x) A_e * scale) B_e for the rows x of each expert e.

    The file holds A of all experts as one matrix [E * R, in], and B as [out, R * E], in which the expert index varies faster,
    as in peft's files with `target_parameters`.

    Attributes:
        a: [*stack, E, in, R].
        b: [*stack, E, R, out].
    """

    names: ClassVar = {"lora_A.weight": HfLeaf("a", axes=(0, 2, 1)), "lora_B.weight": HfLeaf("b", axes=(2, 1, 0))}

    def apply(self, base: Base, x: jax.Array, groups: Groups) -> jax.Array:  # type: ignore[override]
        y = base(x, groups)
        return y + self._update(self.dropout(x), groups).astype(y.dtype)

    def _update(self, x: jax.Array, groups: Groups) -> jax.Array:
        """s (x A_e) B_e: [n, rows, in] -> [n, rows, out]."""
        product = lambda x, factor: grouped_matmul(x, factor.get_value(), groups.owner, groups.used)  # noqa: E731
        return product(self.scaled(product(x, self.a)), self.b)

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        shapes = self._shapes()
        return {key: dataclasses.replace(leaf, shape=shapes[key]) for key, leaf in super().hf_leaves(layer).items()}

    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {"lora_A.weight": (-1, self.a.shape[-2]), "lora_B.weight": (self.b.shape[-1], -1)}


class SwappedLoraExperts(LoraExperts):
    """LoRA of an `UntransposedExpertLinear`, whose kernels peft adapts as transposed ones: its A is B here, and its B is A."""

    names: ClassVar = {"lora_A.weight": HfLeaf("b"), "lora_B.weight": HfLeaf("a", axes=(1, 2, 0))}

    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {"lora_A.weight": (-1, self.b.shape[-1]), "lora_B.weight": (self.a.shape[-2], -1)}
