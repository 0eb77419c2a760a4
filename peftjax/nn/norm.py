"""Normalization layers."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.nn.layer import HfLeaves, SlottedLayer
from peftjax.nn.recompute import recomputed
from peftjax.nn.slot import Slot


def _normed(x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)


@recomputed
def l2_norm(x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32."""
    return _normed(x, eps).astype(x.dtype)


@recomputed
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) in float32, cast to the dtype of x, * scale."""
    return _normed(x, eps).astype(x.dtype) * jnp.broadcast_to(scale.astype(x.dtype), x.shape)


@recomputed
def float32_rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale in float32; the result in the dtype of x."""
    return (_normed(x, eps) * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)).astype(x.dtype)


@recomputed
def zero_centered_rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * (1 + scale) in float32; the result in the dtype of x."""
    return (_normed(x, eps) * jnp.broadcast_to(1 + scale.astype(jnp.float32), x.shape)).astype(x.dtype)


@recomputed
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """(x - mean(x)) / sqrt(var(x) + eps) * scale + bias over the last axis, in float32; the result in the dtype of x."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    scaled = normed * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)
    if bias is not None:
        scaled = scaled + jnp.broadcast_to(bias.astype(jnp.float32), x.shape)
    return scaled.astype(x.dtype)


class RMSNorm(SlottedLayer):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (Zhang and Sennrich 2019, eq. 4).

    Normalized in float32 and cast back to the dtype of x before the scale is applied, as in Llama.

    Attributes:
        scale: [D].
        formula: The function of x, scale and eps.
    """

    hf_leaves: ClassVar[HfLeaves] = {"scale": ("weight", None)}
    formula = staticmethod(rms_norm)

    def __init__(self, features: int, *, eps: float, axis: str = "embed", dtype: jnp.dtype) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((features,), dtype), axes=(axis,))
        self.adapters = Slot()

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.adapters(self, self.normalize, x)

    def normalize(self, x: jax.Array, scale: jax.Array | None = None) -> jax.Array:
        """The base computation; `scale` replaces the layer's own."""
        return self.formula(x, self.scale.get_value() if scale is None else scale, self.eps)


class Float32RMSNorm(RMSNorm):
    """x / sqrt(mean(x^2) + eps) * scale, all in float32, as in OLMo 2 and gpt-oss."""

    formula = staticmethod(float32_rms_norm)


class ZeroCenteredRMSNorm(RMSNorm):
    """x / sqrt(mean(x^2) + eps) * (1 + scale), all in float32: Gemma's RMSNorm, whose scale is initialized to 0."""

    formula = staticmethod(zero_centered_rms_norm)

    def __init__(self, features: int, *, eps: float, axis: str = "embed", dtype: jnp.dtype) -> None:
        super().__init__(features, eps=eps, axis=axis, dtype=dtype)
        self.scale.set_value(jnp.zeros((features,), dtype))


class LayerNorm(SlottedLayer):
    """(x - mean(x)) / sqrt(var(x) + eps) * scale + bias over the last axis, in float32 (Ba et al. 2016, eq. 4).

    Attributes:
        scale: [D].
        bias: [D], or None.
    """

    hf_leaves: ClassVar[HfLeaves] = {"scale": ("weight", None), "bias": ("bias", None)}

    def __init__(self, features: int, *, eps: float, use_bias: bool = True, dtype: jnp.dtype) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((features,), dtype), axes=("embed",))
        self.bias = nnx.data(nnx.Param(jnp.zeros((features,), dtype), axes=("embed",)) if use_bias else None)
        self.adapters = Slot()

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.adapters(self, self.normalize, x)

    def normalize(self, x: jax.Array, scale: jax.Array | None = None, bias: jax.Array | None = None) -> jax.Array:
        """The base computation; `scale` and `bias` replace the layer's own."""
        scale = self.scale.get_value() if scale is None else scale
        if bias is None and self.bias is not None:
            bias = self.bias.get_value()
        return layer_norm(x, scale, bias, self.eps)
