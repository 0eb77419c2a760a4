"""Linear layers."""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from peftjax import sharding
from peftjax.nn.layer import HfLeaves, SlottedLayer
from peftjax.nn.slot import Slot
from peftjax.quant.matmul import matmul

OUTPUT = "linear_output"  # name for rematerialization


class Linear(SlottedLayer):
    """x W + b over the last axis: [..., in] -> [..., out] in the dtype of x.

    Attributes:
        kernel: [in, out]; None if the layer is tied, and each call passes one, `linear(x, kernel=...)`.
        bias: [out], or None.

    Args:
        in_features: Input width.
        out_features: Output width.
        axes: Logical axes of the kernel.
        use_bias: Whether the layer has a bias.
        tied: Whether the layer uses another layer's kernel, as the head of a model with tied embeddings does.
        stddev: Standard deviation of a random kernel.
        dtype: Dtype of the parameters.
        rngs: Source of random weights.
    """

    hf_leaves: ClassVar[HfLeaves] = {"kernel": ("weight", (1, 0)), "bias": ("bias", None)}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str, str],
        use_bias: bool = False,
        tied: bool = False,
        stddev: float = 0.02,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features, self.out_features, self.axes = in_features, out_features, axes
        value = stddev * jax.random.normal(rngs.params(), (in_features, out_features), jnp.float32)
        self.kernel = nnx.data(None if tied else nnx.Param(value.astype(dtype), axes=axes))
        self.bias = nnx.data(nnx.Param(jnp.zeros((out_features,), dtype), axes=axes[1:]) if use_bias else None)
        self.adapters = Slot()

    def __call__(self, x: jax.Array, **parameters: jax.Array) -> jax.Array:
        return checkpoint_name(self.adapters(self, self.dense, x, **parameters), OUTPUT)

    def dense(self, x: jax.Array, kernel: jax.Array | None = None, bias: jax.Array | None = None) -> jax.Array:
        """The base computation; `kernel` and `bias` replace the layer's own."""
        if kernel is None:
            assert self.kernel is not None, "a tied layer needs kernel="
            kernel = self.kernel.get_value()
        y = matmul(x, kernel, partial(sharding.gathered, axes=self.axes))
        if bias is None and self.bias is not None:
            bias = self.bias.get_value()
        return y if bias is None else y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)


class Conv1D(Linear):
    """A Linear whose kernel checkpoints store as [in, out]. The name is GPT-2's; it is not a convolution."""

    hf_leaves: ClassVar[HfLeaves] = {"kernel": ("weight", None), "bias": ("bias", None)}
