"""The gated feed-forward layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.nn.linear import Linear


class GatedFeedForward(nnx.Module):
    """(act(x W_gate) * x W_up) W_down; with SiLU it is SwiGLU (Shazeer 2020, eq. 6). [B, T, D] -> [B, T, D]."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        activation: Callable[[jax.Array], jax.Array],
        use_bias: bool,
        stddev: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.activation = activation
        wide: dict[str, Any] = {
            "axes": ("embed", "mlp"),
            "use_bias": use_bias,
            "stddev": stddev,
            "dtype": dtype,
            "rngs": rngs,
        }
        self.gate = Linear(features, hidden, **wide)
        self.up = Linear(features, hidden, **wide)
        self.down = Linear(hidden, features, **{**wide, "axes": ("mlp", "embed")})

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(self.gate(x)) * self.up(x))
