"""HRA: y = x H^T W + b, with H = H_1 ... H_r a product of reflections H_i = I - 2 u_i u_i^T, u_i trained, of length 1.

Yuan et al. 2024 (arXiv:2405.17484), section 3.1. H = I - U T U^T, where T^-1 = I / 2 + the strict upper triangle of U^T U,
so applying it to x takes two products of rank r. At initialization u_1 = u_2, u_3 = u_4, ..., so that H is the identity
up to rounding. With Gram-Schmidt the u_i are first made orthogonal, and H = I - 2 times the projection on their span.
Equal u_i cannot be made orthogonal, so the initial u_i are then random (peft starts with pairs there too, which it
orthogonalizes from rounding errors).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, LayerMask, WeightAdapter
from peftjax.adapters.biases import WithBiases
from peftjax.adapters.options import positive_integer
from peftjax.adapters.sites import Site
from peftjax.core.errors import UserError
from peftjax.core.variables import PeftParam
from peftjax.nn.slot import Base
from peftjax.quant.matmul import matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hra(WithBiases):
    """Options of HRA.

    Attributes:
        rank (int, default 8): Number of reflections. With an odd number the initial H is not the identity.
        gram_schmidt (bool, default False): Make the reflections orthogonal.
    """

    rank: int = 8
    gram_schmidt: bool = False

    method: ClassVar[str] = "hra"
    peft_type: ClassVar[str] = "HRA"
    hf_fields: ClassVar = WithBiases.hf_fields | {"rank": ("r", 8), "gram_schmidt": ("apply_GS", False)}
    hf_training: ClassVar = {"init_weights": True}
    traced_options: ClassVar = WithBiases.traced_options | {"rank"}

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_integer(rank=self.rank)

    @property
    def neutral(self) -> bool:
        return self.rank % 2 == 0 and not self.gram_schmidt

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> "HraLinear":
        inputs = site.module.in_features
        if self.gram_schmidt and self.rank > inputs:
            raise UserError(
                f"method.rank={self.rank}: {site.names[0]} has {inputs} inputs, so at most {inputs} reflections can be orthogonal; "
                "use a lower rank"
            )
        return HraLinear(site, mask, self, rngs)


class HraLinear(WeightAdapter):
    """(x - x U T^T U^T) W + b.

    Attributes:
        u: Vectors of any length along the reflections, [*stack, in, R].
    """

    zero_is_identity: ClassVar = True
    names: ClassVar = {"hra_u": HfLeaf("u")}

    def __init__(self, site: Site, mask: np.ndarray, method: Hra, rngs: nnx.Rngs) -> None:
        equal = 2 if method.neutral else 1  # successive columns that start equal
        shape = (*site.stack, site.module.in_features, method.rank // equal)
        bound = shape[-1] ** -0.5  # peft's Kaiming uniform with a = sqrt(5), which takes the columns for inputs
        u = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
        self.u = PeftParam(jnp.repeat(u, equal, axis=-1), axes=site.lead(site.module.axes[0], "rank"))
        self.gram_schmidt, self.layers = method.gram_schmidt, LayerMask(mask)

    def apply(self, base: Base, x: jax.Array) -> jax.Array:
        u, t = self.reflections()
        return base(x - matmul(matmul(x, u @ t.T), u.T))

    def changed(self, kernel: jax.Array) -> jax.Array:
        u, t = self.reflections()
        return kernel - u @ (t.T @ (u.T @ kernel))

    def reflections(self) -> tuple[jax.Array, jax.Array]:
        """U [in, R] with columns of length 1, and T [R, R], both float32. T is 0 in a layer without the adapter.

        Columns of zeros, such as padding, stay zero. They change neither H nor the gradients of the other columns.
        """
        u = self.u.get_value()
        squares = jnp.square(u).sum(axis=0, keepdims=True)
        u = u / jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
        gram = u.T @ u
        one = jnp.eye(len(gram))
        padding = one * (squares == 0)
        t = 2 * jnp.linalg.inv(gram + padding) if self.gram_schmidt else jnp.linalg.inv(one / 2 + jnp.triu(gram, 1))
        return u, self.layers.or_zero(t)
