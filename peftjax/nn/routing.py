"""Routers of a mixture of experts: which experts a token goes to, and how evenly they are used.

Shazeer et al. 2017 (arXiv:1701.06538), section 2; Fedus et al. 2021 (arXiv:2101.03961), section 2.2, for the
load-balancing loss.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from peftjax.nn.linear import Linear


class Router(Linear):
    """A Linear that chooses and weights experts: [..., D] -> [..., E].

    The target "all-linear" leaves it out, and `quantize` does not quantize it.
    """


def route(
    logits: jax.Array, choices: int, *, sigmoid: bool = False, normalized: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Choose the experts with the largest scores, softmax(logits) or sigmoid(logits), computed in float32.

    Args:
        logits: [..., E].
        choices: Number of experts per token, K.
        sigmoid: Whether the scores are sigmoids.
        normalized: Whether to divide the chosen scores by their sum.

    Returns:
        Their scores, float32 [..., K], and their indices, int [..., K].
    """
    logits = logits.astype(jnp.float32)
    scores = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits, axis=-1)
    preferred = logits if sigmoid else scores  # large logits have equal sigmoids
    chosen = jax.lax.top_k(preferred, choices)[1]
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if normalized:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return weights, chosen


def expert_load(logits: jax.Array, choices: int, mask: jax.Array | None = None) -> jax.Array:
    """f_e, the mean number of choices of expert e per token, and P_e, its mean probability, over the tokens of one layer.

    Args:
        logits: The router's logits, [B, T, E].
        choices: Number of experts per token, K.
        mask: bool [B, T], the tokens that count; default: all.

    Returns:
        float32 [2, E]; zeros if no token counts.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jax.nn.one_hot(jax.lax.top_k(probabilities, choices)[1], logits.shape[-1]).sum(axis=-2)  # [B, T, E]
    counted = jnp.ones(logits.shape[:2]) if mask is None else mask.astype(jnp.float32)
    sums = jnp.stack([jnp.einsum("bte,bt->e", each, counted) for each in (chosen, probabilities)])
    return sums / jnp.maximum(counted.sum(), 1)


class Load(NamedTuple):
    """How much the experts of several layers are used.

    Attributes:
        counted: bool [B, T], the tokens that count.
        sums: float32 [2, E], the sum of the layers' `expert_load`.
    """

    counted: jax.Array
    sums: jax.Array

    def after(self, logits: jax.Array, choices: int) -> "Load":
        """Return the load with one more layer added; see `expert_load`."""
        return self._replace(sums=self.sums + expert_load(logits, choices, self.counted))


def balance(load: jax.Array) -> jax.Array:
    """E sum_e f_e P_e, with f_e and P_e the means over the layers: the mean `expert_load` [2, E] -> []."""
    return load.shape[-1] * jnp.sum(load[0] * load[1])


def load_balancing_loss(logits: jax.Array, choices: int, mask: jax.Array | None = None) -> jax.Array:
    """E sum_e f_e P_e, with f_e the mean number of choices of expert e per token, and P_e its mean probability.

    Eq. 4 to 6 of Fedus et al. 2021, over the tokens of all layers together, as in transformers.

    Args:
        logits: The router's logits, [L, B, T, E].
        choices: Number of experts per token, K.
        mask: bool [B, T], the tokens that count; default: all.

    Returns:
        float32 []; K if the load is balanced.
    """
    return balance(jax.vmap(lambda layer: expert_load(layer, choices, mask))(logits).mean(axis=0))
