"""BOFT: y = (x R_m ... R_1 W) s + b, where each R_i = P_i D_i P_i^T rotates blocks and s scales the output.

Liu et al. 2024 (arXiv:2311.06243), section 4: D_i is block diagonal, its blocks are Cayley transforms as in OFT, and P_i a
butterfly permutation, so that m factors with blocks of b features mix 2^(m-1) b features. The scale s is peft's addition.
At initialization every R_i is the identity and s is 1. Without its CUDA extension, peft always computes with m = 1.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, LayerMask, WeightAdapter
from peftjax.adapters.biases import WithBiases
from peftjax.adapters.options import either_size, positive_integer
from peftjax.adapters.sites import Site
from peftjax.core.errors import UserError
from peftjax.core.variables import PeftParam
from peftjax.methods.oft import cayley_less_one, times_blocks
from peftjax.nn.dropout import Dropout
from peftjax.nn.slot import Base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boft(WithBiases):
    """Options of BOFT.

    Attributes:
        block_size (int, default 4): Size b of the blocks, or 0 to set `blocks`.
        blocks (int, default 0): Number of blocks, or 0 to set `block_size`.
        factors (int, default 1): Number m of factors.
        dropout (float, default 0.0): Share of the blocks of one random factor that are replaced by the identity in
            training.
    """

    block_size: int = 4
    blocks: int = 0
    factors: int = 1
    dropout: float = 0.0

    method: ClassVar[str] = "boft"
    peft_type: ClassVar[str] = "BOFT"
    traced_options: ClassVar = WithBiases.traced_options - {"dropout"}  # the rate determines a static number of blocks
    hf_fields: ClassVar = WithBiases.hf_fields | {
        "block_size": ("boft_block_size", 4),
        "blocks": ("boft_block_num", 0),
        "factors": ("boft_n_butterfly_factor", 1),
        "dropout": ("boft_dropout", 0.0),
    }
    hf_constants: ClassVar = {"fan_in_fan_out": False}
    hf_training: ClassVar = {"init_weights": True}

    def __post_init__(self) -> None:
        super().__post_init__()
        either_size(self.block_size, self.blocks)
        positive_integer(factors=self.factors)

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> "BoftLinear":
        del rngs
        inputs, name = site.module.in_features, site.names[0]
        option, value = ("block_size", self.block_size) if self.block_size else ("blocks", self.blocks)
        if inputs % value:
            raise UserError(f"method.{option}={value} must divide the {inputs} input features of {name}")
        size = self.block_size or inputs // self.blocks
        if self.factors > 1 and (size % 2 or (inputs // size) % 2 ** (self.factors - 1)):
            raise UserError(
                f"method.factors={self.factors} needs blocks of an even size and a number of blocks that is a multiple "
                f"of {2 ** (self.factors - 1)}; {name} has {inputs // size} blocks of {size}"
            )
        return BoftLinear(site, mask, self.factors, size, self.dropout)

    def reconciled(
        self, model: nnx.Module, tensors: dict[str, np.ndarray], key_of: Callable[[str], str | None]
    ) -> tuple[Self, dict[str, np.ndarray]]:
        """The method with as many factors as its tensors have.

        Without its CUDA extension peft trains with one factor but saves the configured number.
        """
        del model, key_of
        stored = {len(tensor) for key, tensor in tensors.items() if key.endswith(".boft_R") and tensor.ndim == 4}
        if len(stored) != 1 or stored == {self.factors}:
            return self, tensors
        warnings.warn(
            f"adapter_config.json: ignoring boft_n_butterfly_factor={self.factors}, because the tensors have another number of "
            "factors",
            stacklevel=2,
        )
        return dataclasses.replace(self, factors=stored.pop()), tensors


class BoftLinear(WeightAdapter):
    """(x R_m ... R_1 W) s + b.

    Attributes:
        rotations: Matrices whose skew-symmetric part is Q, [*stack, m, in / b, b, b].
        scale: s, [*stack, out].
    """

    zero_is_identity: ClassVar = True
    names: ClassVar = {"boft_R": HfLeaf("rotations"), "boft_s": HfLeaf("scale", shape=(-1, 1))}

    def __init__(self, site: Site, mask: np.ndarray, factors: int, size: int, dropout: float) -> None:
        owner, stack = site.module, site.stack
        shape = (*stack, factors, owner.in_features // size, size, size)
        self.rotations = PeftParam(jnp.zeros(shape, jnp.float32), axes=site.lead(None, "block", None, None))
        self.scale = PeftParam(jnp.ones((*stack, owner.out_features), jnp.float32), axes=site.lead(owner.axes[1]))
        self.dropout, self.layers = Dropout(dropout, stack), LayerMask(mask)

    def apply(self, base: Base, x: jax.Array) -> jax.Array:
        blocks = self._dropped(self.less_one())
        for factor in reversed(range(len(blocks))):
            x = x + butterfly(x, blocks[factor], factor)
        if not base.has("bias"):
            return self._scaled(base(x))
        bias = base.parameter("bias")
        y = self._scaled(base(x, bias=jnp.zeros_like(bias)))
        return y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)

    def changed(self, kernel: jax.Array) -> jax.Array:
        turned = kernel.T
        for factor, blocks in enumerate(jnp.swapaxes(self.less_one(), -1, -2)):
            turned = turned + butterfly(turned, blocks, factor)
        return turned.T * self.layers.or_one(self.scale.get_value())[None]

    def less_one(self) -> jax.Array:
        """D_i - I, [m, in / b, b, b] float32."""
        free = self.layers.or_zero(self.rotations.get_value())
        return cayley_less_one(0.5 * (free - jnp.swapaxes(free, -1, -2)))

    def _scaled(self, y: jax.Array) -> jax.Array:
        return (y * jnp.broadcast_to(self.layers.or_one(self.scale.get_value()), y.shape)).astype(y.dtype)

    def _dropped(self, blocks: jax.Array) -> jax.Array:
        """`blocks`; in training, a random share of the blocks of one random factor is 0."""
        factors, count = blocks.shape[:2]
        if self.dropout.deterministic or self.dropout.key is None:
            return blocks
        which, order = jax.random.split(jax.random.wrap_key_data(self.dropout.key.get_value()))
        dropped = jax.random.permutation(order, count) < int(self.dropout.rate * count)
        dropped = dropped[None] & (jnp.arange(factors) == jax.random.randint(which, (), 0, factors))[:, None]
        return jnp.where(dropped[:, :, None, None], 0.0, blocks)


def butterfly(x: jax.Array, blocks: jax.Array, factor: int) -> jax.Array:
    """x P D P^T for x [..., in], D with blocks [in / b, b, b], and the permutation P of factor 0, 1, ...

    P^T brings together the even half blocks of every 2^factor b features, and the odd ones.
    """
    half = blocks.shape[-1] // 2
    if factor == 0:
        return times_blocks(x, blocks)
    lead, pairs = x.shape[:-1], 2**factor
    apart = jnp.swapaxes(x.reshape(*lead, -1, 2, pairs, half), -3, -2).reshape(x.shape)
    turned = times_blocks(apart, blocks).reshape(*lead, -1, pairs, 2, half)
    return jnp.swapaxes(turned, -3, -2).reshape(x.shape)
