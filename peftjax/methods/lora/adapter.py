"""What LoRA puts into a layer: the low-rank update of a Linear's kernel and of an Embedding's table."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.adapters.adapter import DeltaAdapter, HfLeaf, parameter, transposed
from peftjax.core.variables import PeftConstant
from peftjax.nn.dropout import Dropout
from peftjax.quant.matmul import matmul


class LoraLinear(DeltaAdapter):
    """x W + (x A * scale) B. a: [*stack, in, R], b: [*stack, R, out], scale: [*stack, R].

    ranks: of each layer, 0 where there is none. R is the largest of them; a layer of smaller rank has scale 0 beyond
    its own, a layer left out everywhere: there A and B get no gradient. Two things may be added to it: `bias`, a
    trained copy of the owner's, and `shift`, [*stack, out], a bias of B's own that is scaled with it.
    """

    names: ClassVar = {"lora_A.weight": transposed("a"), "lora_B.weight": transposed("b")}

    def __init__(
        self, ranks: tuple[int, ...], scale: PeftConstant, a: nnx.Variable, b: nnx.Variable, dropout: float = 0.0
    ) -> None:
        self.ranks = ranks
        self.scale, self.a, self.b = scale, a, b
        self.bias: Any = nnx.data(None)
        self.bias_layers: Any = nnx.data(None)
        self.shift: Any = nnx.data(None)
        self.dropout = Dropout(dropout, a.shape[:-2])

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        (x,) = inputs
        y = compute(x, **self.with_bias(owner, parameters))
        return y + self.update(x).astype(y.dtype)

    def with_bias(self, owner: nnx.Module, parameters: dict[str, Any]) -> dict[str, Any]:
        """The owner's parameters for one call, with the bias that is trained."""
        if self.bias is None:
            return parameters
        return parameters | {"bias": self.bias_layers(self.bias.get_value(), parameter(owner, "bias", parameters))}

    def update(self, x: jax.Array) -> jax.Array:
        """s (dropout(x) A) B + s shift: [..., in] -> [..., out]."""
        y = self.product(self.dropout(x), self.a, self.b)
        if self.shift is None:
            return y
        shift = self.shift.get_value() * self.scale.get_value()[0]
        return y + jnp.broadcast_to(shift.astype(y.dtype), y.shape)

    def product(self, x: jax.Array, a: nnx.Variable, b: nnx.Variable) -> jax.Array:
        """s (x a) b: [..., in] -> [..., out]."""
        low = matmul(x, a.get_value())  # [..., R]
        return matmul(self.scaled(low), b.get_value())

    def scaled(self, low: jax.Array) -> jax.Array:
        return low * jnp.broadcast_to(self.scale.get_value().astype(low.dtype), low.shape)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """[in, R] and [R, out] in float32, whose product is what is added to the kernel of one layer."""
        return self.scaled(self.a.get_value().astype(jnp.float32)), self.b.get_value().astype(jnp.float32)

    def delta(self) -> jax.Array:
        return jnp.matmul(*self.factors())

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        rank = self.ranks[layer or 0]
        windows = {"a": (slice(None), slice(rank)), "b": (slice(rank), slice(None))}
        leaves = {}
        if rank:
            leaves = {
                key: dataclasses.replace(leaf, window=windows.get(leaf.leaf, ())) for key, leaf in self.names.items()
            }
        if rank and self.shift is not None:
            leaves["lora_B.bias"] = HfLeaf("shift")
        if self.bias is not None and self.bias_layers.chosen[layer or 0]:
            leaves["base_layer.bias" if rank else "bias"] = HfLeaf("bias")  # peft wraps the layers that have a LoRA
        return leaves

    def merged(self, **parameters: jax.Array) -> dict[str, jax.Array]:
        merged = super().merged(**parameters)
        if self.bias is None and self.shift is None:
            return merged
        if "bias" not in parameters:
            raise ValueError(
                "method.lora_bias=True cannot be merged into a layer without a bias; leave the adapter attached, or "
                "train it with lora_bias=False"
            )
        bias = parameters["bias"].astype(jnp.float32)
        if self.bias is not None:
            bias = self.bias_layers(self.bias.get_value(), bias)
        if self.shift is not None:
            bias = bias + self.shift.get_value() * self.scale.get_value()[..., :1]
        return merged | {"bias": bias.astype(parameters["bias"].dtype)}


class LoraEmbedding(LoraLinear):
    """E[token] + (A[token] * scale) B: the same update of a table, [V, D], where x would be one-hot."""

    names: ClassVar = {"lora_embedding_A": transposed("a"), "lora_embedding_B": transposed("b")}
    kernel: ClassVar = "embedding"

    def product(self, x: jax.Array, a: nnx.Variable, b: nnx.Variable) -> jax.Array:
        """s a[x] b: int [...] -> [..., D]."""
        return matmul(self.scaled(jnp.take(a.get_value(), x, axis=0)), b.get_value())
