"""VeRA: y = x W + b + ((x A) * d) B * l, with A and B random, frozen and shared by all layers; d and l are trained.

Kopiczko et al. 2023 (arXiv:2310.11454), section 3.1, eq. 2, where d and l are the diagonals of Lambda_d and Lambda_b. At
initialization l is zero and d is `d_initial`. A fits the largest input and B the largest output; smaller layers use
their first rows and columns, as in peft.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import DeltaAdapter, HfLeaf, LayerMask, transposed
from peftjax.adapters.diagonal import times
from peftjax.adapters.options import positive
from peftjax.adapters.projected import Projected
from peftjax.adapters.sites import Chosen, Site
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.nn.dropout import Dropout
from peftjax.quant.matmul import matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vera(Projected):
    """Options of VeRA.

    Attributes:
        rank (int, default 256): Rank of A and B.
        d_initial (float, default 0.1): Initial value of d.
    """

    rank: int = 256
    d_initial: float = 0.1

    method: ClassVar[str] = "vera"
    peft_type: ClassVar[str] = "VERA"
    traced_options: ClassVar = Projected.traced_options | {"rank", "d_initial", "projection_prng_key"}
    hf_fields: ClassVar = Projected.hf_fields | {
        "rank": ("r", 256),
        "d_initial": ("d_initial", 0.1),
        "dropout": ("vera_dropout", 0.0),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(d_initial=self.d_initial)

    def adapters(self, chosen: Chosen, rngs: nnx.Rngs) -> Iterator[tuple[Site, "VeraLinear"]]:
        del rngs
        largest_in = max(site.module.in_features for site, _ in chosen)
        largest_out = max(site.module.out_features for site, _ in chosen)
        keys = jax.random.split(jax.random.key(self.projection_prng_key))
        a = PeftConstant(_kaiming(keys[0], (largest_in, self.rank)), axes=(None, "rank"))
        b = PeftConstant(_kaiming(keys[1], (self.rank, largest_out)), axes=("rank", None))
        for site, mask in chosen:
            yield site, VeraLinear(site, mask, a, b, d_initial=self.d_initial, dropout=self.dropout)


def _kaiming(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Uniform with variance 2 / (the number of rows), float32."""
    bound = (6 / shape[0]) ** 0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


class VeraLinear(DeltaAdapter):
    """x W + ((dropout(x) A * lambda_d) B) * lambda_b.

    Attributes:
        a: [largest in, R].
        b: [R, largest out].
        lambda_d: d, [*stack, R].
        lambda_b: l, [*stack, out]; it stands for 0 in a layer without the adapter.
    """

    names: ClassVar = {"vera_lambda_d": HfLeaf("lambda_d"), "vera_lambda_b": HfLeaf("lambda_b")}

    def __init__(
        self, site: Site, mask: np.ndarray, a: PeftConstant, b: PeftConstant, *, d_initial: float, dropout: float
    ) -> None:
        stack, self.inputs, self.outputs = site.stack, site.module.in_features, site.module.out_features
        self.layers = LayerMask(mask)
        self.a, self.b = a, b
        self.lambda_d = PeftParam(jnp.full((*stack, a.shape[1]), d_initial, jnp.float32), axes=site.lead("rank"))
        self.lambda_b = PeftParam(jnp.zeros((*stack, self.outputs), jnp.float32), axes=site.lead(site.module.axes[1]))
        self.dropout = Dropout(dropout, stack)

    def delta(self) -> jax.Array:
        """A diag(d) B diag(l)."""
        a, lambda_d, b, lambda_b = self.factors()
        return times(times(a, lambda_d) @ b, lambda_b)

    def update(self, x: jax.Array) -> jax.Array:
        a, lambda_d, b, lambda_b = self.factors()
        low = times(matmul(self.dropout(x), a), lambda_d)  # [..., R]
        return times(matmul(low, b), lambda_b)

    def factors(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """A [in, R], d [R], B [R, out] and l [out] of one layer."""
        a, b = self.a.get_value()[: self.inputs], self.b.get_value()[:, : self.outputs]
        return a, self.lambda_d.get_value(), b, self.layers.or_zero(self.lambda_b.get_value())

    def hf_shared(self) -> dict[str, HfLeaf]:
        return {"base_model.vera_A": transposed("a"), "base_model.vera_B": transposed("b")}
