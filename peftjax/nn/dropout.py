"""Dropout whose random bits come from a key in the model's state."""

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.core.variables import DropoutKey


class Dropout(nnx.Module):
    """x with each element zeroed with probability `rate` and the rest divided by 1 - rate; x itself in evaluation.

    The key sits in the state, one for each layer of a stack, so a scan slices it and rematerialisation draws the same
    bits again; a training step replaces it (`variables.with_dropout_keys`). `model.train()` and `model.eval()` switch.
    """

    def __init__(self, rate: float, stack: tuple[int, ...] = ()) -> None:
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, it is {rate}")
        self.rate = rate
        self.deterministic = True
        axes = ("layers", None) if stack else (None,)
        self.key = nnx.data(DropoutKey(jnp.zeros((*stack, 2), jnp.uint32), axes=axes) if rate > 0 else None)

    @property
    def idle(self) -> bool:
        """Whether it changes nothing."""
        return self.deterministic or self.key is None

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.deterministic or self.key is None:
            return x
        keep = jax.random.bernoulli(jax.random.wrap_key_data(self.key.get_value()), 1 - self.rate, x.shape)
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros_like(x))
