"""Convolution over the positions of a sequence."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.nn.layer import HfLeaves, SlottedLayer
from peftjax.nn.slot import Slot


class Convolution(SlottedLayer):
    """y_t = sum_s x_{t + s - (S - 1) / 2} W_s + b, with zeros beyond the sequence: [B, T, D] -> [B, T, D].

    It is not a `Linear`: "all-linear" does not include it, as in Hugging Face PEFT.

    Attributes:
        kernel: [S, D / groups, D]; checkpoints store it as [D, D / groups, S].
        bias: [D].

    Args:
        features: Width of input and output, D.
        size: Kernel size, S; odd.
        groups: Number of feature groups, as in a grouped convolution.
        stddev: Standard deviation of the random kernel.
        dtype: Dtype of the parameters.
        rngs: Source of random weights.
    """

    hf_leaves: ClassVar[HfLeaves] = {"kernel": ("weight", (2, 1, 0)), "bias": ("bias", None)}

    def __init__(
        self, features: int, size: int, groups: int, *, stddev: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.groups = groups
        value = stddev * jax.random.normal(rngs.params(), (size, features // groups, features), jnp.float32)
        self.kernel = nnx.Param(value.astype(dtype), axes=(None, None, "embed"))
        self.bias = nnx.Param(jnp.zeros((features,), dtype), axes=("embed",))
        self.adapters = Slot()

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.adapters(self, self.convolve, x)

    def convolve(self, x: jax.Array, kernel: jax.Array | None = None, bias: jax.Array | None = None) -> jax.Array:
        """The base computation; `kernel` and `bias` replace the layer's own."""
        kernel = self.kernel.get_value() if kernel is None else kernel
        bias = self.bias.get_value() if bias is None else bias
        y = jax.lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=self.groups,
        )
        return y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
