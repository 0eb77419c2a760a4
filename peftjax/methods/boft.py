"""BOFT: y = (x R_m ... R_1 W) s + b, where each R_i = P_i D_i P_i^T rotates blocks and s scales the output.

Liu et al. 2024 (arXiv:2311.06243), section 4: D_i is block diagonal, its blocks are Cayley transforms as in OFT, and P_i a
butterfly permutation, so that m factors of blocks of b features mix 2^(m-1) b of them. s is peft's addition. At the start
every R_i is the identity and s is 1. Without its CUDA extension peft computes with m = 1, whatever its config says.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, LayerMask, WeightAdapter, parameter
from peftjax.adapters.method import positive
from peftjax.adapters.sites import Site
from peftjax.adapters.targeted import Targeted
from peftjax.core.variables import PeftParam
from peftjax.methods.oft import cayley_less_one, times_blocks
from peftjax.nn.dropout import Dropout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boft(Targeted):
    """Options of BOFT, beside those of `Targeted`.

    block_size: of the blocks, or `blocks`: how many there are; the other one is 0. factors: m. dropout: in training,
    this share of the blocks of one random factor are the identity.
    """

    block_size: int = 4
    blocks: int = 0
    factors: int = 1
    dropout: float = 0.0

    method: ClassVar[str] = "boft"
    peft_type: ClassVar[str] = "BOFT"
    hf_fields: ClassVar = Targeted.hf_fields | {
        "block_size": ("boft_block_size", 4),
        "blocks": ("boft_block_num", 0),
        "factors": ("boft_n_butterfly_factor", 1),
        "dropout": ("boft_dropout", 0.0),
    }
    hf_constants: ClassVar = {"bias": "none", "fan_in_fan_out": False}
    hf_training: ClassVar = {"init_weights": True}

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.block_size == 0) == (self.blocks == 0):
            raise ValueError(
                f"method.block_size={self.block_size} and method.blocks={self.blocks}: set one of them, the other to 0"
            )
        positive(
            factors=self.factors, **({"block_size": self.block_size} if self.block_size else {"blocks": self.blocks})
        )

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> "BoftLinear":
        del rngs
        inputs, name = site.module.in_features, site.names[0]
        option, value = ("block_size", self.block_size) if self.block_size else ("blocks", self.blocks)
        if inputs % value:
            raise ValueError(f"method.{option}={value} must divide the {inputs} input features of {name}")
        size = self.block_size or inputs // self.blocks
        if self.factors > 1 and (size % 2 or (inputs // size) % 2 ** (self.factors - 1)):
            raise ValueError(
                f"method.factors={self.factors} needs blocks of an even size, their number a multiple of "
                f"{2 ** (self.factors - 1)}; {name} has {inputs // size} blocks of {size}"
            )
        layers = LayerMask(tuple(bool(layer) for layer in mask))
        return BoftLinear(site, self.factors, size, self.dropout, layers)


class BoftLinear(WeightAdapter):
    """rotations: whose skew-symmetric part is Q, [*stack, m, in / b, b, b]; scale: s, [*stack, out]."""

    names: ClassVar = {"boft_R": HfLeaf("rotations"), "boft_s": HfLeaf("scale", shape=(-1, 1))}

    def __init__(self, site: Site, factors: int, size: int, dropout: float, layers: LayerMask) -> None:
        owner, stack = site.module, site.stack
        shape = (*stack, factors, owner.in_features // size, size, size)
        self.rotations = PeftParam(jnp.zeros(shape, jnp.float32), axes=site.lead(None, "block", None, None))
        self.scale = PeftParam(jnp.ones((*stack, owner.out_features), jnp.float32), axes=site.lead(owner.axes[1]))
        self.dropout, self.layers = Dropout(dropout, stack), layers

    def __call__(self, owner: Any, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any) -> jax.Array:
        (x,) = inputs
        blocks = self._dropped(self._less_one())
        for factor in reversed(range(len(blocks))):
            x = x + butterfly(x, blocks[factor], factor)
        has_bias = "bias" in parameters or owner.bias is not None
        bias = parameter(owner, "bias", parameters) if has_bias else None
        y = compute(x, **(parameters if bias is None else parameters | {"bias": jnp.zeros_like(bias)}))
        y = (y * jnp.broadcast_to(self._scale(), y.shape)).astype(y.dtype)
        return y if bias is None else y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)

    def changed(self, kernel: jax.Array) -> jax.Array:
        turned = kernel.T
        for factor, blocks in enumerate(jnp.swapaxes(self._less_one(), -1, -2)):
            turned = turned + butterfly(turned, blocks, factor)
        return turned.T * self._scale()[None]

    def _less_one(self) -> jax.Array:
        """D_i - I, [m, in / b, b, b] float32."""
        free = self.rotations.get_value()
        free = self.layers(free, jnp.zeros_like(free))
        return cayley_less_one(0.5 * (free - jnp.swapaxes(free, -1, -2)))

    def _scale(self) -> jax.Array:
        scale = self.scale.get_value()
        return self.layers(scale, jnp.ones_like(scale))

    def _dropped(self, blocks: jax.Array) -> jax.Array:
        """In training, `blocks` with a share of those of one factor, drawn at random, 0."""
        factors, count = blocks.shape[:2]
        if self.dropout.deterministic or self.dropout.key is None:
            return blocks
        which, order = jax.random.split(jax.random.wrap_key_data(self.dropout.key.get_value()))
        dropped = jax.random.permutation(order, count) < int(self.dropout.rate * count)
        dropped = dropped[None] & (jnp.arange(factors) == jax.random.randint(which, (), 0, factors))[:, None]
        return jnp.where(dropped[:, :, None, None], 0.0, blocks)


def butterfly(x: jax.Array, blocks: jax.Array, factor: int) -> jax.Array:
    """x P D P^T for x [..., in], D of blocks [in / b, b, b], and P that of factor 0, 1, ...

    P^T brings together the even half blocks of every 2^factor b features, and the odd ones.
    """
    half = blocks.shape[-1] // 2
    if factor == 0:
        return times_blocks(x, blocks)
    lead, pairs = x.shape[:-1], 2**factor
    apart = jnp.swapaxes(x.reshape(*lead, -1, 2, pairs, half), -3, -2).reshape(x.shape)
    turned = times_blocks(apart, blocks).reshape(*lead, -1, pairs, 2, half)
    return jnp.swapaxes(turned, -3, -2).reshape(x.shape)
