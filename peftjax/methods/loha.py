"""LoHa: y = x (W + s (A1 B1) * (A2 B2)) + b, with * the elementwise product: an update of rank up to rank^2.

Hyeon-Woo et al. 2021 (FedPara, arXiv:2108.06098), proposition 1; as an update of a frozen kernel, with s = alpha / rank,
in LyCORIS (Yeh et al. 2023, arXiv:2309.14859, section 3). A2 is zero at initialization. The elementwise product of two
products of rank R is one product of rank R^2: with (A1 . A2)[i, pq] = A1[i, p] A2[i, q] and B1 . B2 likewise,

    x ((A1 B1) * (A2 B2)) = (x (A1 . A2)) (B1 . B2),

which is used if R^2 (in + out) <= in * out.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import transposed
from peftjax.adapters.lycoris import Lycoris, inverse_root, kaiming
from peftjax.adapters.ranks import RankedAdapter, within
from peftjax.adapters.sites import Site
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.quant.matmul import matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHa(Lycoris):
    """Options of LoHa. The outputs that rank_dropout keeps are divided by their share."""

    method: ClassVar[str] = "loha"
    peft_type: ClassVar[str] = "LOHA"

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> "LoHaLinear":
        return LoHaLinear(self, site, self.ranks(site, mask), rngs)


class LoHaLinear(RankedAdapter):
    """x W + x ((a1 b1) * (a2 b2) * scale).

    R is the largest rank of the stack.

    Attributes:
        a1, a2: [*stack, in, R].
        b1, b2: [*stack, R, out].
        scale: alpha / rank, [*stack]; 0 in a layer without the adapter.
        active: 1 within the rank of each layer and 0 beyond, [*stack, R].
    """

    names: ClassVar = {
        "hada_w1_a": transposed("b1"),
        "hada_w1_b": transposed("a1"),
        "hada_w2_a": transposed("b2"),
        "hada_w2_b": transposed("a2"),
    }

    def __init__(self, method: LoHa, site: Site, ranks: np.ndarray, rngs: nnx.Rngs) -> None:
        self.set_ranks(ranks)
        active, rank = within(ranks, site.stack), int(ranks.max())
        self.active = PeftConstant(jnp.asarray(active), axes=site.lead("rank"))
        self.scale = PeftConstant(method.scales(site, ranks), axes=site.lead())
        inputs, outputs = site.module.in_features, site.module.out_features
        first, second = site.lead(site.module.axes[0], "rank"), site.lead("rank", site.module.axes[1])
        a, b, bound = active[..., None, :], active[..., :, None], inverse_root(ranks, site.stack)
        self.a1 = PeftParam(kaiming(site, inputs, rank, inputs**-0.5, rngs) * a, axes=first)
        self.b1 = PeftParam(kaiming(site, rank, outputs, bound, rngs) * b, axes=second)
        self.a2 = PeftParam(jnp.zeros((*site.stack, inputs, rank), jnp.float32), axes=first)
        self.b2 = PeftParam(kaiming(site, rank, outputs, bound, rngs) * b, axes=second)
        self.update_dropout = method.update_dropout(site, rescale=True)

    def delta(self) -> jax.Array:
        """s (A1 B1) * (A2 B2)."""
        a1, b1, a2, b2 = self.factors()
        return (a1 @ b1) * (a2 @ b2)

    def update(self, x: jax.Array) -> jax.Array:
        a1, b1, a2, b2 = self.factors()
        (inner, rank), outer = a1.shape, b1.shape[1]
        if rank * rank * (inner + outer) > inner * outer:
            return self.update_dropout(matmul(x, self.delta()))
        a = (a1[:, :, None] * a2[:, None, :]).reshape(inner, rank * rank)
        b = (b1[:, None, :] * b2[None, :, :]).reshape(rank * rank, outer)
        return self.update_dropout(matmul(matmul(x, a), b))

    def factors(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """s A1, B1, A2, B2 of one layer, without the padding beyond its rank."""
        active = self.active.get_value()[None]
        a1 = self.a1.get_value() * active * self.scale.get_value()
        return a1, self.b1.get_value(), self.a2.get_value() * active, self.b2.get_value()
