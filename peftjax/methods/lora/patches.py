"""LoRA and DoRA of a patch embedding, whose kernel [P, P, C, D] is a matrix [P * P * C, D] applied to each patch."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, transposed
from peftjax.methods.lora.adapter import LoraLinear
from peftjax.methods.lora.dora import DoraLinear
from peftjax.nn.patches import to_patches
from peftjax.quant.matmul import Kernel, matmul


class LoraPatches(LoraLinear):
    """x W + (dropout(x) A * scale) B for the values x of each patch.

    The file holds two convolutions, as in peft: A with the size of a patch, and B with size 1.

    Attributes:
        a: [P, P, C, R].
        b: [R, D].
    """

    names: ClassVar = {"lora_A.weight": HfLeaf("a", axes=(3, 2, 0, 1)), "lora_B.weight": transposed("b")}

    def product(self, x: jax.Array, a: nnx.Variable, b: nnx.Variable) -> jax.Array:
        """s (patches(x) a) b: [B, H, W, C] -> [B, N, D]."""
        low = matmul(to_patches(x, a.shape[:2]), _flat(a.get_value()))
        return matmul(self.scaled(low), b.get_value())

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """s A [P * P * C, R] and B [R, D] in float32."""
        a, b = super().factors()
        return _flat(a), b

    def changed(self, kernel: jax.Array) -> jax.Array:
        return super().changed(_flat(kernel)).reshape(kernel.shape)

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        shapes = {"lora_B.weight": (*self.b.shape[::-1], 1, 1), "lora_magnitude_vector": (1, -1, 1, 1)}
        leaves = super().hf_leaves(layer).items()
        return {key: dataclasses.replace(leaf, shape=shapes.get(key)) for key, leaf in leaves}


class DoraPatches(LoraPatches, DoraLinear):
    """DoRA of a patch embedding, whose columns are the features."""

    names: ClassVar = LoraPatches.names | {"lora_magnitude_vector": HfLeaf("magnitude")}

    def norm(self, kernel: Kernel) -> jax.Array:
        return super().norm(_flat(kernel.astype(jnp.float32)))


def _flat(kernel: jax.Array) -> jax.Array:
    """[P, P, C, D] -> [P * P * C, D]."""
    return kernel.reshape(-1, kernel.shape[-1])
