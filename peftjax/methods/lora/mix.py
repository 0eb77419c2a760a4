"""Ways to combine LoRA adapters, layer by layer: a new A and B from the A_i, B_i, scales s_i and weights w_i.

These ways combine the A_i and the B_i separately. All ranks in a layer must be equal, and the result has the same rank:

linear            A = sum_i sign(w_i s_i) sqrt|w_i s_i| A_i,  B = sum_i sqrt|w_i s_i| B_i. Their product also contains the
                  A_i B_j of different adapters: it is a sum of updates only where the A_i or the B_i are equal.
magnitude_prune   linear of pruned tensors: in each, only the k = floor(density * size) largest |entries| are kept.
ties              pruned as before. Then a sign is elected for each entry: of sum_i A_i (majority_sign="total") or of
                  sum_i sign(A_i) ("frequency"), + where it is 0; then, with the weights of `linear`, the mean over the
                  adapters that have this sign: Yadav et al. 2023 (arXiv:2306.01708), section 3 and algorithm 1.
dare_linear       linear of randomly pruned tensors: M_i A_i / density, with M_i ~ Bernoulli(density) for each entry: Yu et
                  al. 2023 (arXiv:2311.03099), section 3, whose drop rate p is 1 - density.
dare_ties         ties, pruned randomly instead of by magnitude.

These ways combine the updates D_i = s_i A_i B_i, with any ranks:

cat               A = [w_1 s_1 A_1, w_2 s_2 A_2, ...], B = [B_1; B_2; ...]: exactly sum_i w_i D_i (task arithmetic, Ilharco
                  et al. 2022, arXiv:2212.04089); the rank is the sum of the ranks.
svd               the best approximation of that sum of rank `rank`: with its SVD U S V^T, A = U_r and B = S_r V_r^T. It is
                  computed from `cat` by two QR decompositions, without forming [in, out].
ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd
                  the SVD of the D_i combined with weights w_i as above. These form [in, out].

The papers prune and elect signs in updates of whole weights; treating A and B separately is peft's variant.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

APART = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
SPARSE_SVD = ("magnitude_prune_svd", "ties_svd", "dare_linear_svd", "dare_ties_svd")
WAYS = (*APART, "cat", "svd", *SPARSE_SVD)
SPARSE = (*APART[1:], *SPARSE_SVD)

# A mask of zeros and ones for a tensor: (Hugging Face name of the layer, adapter, "a", "b" or "kernel", shape) -> mask.
# The shapes are a: [in, r], b: [r, out], kernel: [in, out].
Draw = Callable[[str, str, str, tuple[int, ...]], ArrayLike]


@dataclasses.dataclass(frozen=True)
class WeightedAdapter:
    """One adapter in one layer: weight * scale * a b.

    Attributes:
        adapter: The adapter's name.
        weight: Its weight in the combination.
        scale: The scale s of its update.
        a: [in, rank] in float32.
        b: [rank, out] in float32.
    """

    adapter: str
    weight: float
    scale: float
    a: jax.Array
    b: jax.Array

    @property
    def rank(self) -> int:
        return self.b.shape[0]


def rank_of(how: str, parts: list[WeightedAdapter], largest: int) -> int:
    """The rank of the new adapter in a layer; the svd ways cap it at the rank of the matrix that they decompose."""
    if how in APART:
        return parts[0].rank
    total, sides = sum(part.rank for part in parts), (parts[0].a.shape[0], parts[0].b.shape[1])
    if how == "cat":
        return total
    return min(largest, *sides, total if how == "svd" else largest)


@dataclasses.dataclass(frozen=True)
class Mixer:
    """Combines the adapters of one layer; the fields are options of `combine`."""

    how: str
    density: float
    majority_sign: str
    draw: Draw

    def factors(self, layer: str, parts: list[WeightedAdapter], rank: int) -> tuple[jax.Array, jax.Array]:
        """The combined A [in, rank] and B [rank, out] of a layer."""
        if self.how in APART:
            strength = np.array([part.weight * part.scale for part in parts])
            roots = np.sqrt(np.abs(strength))
            signed = np.where(strength >= 0, roots, -roots)  # in A only: signs in both would cancel
            a = self._mix(layer, "a", [(part.adapter, part.a) for part in parts], signed)
            return a, self._mix(layer, "b", [(part.adapter, part.b) for part in parts], roots)
        if self.how in SPARSE_SVD:
            updates = [(part.adapter, part.scale * jnp.matmul(part.a, part.b)) for part in parts]
            mixed = self._mix(layer, "kernel", updates, np.array([part.weight for part in parts]))
            u, values, vt = jnp.linalg.svd(mixed, full_matrices=False)
            return u[:, :rank], values[:rank, None] * vt[:rank]
        a = jnp.concatenate([part.weight * part.scale * part.a for part in parts], axis=1)
        b = jnp.concatenate([part.b for part in parts], axis=0)
        return (a, b) if self.how == "cat" else _truncated(a, b, rank)

    def _mix(self, layer: str, leaf: str, given: list[tuple[str, jax.Array]], weights: np.ndarray) -> jax.Array:
        """Combine one tensor of each adapter."""
        sparse = [self._sparse(layer, adapter, leaf, tensor) for adapter, tensor in given]
        tensors = jnp.stack(sparse)  # [adapters, ...]
        weighted = tensors * jnp.asarray(weights, jnp.float32).reshape(-1, 1, 1)
        if "ties" not in self.how:
            return weighted.sum(0)
        elected = tensors if self.majority_sign == "total" else jnp.sign(tensors)
        sign = jnp.where(elected.sum(0, keepdims=True) >= 0, 1, -1)
        agree = jnp.sign(tensors) == sign  # 0 agrees with neither sign
        return (weighted * agree).sum(0) / jnp.maximum(agree.sum(0), 1)

    def _sparse(self, layer: str, adapter: str, leaf: str, tensor: jax.Array) -> jax.Array:
        if self.how == "linear":
            return tensor
        if self.how.startswith("dare"):
            mask = jnp.asarray(self.draw(layer, adapter, leaf, tensor.shape), tensor.dtype)
            return tensor * mask / self.density
        kept = jax.lax.top_k(jnp.abs(tensor).reshape(-1), int(self.density * tensor.size))[1]
        return tensor * jnp.zeros(tensor.size).at[kept].set(1).reshape(tensor.shape)


def _truncated(a: jax.Array, b: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """U_r and S_r V_r^T of the singular value decomposition U S V^T of a b, from two QR decompositions."""
    (q_a, r_a), (q_b, r_b) = jnp.linalg.qr(a), jnp.linalg.qr(b.T)
    u, values, vt = jnp.linalg.svd(jnp.matmul(r_a, r_b.T), full_matrices=False)
    return jnp.matmul(q_a, u[:, :rank]), values[:rank, None] * jnp.matmul(vt[:rank], q_b.T)


def bernoulli(density: float, seed: int) -> Draw:
    """Masks that are 1 with probability `density`, each drawn from its own key."""
    key, count = jax.random.key(seed), itertools.count()
    return lambda layer, adapter, leaf, shape: jax.random.bernoulli(
        jax.random.fold_in(key, next(count)), density, shape
    )
