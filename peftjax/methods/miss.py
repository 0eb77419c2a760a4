"""MiSS: y = x W + S(x) D, where S adds up the shards of x, each of rank many features, and D [r, out] is zero at the start.

Kang and Yin 2024 (arXiv:2409.15371): the delta of W repeats one block D all along the input. "mini" repeats D [r, m] along
the output too; "bat" (called Bone there) makes W_jo D_o + D_o of each [r, r] block W_jo of W^T: input j, output o.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import DeltaAdapter, HfLeaf, LayerMask, WeightAdapter
from peftjax.adapters.method import positive
from peftjax.adapters.sites import Site
from peftjax.adapters.targeted import Targeted
from peftjax.core.variables import PeftParam
from peftjax.nn.dropout import Dropout
from peftjax.quant.matmul import matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class Miss(Targeted):
    """Options of MiSS, beside those of `Targeted`.

    rank: features of a shard. variant: "balance", "mini" or "bat". mini_rank: columns of the block of "mini".
    dropout: on the adapter's input, in training; "bat" has none, as in peft.
    """

    rank: int = 64
    variant: str = "balance"
    mini_rank: int = 1
    dropout: float = 0.0

    method: ClassVar[str] = "miss"
    peft_type: ClassVar[str] = "MISS"
    hf_fields: ClassVar = Targeted.hf_fields | {
        "rank": ("r", 64),
        "mini_rank": ("mini_r", 1),
        "dropout": ("miss_dropout", 0.0),
        "variant": ("init_weights", True),
    }
    hf_constants: ClassVar = {"bias": "none"}

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(rank=self.rank, mini_rank=self.mini_rank)
        if self.variant not in ("balance", "mini", "bat"):
            raise ValueError(f"method.variant must be 'balance', 'mini' or 'bat', it is {self.variant!r}")

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> "MissLinear | MissBat":
        del rngs
        inputs, outputs = site.module.in_features, site.module.out_features
        name, bat = site.names[0], self.variant == "bat"
        if self.rank > inputs:
            raise ValueError(f"method.rank={self.rank} is more than the {inputs} input features of {name}")
        if bat and (inputs % self.rank or outputs % self.rank):
            raise ValueError(f"method.rank={self.rank} must divide both sides of {name}: {inputs} and {outputs}")
        if self.variant == "mini" and outputs % self.mini_rank:
            raise ValueError(f"method.mini_rank={self.mini_rank} must divide the {outputs} output features of {name}")
        layers = LayerMask(tuple(bool(layer) for layer in mask))
        if bat:
            return MissBat(site, self.rank, layers)
        columns = self.mini_rank if self.variant == "mini" else outputs
        return MissLinear(site, self.rank, columns, self.dropout, layers)

    def to_hf(self, model: nnx.Module, name: str) -> dict[str, Any]:
        return super().to_hf(model, name) | {"init_weights": True if self.variant == "balance" else self.variant}

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Miss":
        init = config.get("init_weights", True)
        return super().from_hf(config | {"init_weights": init if isinstance(init, str) else "balance"})


class MissLinear(DeltaAdapter):
    """x W + S(x) D. block: D, [*stack, R, M], repeated to [*stack, R, out]."""

    names: ClassVar = {"miss_block": HfLeaf("block")}

    def __init__(self, site: Site, rank: int, columns: int, dropout: float, layers: LayerMask) -> None:
        self.sides = site.module.in_features, site.module.out_features
        axis = site.module.axes[1] if columns == self.sides[1] else None
        self.block = PeftParam(jnp.zeros((*site.stack, rank, columns), jnp.float32), axes=site.lead("rank", axis))
        self.dropout, self.layers = Dropout(dropout, site.stack), layers

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        (x,) = inputs
        block = self._block()
        rank, columns = block.shape
        padded = jnp.pad(self.dropout(x), ((0, 0),) * (x.ndim - 1) + ((0, -x.shape[-1] % rank),))
        low = padded.reshape(*x.shape[:-1], -1, rank).sum(axis=-2)  # [..., R]
        update = jnp.tile(matmul(low, block), self.sides[1] // columns)
        return compute(x, **parameters) + update

    def delta(self) -> jax.Array:
        block = self._block()
        repeats = -(-self.sides[0] // block.shape[0]), self.sides[1] // block.shape[1]
        return jnp.tile(block, repeats)[: self.sides[0]]

    def _block(self) -> jax.Array:
        block = self.block.get_value()
        return self.layers(block, jnp.zeros_like(block))


class MissBat(WeightAdapter):
    """W whose block of input j and output o, transposed, is W_jo + W_jo D_o + D_o. block: D, [*stack, out / R, R, R]."""

    names: ClassVar = {"miss_block": HfLeaf("block")}

    def __init__(self, site: Site, rank: int, layers: LayerMask) -> None:
        shape = (*site.stack, site.module.out_features // rank, rank, rank)
        self.block = PeftParam(jnp.zeros(shape, jnp.float32), axes=site.lead(None, "rank", None))
        self.layers = layers

    def changed(self, kernel: jax.Array) -> jax.Array:
        block = self.block.get_value()
        outputs, rank, _ = block.shape
        blocks = kernel.reshape(-1, rank, outputs, rank)  # [j, b, o, a]
        delta = jnp.einsum("jboa,obc->jcoa", blocks, block) + block.transpose(2, 0, 1)[None]
        return self.layers(kernel + delta.reshape(kernel.shape), kernel)
