"""HRA: y = x H^T W + b, with H = H_1 ... H_r a product of reflections H_i = I - 2 u_i u_i^T, u_i trained, of length 1.

Yuan et al. 2024 (arXiv:2405.17484), section 3.1. H = I - U T U^T with T^-1 = I / 2 + the part of U^T U above its diagonal,
so it costs x two products of rank r. At the start u_1 = u_2, u_3 = u_4, ...: then H is the identity but for rounding. With
Gram-Schmidt the u_i are made orthogonal first, and H = I - 2 times the projection on what they span; equal u_i have no
orthogonal ones, so there the start is random (peft starts with pairs there too, made orthogonal from rounding errors).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, LayerMask, WeightAdapter
from peftjax.adapters.method import positive
from peftjax.adapters.sites import Site
from peftjax.adapters.targeted import Targeted
from peftjax.core.variables import PeftParam
from peftjax.quant.matmul import matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hra(Targeted):
    """Options of HRA, beside those of `Targeted`.

    rank: number of reflections; an odd one has a random start. gram_schmidt: orthogonal reflections.
    """

    rank: int = 8
    gram_schmidt: bool = False

    method: ClassVar[str] = "hra"
    peft_type: ClassVar[str] = "HRA"
    hf_fields: ClassVar = Targeted.hf_fields | {"rank": ("r", 8), "gram_schmidt": ("apply_GS", False)}
    hf_constants: ClassVar = {"bias": "none"}
    hf_training: ClassVar = {"init_weights": True}

    @property
    def neutral(self) -> bool:
        return not self.gram_schmidt

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(rank=self.rank)

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> "HraLinear":
        inputs = site.module.in_features
        if self.gram_schmidt and self.rank > inputs:
            raise ValueError(
                f"method.rank={self.rank}: {site.names[0]} has room for {inputs} orthogonal reflections; take fewer"
            )
        return HraLinear(site, self.rank, self.gram_schmidt, LayerMask(tuple(bool(layer) for layer in mask)), rngs)


class HraLinear(WeightAdapter):
    """(x - x U T^T U^T) W + b. u: [*stack, in, R], of any length."""

    names: ClassVar = {"hra_u": HfLeaf("u")}

    def __init__(self, site: Site, rank: int, gram_schmidt: bool, layers: LayerMask, rngs: nnx.Rngs) -> None:
        pairs = rank % 2 == 0 and not gram_schmidt
        shape = (*site.stack, site.module.in_features, rank // 2 if pairs else rank)
        bound = shape[-1] ** -0.5  # peft's Kaiming uniform with a = sqrt(5): it counts the columns as inputs
        u = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
        self.u = PeftParam(jnp.repeat(u, 2, axis=-1) if pairs else u, axes=site.lead(site.module.axes[0], "rank"))
        self.gram_schmidt, self.layers = gram_schmidt, layers

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        (x,) = inputs
        u, t = self._factors()
        return compute(x - matmul(matmul(x, u @ t.T), u.T), **parameters)

    def changed(self, kernel: jax.Array) -> jax.Array:
        u, t = self._factors()
        return kernel - u @ (t.T @ (u.T @ kernel))

    def _factors(self) -> tuple[jax.Array, jax.Array]:
        """U [in, R] with columns of length 1, and T [R, R], 0 in a layer that has none; float32."""
        u = self.u.get_value()
        u = u / jnp.sqrt(jnp.square(u).sum(axis=0, keepdims=True))
        gram = u.T @ u
        one = jnp.eye(len(gram))
        t = 2 * jnp.linalg.inv(gram) if self.gram_schmidt else jnp.linalg.inv(one / 2 + jnp.triu(gram, 1))
        return u, self.layers(t, jnp.zeros_like(t))
