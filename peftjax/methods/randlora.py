"""RandLoRA: y = x (W + s sum_n B_n L_n A G_n) + b, with B_n and A random and shared by all layers, L_n and G_n diagonal.

Albert et al. 2025 (arXiv:2502.00987); here for in >= out, else the sum is transposed. B_n [larger side, rank] and A
[rank, smaller side] are frozen, the diagonals are trained; n < N = ceil(smaller side / rank), which is enough for a full
rank; s = alpha / rank. L_n is zero at the start and G_n is 1 over the larger of N and the smaller side; A and B have a
standard deviation of 1. Layers smaller than the largest take the first rows and columns.

peft pairs the columns of B with the rows of A in another order, and its files mean that one: the sum is U V with N rank
columns in U and rows in V; column n * rank + k of U is that of B_n, but row k * N + n of V is that of L_n A G_n.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import DeltaAdapter, HfLeaf, LayerMask
from peftjax.adapters.method import positive
from peftjax.adapters.sites import Site, place
from peftjax.adapters.targeted import Targeted, train_whole
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.methods.vera import check_projected, require_projections
from peftjax.nn.dropout import Dropout
from peftjax.quant.matmul import matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandLora(Targeted):
    """Options of RandLoRA, beside those of `Targeted`.

    rank: of one base; a smaller one means more of them and more to train. alpha: the update is scaled by alpha / rank.
    dropout: on the adapter's input, in training.
    projection_prng_key: the seed of A and B. They are always in the file, for from this seed torch would draw others.
    sparse: bases of -1, 0 and 1, with 1/6 of each sign; very_sparse: with 1/sqrt(smaller side) / 2 of each.
    """

    rank: int = 32
    alpha: float = 640.0
    dropout: float = 0.0
    projection_prng_key: int = 0
    sparse: bool = False
    very_sparse: bool = False

    method: ClassVar[str] = "randlora"
    peft_type: ClassVar[str] = "RANDLORA"
    hf_fields: ClassVar = {key: hf for key, hf in Targeted.hf_fields.items() if key != "exclude"} | {
        "rank": ("r", 32),
        "alpha": ("randlora_alpha", 640),
        "dropout": ("randlora_dropout", 0.0),
        "projection_prng_key": ("projection_prng_key", 0),
        "sparse": ("sparse", False),
        "very_sparse": ("very_sparse", False),
    }
    hf_constants: ClassVar = {"save_projection": True, "bias": "none", "init_weights": True, "fan_in_fan_out": False}
    hf_training: ClassVar = {"init_weights": True}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_projected(self.rank, self.projection_prng_key)
        positive(alpha=self.alpha)

    def attach(self, model: nnx.Module, name: str, rngs: nnx.Rngs) -> None:
        del rngs
        chosen = self.chosen(model)
        largest = [max(getattr(site.module, side) for site, _ in chosen) for side in ("in_features", "out_features")]
        smaller, larger = sorted(largest)
        keys = jax.random.split(jax.random.key(self.projection_prng_key))
        a = PeftConstant(self._base(keys[0], (self.rank, smaller), smaller), axes=("rank", None))
        b = PeftConstant(
            self._base(keys[1], (larger, -(-smaller // self.rank), self.rank), smaller), axes=(None, None, "rank")
        )
        for site, mask in chosen:
            place(site, name, RandLoraLinear(site, mask, a, b, scale=self.alpha / self.rank, dropout=self.dropout))
        train_whole(model, self.saved(model), name)

    def _base(self, key: jax.Array, shape: tuple[int, ...], smaller: int) -> jax.Array:
        """Random numbers whose standard deviation is 1, float32."""
        drawn = jax.random.uniform(key, shape, jnp.float32, -1, 1)
        if self.sparse or self.very_sparse:
            share = 1 / (smaller**0.5 if self.very_sparse else 3)  # of those that are not 0
            drawn = jnp.sign(drawn) * (jnp.abs(drawn) > 1 - share)
        return drawn / drawn.std(ddof=1)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "RandLora":
        require_projections(config)
        return super().from_hf(config)


class RandLoraLinear(DeltaAdapter):
    """x (U V) scale, or x (U V)^T scale where in <= out.

    a: [R, smaller], b: [larger, N', R], of the largest layer; lambdas: [*stack, R, N], gammas: [*stack, N, smaller
    side]. In a
    layer that is left out lambdas stands for 0.
    """

    names: ClassVar = {"randlora_lambda": HfLeaf("lambdas"), "randlora_gamma": HfLeaf("gammas")}

    def __init__(
        self, site: Site, mask: np.ndarray, a: PeftConstant, b: PeftConstant, *, scale: float, dropout: float
    ) -> None:
        owner, stack = site.module, site.stack
        self.hf = tuple(name for name, used in zip(site.names, mask, strict=True) if used)
        self.layers = LayerMask(tuple(bool(x) for x in mask))
        self.smaller, self.larger = sorted((owner.in_features, owner.out_features))
        self.wide, self.scale = owner.in_features <= owner.out_features, scale
        self.a, self.b = a, b
        rank = a.shape[0]
        bases = -(-self.smaller // rank)
        ones = jnp.full((*stack, bases, self.smaller), 1 / max(bases, self.smaller), jnp.float32)
        self.lambdas = PeftParam(jnp.zeros((*stack, rank, bases), jnp.float32), axes=site.lead("rank", None))
        self.gammas = PeftParam(ones, axes=site.lead(None, owner.axes[0 if self.wide else 1]))
        self.dropout = Dropout(dropout, stack)

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        (x,) = inputs
        first, second = self._factors()
        return compute(x, **parameters) + matmul(matmul(self.dropout(x), first), second)

    def hf_shared(self) -> dict[str, HfLeaf]:
        """peft writes the bases once and again with each layer, and misses what is not there."""
        a, b = HfLeaf("a", shape=(self.a.shape[0], 1, self.a.shape[1])), HfLeaf("b")
        whose = ("base_model", *(f"base_model.model.{name}" for name in self.hf))
        return {f"{prefix}.randlora_{key}": leaf for prefix in whose for key, leaf in (("A", a), ("B", b))}

    def delta(self) -> jax.Array:
        """s U V, or its transpose."""
        first, second = self._factors()
        return first @ second

    def _factors(self) -> tuple[jax.Array, jax.Array]:
        """Matrices [in, M] and [M, out] whose product is the update."""
        lambdas, gammas = self.lambdas.get_value() * self.scale, self.gammas.get_value()
        lambdas = self.layers(lambdas, jnp.zeros_like(lambdas))
        rank, bases = lambdas.shape
        a = self.a.get_value()[:, : self.smaller]
        v = (lambdas[:, :, None] * a[:, None, :] * gammas[None, :, :]).reshape(rank * bases, self.smaller)
        u = self.b.get_value()[: self.larger, :bases].reshape(self.larger, bases * rank)
        return (v.T, u.T) if self.wide else (u, v)
