"""Feed-forward layers, plain and gated, and their activations."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.nn.dropout import Dropout
from peftjax.nn.linear import Linear
from peftjax.nn.recompute import recomputed


# Functions of this module, not of jax.nn: those are compiled objects, which cannot be pickled with a model.
def silu(x: jax.Array) -> jax.Array:
    """x sigmoid(x)."""
    return jax.nn.silu(x)


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), with the cumulative distribution function Phi of the standard normal distribution."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """An approximation of `gelu` with tanh."""
    return jax.nn.gelu(x, approximate=True)


def relu(x: jax.Array) -> jax.Array:
    """max(x, 0)."""
    return jax.nn.relu(x)


def tanh(x: jax.Array) -> jax.Array:
    """The hyperbolic tangent."""
    return jnp.tanh(x)


# By their names in config.json.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": silu,
    "swish": silu,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": relu,
    "tanh": tanh,
}


def gated(activation: Callable[[jax.Array], jax.Array], gate: jax.Array, up: jax.Array) -> jax.Array:
    """act(gate) * up, computed in float32 and rounded once to their dtype. The backward pass recomputes it."""

    @recomputed
    def product(gate: jax.Array, up: jax.Array) -> jax.Array:
        wide = activation(gate.astype(jnp.float32)) * up.astype(jnp.float32)
        return wide.astype(gate.dtype)

    return product(gate, up)


class FeedForward(nnx.Module):
    """act(x W_up + b_up) W_down + b_down (Vaswani et al. 2017, section 3.3): [B, T, D] -> [B, T, D].

    Args:
        features: Width of input and output, D.
        hidden: Hidden width, F.
        activation: One of `ACTIVATIONS`.
        use_bias: Whether the layers have biases.
        linear: Class of the layers.
        stddev: Standard deviation of random kernels.
        dropout: Dropout rate of the hidden activations.
        dtype: Dtype of the parameters.
        rngs: Source of random weights.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        activation: Callable[[jax.Array], jax.Array],
        use_bias: bool = False,
        linear: type[Linear] = Linear,
        stddev: float,
        dropout: float = 0.0,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.activation, self.dropout = activation, Dropout(dropout)
        make = partial(linear, use_bias=use_bias, stddev=stddev, dtype=dtype, rngs=rngs)
        self.make_inputs(features, hidden, partial(make, axes=("embed", "mlp")))
        self.down = make(hidden, features, axes=("mlp", "embed"))

    def make_inputs(self, features: int, hidden: int, make: Callable[[int, int], Linear]) -> None:
        """Build the layers that read the input, with a function of their input and output widths."""
        self.up = make(features, hidden)

    def hidden(self, x: jax.Array) -> jax.Array:
        """Return the hidden activations: [B, T, D] -> [B, T, F]."""
        return recomputed(self.activation)(self.up(x))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.dropout(self.hidden(x)))


class GatedFeedForward(FeedForward):
    """(act(x W_gate) * x W_up) W_down: [B, T, D] -> [B, T, D]. With SiLU it is SwiGLU (Shazeer 2020, eq. 6)."""

    def make_inputs(self, features: int, hidden: int, make: Callable[[int, int], Linear]) -> None:
        self.gate, self.up = make(features, hidden), make(features, hidden)

    def hidden(self, x: jax.Array) -> jax.Array:
        return gated(self.activation, self.gate(x), self.up(x))


class FusedGatedFeedForward(FeedForward):
    """A gated layer with one kernel for gate and up, [g; u] = x W_gate_up: (act(g) * u) W_down. [B, T, D] -> [B, T, D]."""

    def make_inputs(self, features: int, hidden: int, make: Callable[[int, int], Linear]) -> None:
        self.gate_up = make(features, 2 * hidden)

    def hidden(self, x: jax.Array) -> jax.Array:
        return gated(self.activation, *jnp.split(self.gate_up(x), 2, axis=-1))
