"""MiSS: y = x W + S(x) D, where S(x) sums the shards of x, of rank features each, and D [r, out] is zero initially.

Kang and Yin 2024 (arXiv:2409.15371): the update of W repeats one block D along the input. "mini" repeats D [r, m] along
the output too. "bat" (called Bone there) adds W_jo D_o + D_o to each [r, r] block W_jo of W^T, with input j and output o.
"""

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import DeltaAdapter, HfLeaf, LayerMask, WeightAdapter
from peftjax.adapters.biases import WithBiases
from peftjax.adapters.options import one_of, positive_integer
from peftjax.adapters.sites import Site
from peftjax.core.errors import UserError
from peftjax.core.variables import PeftParam
from peftjax.nn.dropout import Dropout
from peftjax.quant.matmul import matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class Miss(WithBiases):
    """Options of MiSS.

    Attributes:
        rank (int, default 64): Number of features of a shard.
        variant (str, default "balance"): "balance", "mini" or "bat".
        mini_rank (int, default 1): Number of columns of the block of "mini".
        dropout (float, default 0.0): Dropout rate of the adapter's input; "bat" has none, as in peft.
    """

    rank: int = 64
    variant: str = "balance"
    mini_rank: int = 1
    dropout: float = 0.0

    method: ClassVar[str] = "miss"
    peft_type: ClassVar[str] = "MISS"
    hf_fields: ClassVar = WithBiases.hf_fields | {
        "rank": ("r", 64),
        "mini_rank": ("mini_r", 1),
        "dropout": ("miss_dropout", 0.0),
        "variant": ("init_weights", True),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_integer(rank=self.rank, mini_rank=self.mini_rank)
        one_of(("balance", "mini", "bat"), variant=self.variant)

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> "MissLinear | MissBat":
        del rngs
        inputs, outputs, name = site.module.in_features, site.module.out_features, site.names[0]
        if self.rank > inputs:
            raise UserError(f"method.rank={self.rank} is more than the {inputs} input features of {name}")
        if self.variant == "bat":
            if inputs % self.rank or outputs % self.rank:
                raise UserError(f"method.rank={self.rank} must divide both sides of {name}: {inputs} and {outputs}")
            return MissBat(site, mask, self.rank)
        if self.variant == "mini" and outputs % self.mini_rank:
            raise UserError(f"method.mini_rank={self.mini_rank} must divide the {outputs} output features of {name}")
        return MissLinear(site, mask, self.rank, self.mini_rank if self.variant == "mini" else outputs, self.dropout)

    def to_hf(self, model: nnx.Module, name: str) -> dict[str, Any]:
        return super().to_hf(model, name) | {"init_weights": True if self.variant == "balance" else self.variant}

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        init = config.get("init_weights", True)
        return super().from_hf(config | {"init_weights": init if isinstance(init, str) else "balance"})


class MissLinear(DeltaAdapter):
    """x W + S(dropout(x)) D.

    Attributes:
        block: [*stack, R, M], repeated to D, [*stack, R, out].
    """

    zero_is_identity: ClassVar = True
    names: ClassVar = {"miss_block": HfLeaf("block")}

    def __init__(self, site: Site, mask: np.ndarray, rank: int, columns: int, dropout: float) -> None:
        self.sides = site.module.in_features, site.module.out_features
        axis = site.module.axes[1] if columns == self.sides[1] else None
        self.block = PeftParam(jnp.zeros((*site.stack, rank, columns), jnp.float32), axes=site.lead("rank", axis))
        self.dropout, self.layers = Dropout(dropout, site.stack), LayerMask(mask)

    def delta(self) -> jax.Array:
        block = self.layers.or_zero(self.block.get_value())
        repeats = -(-self.sides[0] // block.shape[0]), self.sides[1] // block.shape[1]
        return jnp.tile(block, repeats)[: self.sides[0]]

    def update(self, x: jax.Array) -> jax.Array:
        block = self.layers.or_zero(self.block.get_value())
        rank, columns = block.shape
        padded = jnp.pad(self.dropout(x), ((0, 0),) * (x.ndim - 1) + ((0, -x.shape[-1] % rank),))
        low = padded.reshape(*x.shape[:-1], -1, rank).sum(axis=-2)  # [..., R]
        return jnp.tile(matmul(low, block), self.sides[1] // columns)


class MissBat(WeightAdapter):
    """x W', where the block of W' of input j and output o, transposed, is W_jo + W_jo D_o + D_o.

    Attributes:
        block: D, [*stack, out / R, R, R].
    """

    zero_is_identity: ClassVar = True
    names: ClassVar = {"miss_block": HfLeaf("block")}

    def __init__(self, site: Site, mask: np.ndarray, rank: int) -> None:
        shape = (*site.stack, site.module.out_features // rank, rank, rank)
        self.block = PeftParam(jnp.zeros(shape, jnp.float32), axes=site.lead(None, "rank", None))
        self.layers = LayerMask(mask)

    def changed(self, kernel: jax.Array) -> jax.Array:
        block = self.block.get_value()
        outputs, rank, _ = block.shape
        blocks = kernel.reshape(-1, rank, outputs, rank)  # [j, b, o, a]
        delta = jnp.einsum("jboa,obc->jcoa", blocks, block) + block.transpose(2, 0, 1)[None]
        return self.layers(kernel + delta.reshape(kernel.shape), kernel)
