"""RandLoRA: y = x (W + s sum_n B_n L_n A G_n) + b, with B_n and A random and shared by all layers, L_n and G_n diagonal.

Albert et al. 2025 (arXiv:2502.00987); stated for in >= out, otherwise the sum is transposed. B_n [larger side, rank] and
A [rank, smaller side] are frozen, the diagonals are trained. There are N = ceil(smaller side / rank) terms, enough for
full rank; s = alpha / rank. At initialization L_n is zero and G_n is 1 / max(N, smaller side); A and B have a standard
deviation of 1. Layers smaller than the largest use the first rows and columns.

peft pairs the columns of B with the rows of A in another order, which its files follow: the sum is U V with N rank
columns in U and rows in V; column n * rank + k of U is column k of B_n, but row k * N + n of V is row k of L_n A G_n.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import FactoredAdapter, HfLeaf, LayerMask
from peftjax.adapters.options import positive
from peftjax.adapters.projected import Projected
from peftjax.adapters.selection import Chosen, chosen_names
from peftjax.adapters.sites import Site
from peftjax.adapters.torch_random import TorchGenerator
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.nn.dropout import Dropout


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandLora(Projected):
    """Options of RandLoRA.

    Attributes:
        rank (int, default 32): Rank of one term. A smaller rank means more terms and more trainable parameters.
        alpha (float, default 640.0): The update is multiplied by alpha / rank.
        sparse (bool, default False): Use projections with entries -1, 0 and 1, 1/6 of them of each sign.
        very_sparse (bool, default False): The same with 1/sqrt(smaller side) / 2 of each sign.
    """

    rank: int = 32
    alpha: float = 640.0
    sparse: bool = False
    very_sparse: bool = False

    method: ClassVar[str] = "randlora"
    peft_type: ClassVar[str] = "RANDLORA"
    hf_fields: ClassVar = Projected.hf_fields | {
        "rank": ("r", 32),
        "alpha": ("randlora_alpha", 640),
        "dropout": ("randlora_dropout", 0.0),
        "sparse": ("sparse", False),
        "very_sparse": ("very_sparse", False),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(alpha=self.alpha)

    def adapters(self, chosen: Chosen, rngs: nnx.Rngs) -> Iterator[tuple[Site, "RandLoraLinear"]]:
        del rngs
        smaller, larger, terms = self._sizes(chosen)
        keys = jax.random.split(jax.random.key(self.projection_prng_key))
        a = PeftConstant(self._base(keys[0], (self.rank, smaller), smaller), axes=("rank", None))
        b = PeftConstant(self._base(keys[1], (larger, terms, self.rank), smaller), axes=(None, None, "rank"))
        for site, mask in chosen:
            yield site, RandLoraLinear(site, mask, a, b, scale=self.alpha / self.rank, dropout=self.dropout)

    def _sizes(self, chosen: Chosen) -> tuple[int, int, int]:
        """The sides of the projections, the smaller one first, and the number of terms."""
        sides = (max(getattr(site.module, side) for site, _ in chosen) for side in ("in_features", "out_features"))
        smaller, larger = sorted(sides)
        return smaller, larger, -(-smaller // self.rank)

    def _base(self, key: jax.Array, shape: tuple[int, ...], smaller: int) -> jax.Array:
        """Random numbers with standard deviation 1, float32."""
        drawn = jax.random.uniform(key, shape, jnp.float32, -1, 1)
        if self.sparse or self.very_sparse:
            share = 1 / (smaller**0.5 if self.very_sparse else 3)  # of the entries that are not 0
            drawn = jnp.sign(drawn) * (jnp.abs(drawn) > 1 - share)
        return drawn / drawn.std(ddof=1)

    def peft_projections(self, chosen: Chosen) -> dict[str, np.ndarray]:
        """A and B. Unless they are sparse, peft draws them in bfloat16 if the device supports it."""
        (smaller, larger, terms), generator = self._sizes(chosen), TorchGenerator(self.projection_prng_key)
        if self.sparse or self.very_sparse:
            share = 1 / (2 * (smaller**0.5 if self.very_sparse else 3))  # of the entries of each sign
            shapes = (self.rank, 1, smaller), (larger, terms, self.rank)
            drawn = [generator.uniform(shape, 0.0, 1.0) for shape in shapes]
            a, b = ((one > np.float32(1 - share)).astype(np.float32) - (one < np.float32(share)) for one in drawn)
        else:
            a = generator.uniform((self.rank, 1, smaller), -(smaller**-0.5), smaller**-0.5, jnp.bfloat16)
            bound, shape = self.rank**-0.5, (larger, 1, self.rank)
            b = np.concatenate([generator.uniform(shape, -bound, bound, jnp.bfloat16) for _ in range(terms)], axis=1)
        a, b = (one / one.astype(np.float64).std(ddof=1).astype(one.dtype) for one in (a, b))
        whose = ("base_model", *(f"base_model.model.{name}" for name in chosen_names(chosen)))
        return {f"{prefix}.randlora_{key}": one for prefix in whose for key, one in (("A", a), ("B", b))}


class RandLoraLinear(FactoredAdapter):
    """x W + dropout(x) (U V) scale, or x W + dropout(x) (U V)^T scale if in <= out.

    Attributes:
        a: A of the largest layer, [R, smaller].
        b: The B_n of the largest layer, [larger, N', R].
        scale: s, float32 [].
        lambdas: L_n, [*stack, R, N]; it counts as 0 in a layer without the adapter.
        gammas: G_n, [*stack, N, smaller side].
    """

    zero_is_identity: ClassVar = True
    names: ClassVar = {"randlora_lambda": HfLeaf("lambdas"), "randlora_gamma": HfLeaf("gammas")}

    def __init__(
        self, site: Site, mask: np.ndarray, a: PeftConstant, b: PeftConstant, *, scale: float, dropout: float
    ) -> None:
        owner, stack = site.module, site.stack
        self.hf, self.layers = site.names, LayerMask(mask)
        self.smaller, self.larger = sorted((owner.in_features, owner.out_features))
        self.wide = owner.in_features <= owner.out_features
        self.scale = PeftConstant(jnp.float32(scale), axes=())
        self.a, self.b = a, b
        rank = a.shape[0]
        bases = -(-self.smaller // rank)
        ones = jnp.full((*stack, bases, self.smaller), 1 / max(bases, self.smaller), jnp.float32)
        self.lambdas = PeftParam(jnp.zeros((*stack, rank, bases), jnp.float32), axes=site.lead("rank", None))
        self.gammas = PeftParam(ones, axes=site.lead(None, owner.axes[0 if self.wide else 1]))
        self.dropout = Dropout(dropout, stack)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """U [in, N R] and s V [N R, out] of one layer, or s V^T and U^T if in <= out."""
        lambdas = self.layers.or_zero(self.lambdas.get_value() * self.scale.get_value())
        gammas, a = self.gammas.get_value(), self.a.get_value()[:, : self.smaller]
        rank, bases = lambdas.shape
        v = (lambdas[:, :, None] * a[:, None, :] * gammas[None, :, :]).reshape(rank * bases, self.smaller)
        u = self.b.get_value()[: self.larger, :bases].reshape(self.larger, bases * rank)
        return (v.T, u.T) if self.wide else (u, v)

    def hf_shared(self) -> dict[str, HfLeaf]:
        """peft stores the projections once and again with each layer, and requires all of them."""
        a, b = HfLeaf("a", shape=(self.a.shape[0], 1, self.a.shape[1])), HfLeaf("b")
        used = (name for name, chosen in zip(self.hf, self.layers.chosen, strict=True) if chosen)
        whose = ("base_model", *(f"base_model.model.{name}" for name in used))
        return {f"{prefix}.randlora_{key}": leaf for prefix in whose for key, leaf in (("A", a), ("B", b))}
