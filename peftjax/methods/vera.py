"""VeRA: y = x W + b + ((x A) * d) B * l, with A and B random, frozen and shared by all layers; d and l are trained.

Kopiczko et al. 2023 (arXiv:2310.11454), section 3.1, eq. 2, where d and l are the diagonals of Lambda_d and Lambda_b. At
initialization l is zero and d is `d_initial`. A fits the largest input and B the largest output; smaller layers use
their first rows and columns, as in peft. Every layer of every expert has its own d and l.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import DeltaAdapter, HfLeaf, transposed
from peftjax.adapters.diagonal import times
from peftjax.adapters.options import positive
from peftjax.adapters.projected import Projected
from peftjax.adapters.selection import Chosen, joined
from peftjax.adapters.single_experts import ExpertMask, SingleExperts, layer_mask, vectors
from peftjax.adapters.sites import Site
from peftjax.adapters.torch_random import TorchGenerator
from peftjax.core.variables import PeftConstant
from peftjax.nn.dropout import Dropout
from peftjax.nn.experts import ExpertLinear, Groups
from peftjax.nn.linear import Linear
from peftjax.nn.slot import Base
from peftjax.quant.matmul import matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vera(Projected):
    """Options of VeRA. Targets can be Linear layers and layers of experts.

    Attributes:
        rank (int, default 256): Rank of A and B.
        d_initial (float, default 0.1): Initial value of d.
    """

    rank: int = 256
    d_initial: float = 0.1

    method: ClassVar[str] = "vera"
    peft_type: ClassVar[str] = "VERA"
    fits: ClassVar = (Linear, ExpertLinear)
    splits_experts: ClassVar = True
    traced_options: ClassVar = Projected.traced_options | {"rank", "d_initial"}
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
        chosen = joined(chosen)
        largest_in, largest_out = _largest(chosen)
        keys = jax.random.split(jax.random.key(self.projection_prng_key))
        a = PeftConstant(_kaiming(keys[0], (largest_in, self.rank)), axes=(None, "rank"))
        b = PeftConstant(_kaiming(keys[1], (self.rank, largest_out)), axes=("rank", None))
        for site, mask in chosen:
            kind = VeraExperts if isinstance(site.module, ExpertLinear) else VeraLinear
            yield site, kind(site, mask, a, b, d_initial=self.d_initial, dropout=self.dropout)

    def peft_projections(self, chosen: Chosen) -> dict[str, np.ndarray]:
        """A and B."""
        generator, (inputs, outputs) = TorchGenerator(self.projection_prng_key), _largest(chosen)
        shapes = (self.rank, inputs), (outputs, self.rank)
        bounds = ((6 / shape[1]) ** 0.5 for shape in shapes)
        a, b = (generator.uniform(shape, -bound, bound) for shape, bound in zip(shapes, bounds, strict=True))
        return {"base_model.vera_A": a, "base_model.vera_B": b}


def _largest(chosen: Chosen) -> tuple[int, int]:
    """The largest widths of an input and of an output."""
    return max(site.module.in_features for site, _ in chosen), max(_outputs(site) for site, _ in chosen)


def _outputs(site: Site) -> int:
    """The output width of a layer, or of one part of an expert's kernel."""
    width: int = site.module.out_features
    return width // max(len(site.parts), 1)


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
        lambda_b: l, [*stack, out]; it counts as 0 in a layer without the adapter.
    """

    zero_is_identity: ClassVar = True
    names: ClassVar = {"vera_lambda_d": HfLeaf("lambda_d"), "vera_lambda_b": HfLeaf("lambda_b")}

    def __init__(
        self, site: Site, mask: np.ndarray, a: PeftConstant, b: PeftConstant, *, d_initial: float, dropout: float
    ) -> None:
        self.inputs, self.outputs, self.parts = site.module.in_features, _outputs(site), site.parts
        self.layers = layer_mask(site, mask)
        self.a, self.b = a, b
        self.lambda_d = vectors(site, a.shape[1], "rank", d_initial)
        self.lambda_b = vectors(site, self.outputs, site.module.axes[1], 0.0)
        self.dropout = Dropout(dropout, site.stack)

    def delta(self) -> jax.Array:
        """A diag(d) B diag(l)."""
        return _delta(*self.factors())

    def update(self, x: jax.Array) -> jax.Array:
        a, lambda_d, b, lambda_b = self.factors()
        low = times(matmul(self.dropout(x), a), lambda_d)  # [..., R]
        return times(matmul(low, b), lambda_b)

    def factors(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """A [in, R], d [R], B [R, out] and l [out] of one layer."""
        rank = self.lambda_d.shape[-1]  # in a population, A and B have the largest rank of all members
        a, b = self.a.get_value()[: self.inputs, :rank], self.b.get_value()[:rank, : self.outputs]
        return a, self.lambda_d.get_value(), b, self.layers.or_zero(self.lambda_b.get_value())

    def hf_shared(self) -> dict[str, HfLeaf]:
        return {"base_model.vera_A": transposed("a"), "base_model.vera_B": transposed("b")}


def _delta(a: jax.Array, lambda_d: jax.Array, b: jax.Array, lambda_b: jax.Array) -> jax.Array:
    return times(times(a, lambda_d) @ b, lambda_b)


class VeraExperts(VeraLinear, SingleExperts):
    """x W_e + ((dropout(x) A * lambda_d) B) * lambda_b for each part of the kernel of each expert e.

    Attributes:
        lambda_d: d, [*stack, E, parts, R].
        lambda_b: l, [*stack, E, parts, out / parts].
    """

    layers: ExpertMask

    def apply(self, base: Base, x: jax.Array, groups: Groups) -> jax.Array:  # type: ignore[override]
        y = base(x, groups)
        a, lambda_d, b, lambda_b = self.factors()
        low = matmul(self.dropout(x), a)[:, :, None]  # [n, rows, 1, R]
        low = jnp.broadcast_to(low, (*x.shape[:2], len(self.parts), a.shape[1]))
        parts = times(matmul(times(low, lambda_d[groups.owner, None]), b), lambda_b[groups.owner, None])
        return y + parts.reshape(y.shape)

    def delta(self) -> jax.Array:
        """A diag(d) B diag(l) of the parts of each expert, [E, in, out]."""
        a, lambda_d, b, lambda_b = self.factors()
        one = jax.vmap(lambda own_d, own_b: _delta(a, own_d, b, own_b), out_axes=1)  # [in, parts, out / parts]
        by_expert = jax.lax.map(lambda own: one(*own), (lambda_d, lambda_b))  # one expert after another
        return by_expert.reshape(*by_expert.shape[:2], -1)

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        vector = {suffix: dataclasses.replace(leaf, shape=(-1,)) for suffix, leaf in self.names.items()}
        return self.leaves_in(self.layers, layer, vector)
