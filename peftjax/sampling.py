"""How the next token of a generated text is chosen."""

import dataclasses
import math
from numbers import Integral, Real

import jax
import jax.numpy as jnp

from peftjax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature, then top_k, then top_p, in the order of transformers.

    Attributes:
        temperature: Logits are divided by it before the softmax; 0 takes the most likely token (greedy decoding).
        top_k: Sample from the k most likely tokens; 0 means all tokens.
        top_p: Sample from the smallest set of most likely tokens whose probabilities add up to at least p (nucleus
            sampling, Holtzman et al. 2019, arXiv:1904.09751, section 3.1); 1 means all tokens.

    Raises:
        UserError: A value is not a number or is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for option, kind in (("temperature", Real), ("top_k", Integral), ("top_p", Real)):
            if not isinstance(value := getattr(self, option), kind):
                raise UserError(f"{option}={value!r} must be {'an integer' if kind is Integral else 'a number'}")
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"temperature={self.temperature} is out of range; use 0 (greedy) or a finite number above 0"
            )
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} is negative; use 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} is out of range; use more than 0 and at most 1")

    @property
    def kept(self) -> int:
        """How many of the most likely tokens are kept, a static argument of `draw`; 0: all."""
        return 0 if self.temperature == 0 else int(self.top_k)

    @property
    def traced(self) -> dict[str, float]:
        """The other options that have an effect, for `draw`. A program depends on their names, not on their values."""
        if self.temperature == 0:
            return {}
        options = {"temperature": float(self.temperature)}
        return options | ({"top_p": float(self.top_p)} if self.top_p < 1 else {})

    def draw(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """Sample token ids [B] from logits [B, V]."""
        return draw(logits, key, self.kept, **self.traced)


def draw(
    logits: jax.Array,
    key: jax.Array,
    top_k: int,
    *,
    temperature: jax.Array | float | None = None,
    top_p: jax.Array | float | None = None,
) -> jax.Array:
    """Sample token ids [B] from logits [B, V], with `Sampling.kept` and the options of `Sampling.traced`."""
    if temperature is None:
        return jnp.argmax(logits, axis=-1)
    logits = logits.astype(jnp.float32) / temperature
    if 0 < top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # the total probability of more likely tokens
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1)


GREEDY = Sampling()
