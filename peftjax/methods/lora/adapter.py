"""The low-rank update of a Linear's kernel, x W + (x A * s) B, and of an Embedding's table."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, LayerMask, transposed
from peftjax.adapters.diagonal import times
from peftjax.adapters.ranks import RankedAdapter
from peftjax.core.errors import UserError
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.nn.dropout import Dropout
from peftjax.nn.slot import Base
from peftjax.quant.matmul import matmul


class LoraLinear(RankedAdapter):
    """x W + (dropout(x) A * scale) B, optionally with trained biases.

    R is the largest rank of the stack. A layer of smaller rank has scale 0 beyond its own rank, and a layer without the
    adapter has scale 0 everywhere, so that the padding of A and B gets no gradient.

    Attributes:
        ranks: The rank of each layer, 0 in a layer without the adapter.
        scale: s, [*stack, R].
        a: [*stack, in, R].
        b: [*stack, R, out].
        bias: Trained copy of the layer's bias, [*stack, out], or None.
        bias_layers: The layers whose bias is trained.
        shift: Trained bias of B, [*stack, out], which is scaled as B is, or None.
    """

    names: ClassVar = {"lora_A.weight": transposed("a"), "lora_B.weight": transposed("b")}
    ranks: tuple[int, ...]

    def __init__(
        self, ranks: tuple[int, ...], scale: PeftConstant, a: nnx.Variable, b: nnx.Variable, dropout: float = 0.0
    ) -> None:
        self.ranks = ranks
        self.scale, self.a, self.b = scale, a, b
        self.bias: Any = nnx.data(None)
        self.bias_layers: Any = nnx.data(None)
        self.shift: Any = nnx.data(None)
        self.dropout = Dropout(dropout, scale.shape[: scale.axes.count("layers")])

    def hold_bias(self, bias: PeftParam, layers: LayerMask) -> bool:
        self.bias, self.bias_layers = nnx.data(bias), nnx.data(layers)
        return True

    def apply(self, base: Base, x: jax.Array) -> jax.Array:
        y = base(x, **self.biases(base))
        return y + self.update(x).astype(y.dtype)

    def biases(self, base: Base) -> dict[str, jax.Array]:
        """The parameters to replace in the base: the trained bias, if there is one."""
        return {} if self.bias is None else {"bias": self.bias_layers(self.bias.get_value(), base.parameter("bias"))}

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
        """s low over the last axis, in the dtype of `low` [..., R]."""
        return times(low, self.scale.get_value())

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """s A [in, R] and B [R, out] of one layer in float32; their product is the update of the kernel."""
        return self.scaled(self.a.get_value().astype(jnp.float32)), self.b.get_value().astype(jnp.float32)

    def delta(self) -> jax.Array:
        return jnp.matmul(*self.factors())

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        leaves, rank = super().hf_leaves(layer), self.ranks[layer or 0]
        if rank and self.shift is not None:
            leaves["lora_B.bias"] = HfLeaf("shift")
        if self.bias is not None and layer in self.bias_layers:
            leaves["base_layer.bias" if rank else "bias"] = HfLeaf("bias")  # peft wraps the layers that have a LoRA
        return leaves

    def merged(self, **parameters: jax.Array) -> dict[str, jax.Array]:
        merged = super().merged(**parameters)
        if self.bias is None and self.shift is None:
            return merged
        if "bias" not in parameters:
            raise UserError(
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
    """E[token] + (A[token] * s) B: the update of a table [V, D], as if x were one-hot."""

    names: ClassVar = {"lora_embedding_A": transposed("a"), "lora_embedding_B": transposed("b")}
    kernel: ClassVar = "embedding"

    def product(self, x: jax.Array, a: nnx.Variable, b: nnx.Variable) -> jax.Array:
        """s a[x] b: int [...] -> [..., D]."""
        return matmul(self.scaled(jnp.take(a.get_value(), x, axis=0)), b.get_value())
