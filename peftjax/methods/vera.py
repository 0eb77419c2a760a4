"""VeRA: y = x W + b + ((x A) * d) B * l, with A and B random, frozen and shared by all layers; d and l are trained.

Kopiczko et al. 2023 (arXiv:2310.11454), section 3.1, eq. 2, where d and l are the diagonals of Lambda_d and Lambda_b; l
is zero at the start and d is `d_initial`. A is as long as the largest input, B as the largest output; a smaller layer
takes their first rows or columns, as in peft.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import DeltaAdapter, HfLeaf, LayerMask, transposed
from peftjax.adapters.method import positive
from peftjax.adapters.sites import Site, place
from peftjax.adapters.targeted import Targeted, train_whole
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.nn.dropout import Dropout
from peftjax.quant.matmul import matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vera(Targeted):
    """Options of VeRA, beside those of `Targeted`.

    rank: of the random matrices. d_initial: of d, at the start. dropout: on the adapter's input, in training.
    projection_prng_key: the seed of A and B. They are always in the file, for from this seed torch would draw others.
    """

    rank: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    projection_prng_key: int = 0

    method: ClassVar[str] = "vera"
    peft_type: ClassVar[str] = "VERA"
    hf_fields: ClassVar = {key: hf for key, hf in Targeted.hf_fields.items() if key != "exclude"} | {
        "rank": ("r", 256),
        "d_initial": ("d_initial", 0.1),
        "dropout": ("vera_dropout", 0.0),
        "projection_prng_key": ("projection_prng_key", 0),
    }
    hf_constants: ClassVar = {"save_projection": True, "bias": "none", "init_weights": True, "fan_in_fan_out": False}
    hf_training: ClassVar = {"init_weights": True}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_projected(self.rank, self.projection_prng_key)
        positive(d_initial=self.d_initial)

    def attach(self, model: nnx.Module, name: str, rngs: nnx.Rngs) -> None:
        del rngs
        chosen = self.chosen(model)
        largest_in = max(site.module.in_features for site, _ in chosen)
        largest_out = max(site.module.out_features for site, _ in chosen)
        keys = jax.random.split(jax.random.key(self.projection_prng_key))
        a = PeftConstant(_kaiming(keys[0], (largest_in, self.rank)), axes=(None, "rank"))
        b = PeftConstant(_kaiming(keys[1], (self.rank, largest_out)), axes=("rank", None))
        for site, mask in chosen:
            place(site, name, VeraLinear(site, mask, a, b, d_initial=self.d_initial, dropout=self.dropout))
        train_whole(model, self.saved(model), name)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Vera":
        require_projections(config)
        return super().from_hf(config)


def _kaiming(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Uniform with variance 2 / (the number of rows), float32."""
    bound = (6 / shape[0]) ** 0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def check_projected(rank: int, seed: int) -> None:
    """A ValueError for a rank or a seed of random projections that is none."""
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"method.rank must be a whole number of at least 1, it is {rank!r}")
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"method.projection_prng_key must be a whole number from 0 to 2**32 - 1, it is {seed!r}")


def require_projections(config: dict[str, Any]) -> None:
    """A ValueError where the config says that the random projections are not in the file."""
    if config.get("save_projection") is False:
        raise ValueError(
            "adapter_config.json: save_projection=False: the file lacks its random projections, and only torch draws "
            "the same again from projection_prng_key. Save it once more from peft with save_projection=True"
        )


class VeraLinear(DeltaAdapter):
    """((x A * lambda_d) B) * lambda_b. a: [largest in, R], b: [R, largest out], lambda_d: [*stack, R], lambda_b:
    [*stack, out].

    In a layer that is left out lambda_b stands for 0.
    """

    names: ClassVar = {"vera_lambda_d": HfLeaf("lambda_d"), "vera_lambda_b": HfLeaf("lambda_b")}

    def __init__(
        self, site: Site, mask: np.ndarray, a: PeftConstant, b: PeftConstant, *, d_initial: float, dropout: float
    ) -> None:
        stack, self.inputs, self.outputs = site.stack, site.module.in_features, site.module.out_features
        self.layers = LayerMask(tuple(bool(x) for x in mask))
        self.a, self.b = a, b
        self.lambda_d = PeftParam(jnp.full((*stack, a.shape[1]), d_initial, jnp.float32), axes=site.lead("rank"))
        self.lambda_b = PeftParam(jnp.zeros((*stack, self.outputs), jnp.float32), axes=site.lead(site.module.axes[1]))
        self.dropout = Dropout(dropout, stack)

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        (x,) = inputs
        low = _times(matmul(self.dropout(x), self._a()), self.lambda_d.get_value())  # [..., R]
        return compute(x, **parameters) + _times(matmul(low, self._b()), self._lambda_b())

    def hf_shared(self) -> dict[str, HfLeaf]:
        return {"base_model.vera_A": transposed("a"), "base_model.vera_B": transposed("b")}

    def delta(self) -> jax.Array:
        """A d B l, with diagonal matrices d and l."""
        return _times(_times(self._a(), self.lambda_d.get_value()) @ self._b(), self._lambda_b())

    def _a(self) -> jax.Array:
        return self.a.get_value()[: self.inputs]

    def _b(self) -> jax.Array:
        return self.b.get_value()[:, : self.outputs]

    def _lambda_b(self) -> jax.Array:
        value = self.lambda_b.get_value()
        return self.layers(value, jnp.zeros_like(value))


def _times(x: jax.Array, diagonal: jax.Array) -> jax.Array:
    """x * diagonal over the last axis, in the dtype of x."""
    return x * jnp.broadcast_to(diagonal.astype(x.dtype), x.shape)
