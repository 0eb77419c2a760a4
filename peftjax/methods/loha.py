"""LoHa: y = x (W + s (A1 B1) * (A2 B2)) + b, with * element by element: the rank of the update is up to rank^2.

Hyeon-Woo et al. 2021 (FedPara, arXiv:2108.06098), proposition 1; as an update of a frozen kernel, with s = alpha / rank,
in LyCORIS (Yeh et al. 2023, arXiv:2309.14859, section 3). A2 is zero at the start. A row of the product of two matrices
of rank R is a row of one product of rank R^2: with (A1 . A2)[i, pq] = A1[i, p] A2[i, q] and B1 . B2 likewise,

    x ((A1 B1) * (A2 B2)) = (x (A1 . A2)) (B1 . B2),

which is computed where R^2 (in + out) is at most in * out.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import DeltaAdapter, HfLeaf, LayerMask, transposed
from peftjax.adapters.lycoris import Lycoris, UpdateDropout
from peftjax.adapters.sites import Site, check_rank
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.quant.matmul import matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHa(Lycoris):
    """Options of LoHa: those of `Lycoris`. What rank_dropout keeps is divided by its share of the outputs."""

    method: ClassVar[str] = "loha"
    peft_type: ClassVar[str] = "LOHA"

    def check(self, model: nnx.Module) -> None:
        for site, mask in self.chosen(model):
            check_rank(int(self.ranks_and_scales(site, mask)[0].max()), site)

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> "LoHaLinear":
        dropout = UpdateDropout(self.rank_dropout, self.module_dropout, rescale=True, stack=site.stack)
        return LoHaLinear(site, *self.ranks_and_scales(site, mask), dropout, rngs)


class LoHaLinear(DeltaAdapter):
    """x ((a1 b1) * (a2 b2) * scale). a1, a2: [*stack, in, R], b1, b2: [*stack, R, out], scale: [*stack].

    R is the largest rank in the stack; active: [*stack, R], 0 beyond a layer's own rank. Scale is 0 in a layer that is
    left out.
    """

    names: ClassVar = {
        "hada_w1_a": transposed("b1"),
        "hada_w1_b": transposed("a1"),
        "hada_w2_a": transposed("b2"),
        "hada_w2_b": transposed("a2"),
    }

    def __init__(
        self, site: Site, ranks: np.ndarray, scales: np.ndarray, dropout: UpdateDropout, rngs: nnx.Rngs
    ) -> None:
        self.ranks = tuple(int(rank) for rank in ranks)  # one for each layer, 0 where there is none
        self.layers = LayerMask(tuple(rank > 0 for rank in self.ranks))
        owner, rank, stack = site.module, max(self.ranks), site.stack
        active = jnp.asarray(np.arange(rank) < ranks[:, None], jnp.float32).reshape(*stack, rank)
        self.active = PeftConstant(active, axes=site.lead("rank"))
        self.scale = PeftConstant(jnp.asarray(scales, jnp.float32).reshape(stack), axes=site.lead())

        def uniform(*shape: int) -> jax.Array:
            return jax.random.uniform(rngs.params(), (*stack, *shape), jnp.float32, -1, 1)

        # peft's Kaiming uniform with a = sqrt(5): within 1/sqrt(the columns of the matrix in its orientation)
        bound = jnp.asarray(np.maximum(ranks, 1) ** -0.5, jnp.float32).reshape(*stack, 1, 1)
        a, b = active[..., None, :], active[..., :, None] * bound
        sides = site.lead(owner.axes[0], "rank"), site.lead("rank", owner.axes[1])
        self.a1 = PeftParam(uniform(owner.in_features, rank) * owner.in_features**-0.5 * a, axes=sides[0])
        self.b1 = PeftParam(uniform(rank, owner.out_features) * b, axes=sides[1])
        self.a2 = PeftParam(jnp.zeros((*stack, owner.in_features, rank), jnp.float32), axes=sides[0])
        self.b2 = PeftParam(uniform(rank, owner.out_features) * b, axes=sides[1])
        self.update_dropout = dropout

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        (x,) = inputs
        a1, b1, a2, b2 = self._factors()
        (inner, rank), outer = a1.shape, b1.shape[1]
        if rank * rank * (inner + outer) <= inner * outer:
            a = (a1[:, :, None] * a2[:, None, :]).reshape(inner, rank * rank)
            b = (b1[:, None, :] * b2[None, :, :]).reshape(rank * rank, outer)
            update = matmul(matmul(x, a), b)
        else:
            update = matmul(x, self.delta())
        return compute(x, **parameters) + self.update_dropout(update)

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        own = slice(self.ranks[layer or 0])
        windows = {"a": (slice(None), own), "b": (own, slice(None))}
        named = super().hf_leaves(layer).items()
        return {key: dataclasses.replace(leaf, window=windows[leaf.leaf[0]]) for key, leaf in named}

    def delta(self) -> jax.Array:
        """s (A1 B1) * (A2 B2)."""
        a1, b1, a2, b2 = self._factors()
        return (a1 @ b1) * (a2 @ b2)

    def _factors(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """A1 with the scale in it, B1, A2, B2, without what is beyond the layer's own rank."""
        active = self.active.get_value()[None]
        a1 = self.a1.get_value() * active * self.scale.get_value()
        return a1, self.b1.get_value(), self.a2.get_value() * active, self.b2.get_value()
