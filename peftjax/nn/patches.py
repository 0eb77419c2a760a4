"""The embedding of image patches."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.nn.layer import HfLeaves, SlottedLayer
from peftjax.nn.slot import Slot
from peftjax.quant.matmul import matmul


class PatchEmbedding(SlottedLayer):
    """x W + b of each patch, in row-major order: [B, H, W, C] -> [B, N, D] in the dtype of x.

    The kernel is [P, P, C, D]; checkpoints store a convolution's, [D, C, P, P]. It is not a `Linear`: "all-linear"
    does not include it, as in Hugging Face PEFT, where it is a convolution.

    Attributes:
        in_features: Values in a patch, P * P * C.
        out_features: D.
        axes: Logical axes of the kernel as a matrix [P * P * C, D].

    Args:
        patch: Height and width of a patch, P each.
        channels: C.
        features: D.
        stddev: Standard deviation of the random kernel.
        dtype: Dtype of the parameters.
        rngs: Source of random weights.
    """

    hf_leaves: ClassVar[HfLeaves] = {"kernel": ("weight", (3, 2, 0, 1)), "bias": ("bias", None)}
    axes: ClassVar[tuple[str | None, str]] = (None, "embed")

    def __init__(
        self, patch: tuple[int, int], channels: int, features: int, *, stddev: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.in_features, self.out_features = patch[0] * patch[1] * channels, features
        value = stddev * jax.random.normal(rngs.params(), (*patch, channels, features), jnp.float32)
        self.kernel = nnx.Param(value.astype(dtype), axes=(None, None, None, "embed"))
        self.bias = nnx.Param(jnp.zeros((features,), dtype), axes=("embed",))
        self.adapters = Slot()

    def __call__(self, pixels: jax.Array) -> jax.Array:
        return self.adapters(self, self.project, pixels)

    def project(self, pixels: jax.Array, kernel: jax.Array | None = None, bias: jax.Array | None = None) -> jax.Array:
        """The base computation; `kernel` and `bias` replace the layer's own."""
        kernel = self.kernel.get_value() if kernel is None else kernel
        bias = self.bias.get_value() if bias is None else bias
        y = matmul(to_patches(pixels, kernel.shape[:2]), kernel.reshape(-1, kernel.shape[-1]))
        return y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)


def to_patches(pixels: jax.Array, patch: tuple[int, ...]) -> jax.Array:
    """The values of each patch of height and width `patch`: [B, H, W, C] -> [B, N, P * P * C]."""
    tall, wide = patch
    batch, height, width, channels = pixels.shape
    grid = pixels.reshape(batch, height // tall, tall, width // wide, wide, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, tall * wide * channels)
