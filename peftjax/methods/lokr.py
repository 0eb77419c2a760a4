"""LoKr: y = x (W + s (C kron D)) + b, a Kronecker product of a small matrix C and a larger one D = A B or full.

Edalati et al. 2022 (KronA, arXiv:2212.10650) and, with the low rank of D, LyCORIS (Yeh et al. 2023, arXiv:2309.14859,
section 3). With in = m n and out = p q, C is [m, p] and D [n, q]: W[i n + i', o q + o'] gets s C[i, o] D[i', o']. So
with x as a matrix [m, n], x (C kron D) is C^T x D as a vector: no matrix [in, out] is made.

As in peft: m and p are `decompose_factor` where it divides in and out, else their largest divisors below the square
root (and at most decompose_factor, if that is not -1). D is full where rank >= max(n, q) / 2; C is full but where
`decompose_both` says otherwise and rank < max(m, p) / 2. s = alpha / rank in each case, where LyCORIS has 1 if both are
full. C, or its second factor, is zero at the start.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import DeltaAdapter, HfLeaf, LayerMask, transposed
from peftjax.adapters.lycoris import Lycoris, UpdateDropout
from peftjax.adapters.sites import Site
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.quant.matmul import matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKr(Lycoris):
    """Options of LoKr, beside those of `Lycoris`.

    decompose_both: a low rank for C too. decompose_factor: see above. rank_dropout_scale: divide what rank_dropout
    keeps by its share of the outputs.
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False

    method: ClassVar[str] = "lokr"
    peft_type: ClassVar[str] = "LOKR"
    hf_fields: ClassVar = Lycoris.hf_fields | {
        "decompose_both": ("decompose_both", False),
        "decompose_factor": ("decompose_factor", -1),
        "rank_dropout_scale": ("rank_dropout_scale", False),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        factor = self.decompose_factor
        if not isinstance(factor, int) or (factor != -1 and factor < 1):
            raise ValueError(f"method.decompose_factor must be -1 or a whole number of at least 1, it is {factor!r}")

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> "LoKrLinear":
        ranks, scales = self.ranks_and_scales(site, mask)
        (m, n), (p, q) = (
            factors(side, self.decompose_factor) for side in (site.module.in_features, site.module.out_features)
        )
        full = {(not self.decompose_both or rank >= max(m, p) / 2, rank >= max(n, q) / 2) for rank in ranks[mask]}
        if len(full) > 1:
            raise ValueError(
                f"method.rank_pattern: ranks {sorted({int(rank) for rank in ranks[mask]})} for the layers of "
                f"{site.names[0].rsplit('.', 1)[-1]} make some of its factors full and others not; choose ranks on one "
                f"side of {max(n, q) / 2:g}" + (f" and of {max(m, p) / 2:g}" if self.decompose_both else "")
            )
        dropout = UpdateDropout(
            self.rank_dropout, self.module_dropout, rescale=self.rank_dropout_scale, stack=site.stack
        )
        return LoKrLinear(site, ranks, scales, (m, p), (n, q), *full.pop(), dropout, rngs)


def factors(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `size`, chosen as said above."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = max(number for number in range(1, limit + 1) if size % number == 0)
    return first, size // first


class LoKrLinear(DeltaAdapter):
    """x (C kron D) scale. c: [*stack, m, p], or c_a: [*stack, m, R] and c_b: [*stack, R, p]; d: [*stack, n, q] likewise.

    scale: [*stack], 0 in a layer that is left out. R is the largest rank in the stack; active: [*stack, R], 0 beyond a
    layer's own rank, or None where C and D are full.
    """

    def __init__(
        self, site: Site, ranks: np.ndarray, scales: np.ndarray, c: tuple[int, int], d: tuple[int, int], full_c: bool,
        full_d: bool, dropout: UpdateDropout, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.ranks = tuple(int(rank) for rank in ranks)  # one for each layer, 0 where there is none
        self.layers = LayerMask(tuple(rank > 0 for rank in self.ranks))
        self.full_c, self.full_d, self.update_dropout = full_c, full_d, dropout
        stack, rank = site.stack, max(self.ranks)
        self.scale = PeftConstant(jnp.asarray(scales, jnp.float32).reshape(stack), axes=site.lead())
        active = jnp.asarray(np.arange(rank) < ranks[:, None], jnp.float32).reshape(*stack, rank)
        self.active: Any = nnx.data(None if full_c and full_d else PeftConstant(active, axes=site.lead("rank")))

        # peft's Kaiming uniform with a = sqrt(5): within 1/sqrt(the columns of the matrix in its orientation)
        def uniform(rows: int, columns: int, bound: Any) -> jax.Array:
            return jax.random.uniform(rngs.params(), (*stack, rows, columns), jnp.float32, -1, 1) * bound

        def matrix(value: jax.Array, *axes: str | None) -> PeftParam:
            return PeftParam(value, axes=site.lead(*axes))

        a, b = active[..., None, :], active[..., :, None]
        if full_c:
            self.c = matrix(jnp.zeros((*stack, *c), jnp.float32), None, None)
        else:
            self.c_a = matrix(uniform(c[0], rank, c[0] ** -0.5) * a, None, "rank")
            self.c_b = matrix(jnp.zeros((*stack, rank, c[1]), jnp.float32), "rank", None)
        if full_d:
            self.d = matrix(uniform(*d, d[0] ** -0.5), None, None)
        else:
            bound = jnp.asarray(np.maximum(ranks, 1) ** -0.5, jnp.float32).reshape(*stack, 1, 1)
            self.d_a = matrix(uniform(d[0], rank, d[0] ** -0.5) * a, None, "rank")
            self.d_b = matrix(uniform(rank, d[1], bound) * b, "rank", None)

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        (x,) = inputs
        c, d = self._factors()
        (m, p), (n, q) = c.shape, d.shape
        update = matmul(x.reshape(*x.shape[:-1], m, n), d)  # [..., m, q]
        update = matmul(update.swapaxes(-1, -2), c).swapaxes(-1, -2)  # [..., p, q]
        return compute(x, **parameters) + self.update_dropout(update.reshape(*x.shape[:-1], p * q))

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        if not self.layers.chosen[layer or 0]:
            return {}
        own = slice(self.ranks[layer or 0])
        leaves = {}
        for suffix, leaf, full in (("lokr_w1", "c", self.full_c), ("lokr_w2", "d", self.full_d)):
            if full:
                leaves[suffix] = transposed(leaf)
            else:
                leaves[f"{suffix}_a"] = HfLeaf(f"{leaf}_b", (own, slice(None)), (1, 0))
                leaves[f"{suffix}_b"] = HfLeaf(f"{leaf}_a", (slice(None), own), (1, 0))
        return leaves

    def delta(self) -> jax.Array:
        """s (C kron D)."""
        return jnp.kron(*self._factors())

    def _factors(self) -> tuple[jax.Array, jax.Array]:
        """C with the scale in it, [m, p], and D, [n, q]."""
        c = self.c.get_value() if self.full_c else self._product(self.c_a, self.c_b)
        d = self.d.get_value() if self.full_d else self._product(self.d_a, self.d_b)
        return c * self.scale.get_value(), d

    def _product(self, a: PeftParam, b: PeftParam) -> jax.Array:
        return (a.get_value() * self.active.get_value()[None]) @ b.get_value()
