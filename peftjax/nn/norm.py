"""Normalisation layers, with a slot."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.nn.slot import Slot


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, the mean in float32 (Zhang and Sennrich 2019, eq. 4).

    scale: [D]. The normalised x is cast back before the scale is applied, as Llama does.
    """

    hf_leaves: ClassVar = {"scale": ("weight", None)}

    def __init__(self, features: int, *, eps: float, axis: str = "embed", dtype: jnp.dtype) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((features,), dtype), axes=(axis,))
        self.adapters = Slot()

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.adapters(self, self.normalize, x)

    def normalize(self, x: jax.Array, scale: jax.Array | None = None) -> jax.Array:
        """The base computation; `scale` stands in for the layer's own."""
        scale = self.scale.get_value() if scale is None else scale
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * jnp.broadcast_to(scale.astype(x.dtype), x.shape)


class ZeroCenteredRMSNorm(RMSNorm):
    """x / sqrt(mean(x^2) + eps) * (1 + scale), all of it in float32: RMSNorm as Gemma has it, whose scale is 0 at first."""

    def __init__(self, features: int, *, eps: float, axis: str = "embed", dtype: jnp.dtype) -> None:
        super().__init__(features, eps=eps, axis=axis, dtype=dtype)
        self.scale.set_value(jnp.zeros((features,), dtype))

    def normalize(self, x: jax.Array, scale: jax.Array | None = None) -> jax.Array:
        scale = self.scale.get_value() if scale is None else scale
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (normed * jnp.broadcast_to(1 + scale.astype(jnp.float32), x.shape)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * scale + bias over the last axis, mean and variance in float32 (Ba et al. 2016,
    eq. 4). scale, bias: [D]."""

    hf_leaves: ClassVar = {"scale": ("weight", None), "bias": ("bias", None)}

    def __init__(self, features: int, *, eps: float, axis: str = "embed", dtype: jnp.dtype) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((features,), dtype), axes=(axis,))
        self.bias = nnx.Param(jnp.zeros((features,), dtype), axes=(axis,))
        self.adapters = Slot()

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.adapters(self, self.normalize, x)

    def normalize(self, x: jax.Array, scale: jax.Array | None = None, bias: jax.Array | None = None) -> jax.Array:
        """The base computation; `scale` and `bias` stand in for the layer's own."""
        scale = self.scale.get_value() if scale is None else scale
        bias = self.bias.get_value() if bias is None else bias
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        scaled = normed * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)
        return (scaled + jnp.broadcast_to(bias.astype(jnp.float32), x.shape)).astype(x.dtype)
