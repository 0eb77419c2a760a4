"""OFT: y = x R W + b, where R is block diagonal and each block is a rotation; R is the identity at initialization.

Qiu et al. 2023 (arXiv:2306.07280), section 3: a block is the Cayley transform (I - Q) (I + Q)^-1 of a trained
skew-symmetric Q. Qiu et al. 2025 (arXiv:2506.19847) replace it by the truncated series I + 2 Q + 2 Q^2 + ... + Q^k, which
needs no inverse, is only approximately a rotation and, as in peft, turns the other way. COFT, section 3.3 of the first
paper, bounds ||Q||; as in peft, by eps / sqrt(number of blocks), by projection.
"""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, LayerMask, WeightAdapter
from peftjax.adapters.biases import WithBiases
from peftjax.adapters.options import either_size, positive, positive_integer
from peftjax.adapters.sites import Site
from peftjax.core.errors import UserError
from peftjax.core.variables import PeftParam
from peftjax.nn.slot import Base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oft(WithBiases):
    """Options of OFT.

    Attributes:
        block_size (int, default 32): Size of the blocks, or 0 to set `blocks`. If it does not divide a layer's input
            size, the nearest divisor is used, as in peft; of two equally near divisors, the smaller one.
        blocks (int, default 0): Number of blocks, or 0 to set `block_size`.
        share (bool, default False): Share one block among all positions of the diagonal.
        neumann (bool, default True): Use the truncated series instead of the exact Cayley transform.
        terms (int, default 5): Number of terms of the series as peft counts them: 5 ends with Q^4.
        constrained (bool, default False): Bound the norm of Q (COFT).
        eps (float, default 6e-5): The bound of COFT.
    """

    block_size: int = 32
    blocks: int = 0
    share: bool = False
    neumann: bool = True
    terms: int = 5
    constrained: bool = False
    eps: float = 6e-5

    method: ClassVar[str] = "oft"
    peft_type: ClassVar[str] = "OFT"
    hf_fields: ClassVar = WithBiases.hf_fields | {
        "block_size": ("oft_block_size", 32),
        "blocks": ("r", 0),
        "share": ("block_share", False),
        "neumann": ("use_cayley_neumann", True),
        "terms": ("num_cayley_neumann_terms", 5),
        "constrained": ("coft", False),
        "eps": ("eps", 6e-5),
    }
    # before 0.18.0 peft computed another series
    hf_constants: ClassVar = {"fan_in_fan_out": False, "peft_version": "0.18.0"}
    hf_training: ClassVar = {"init_weights": True, "module_dropout": 0.0}  # peft never uses module_dropout

    def __post_init__(self) -> None:
        super().__post_init__()
        either_size(self.block_size, self.blocks)
        positive(eps=self.eps)
        positive_integer(terms=self.terms)
        if self.neumann and self.terms < 2:
            raise UserError(f"method.terms={self.terms} leaves nothing to train; use 2 or more")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        version = re.match(r"(\d+)\.(\d+)", config.get("peft_version") or "0.0")  # peft writes it since 0.18
        if config.get("use_cayley_neumann") and version and tuple(map(int, version.groups())) < (0, 18):
            warnings.warn(
                "adapter_config.json: peft computed another series for use_cayley_neumann before 0.18. This adapter was trained "
                "with it, so its outputs differ here and in newer versions of peft; train it again",
                stacklevel=2,
            )
        return super().from_hf({key: value for key, value in config.items() if key != "peft_version"})

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> "OftLinear":
        del rngs
        inputs = site.module.in_features
        size = near_divisor(inputs, self.block_size) if self.block_size else inputs // near_divisor(inputs, self.blocks)
        if size < 2:
            option, value = ("block_size", self.block_size) if self.block_size else ("blocks", self.blocks)
            raise UserError(
                f"method.{option}={value} leaves {site.names[0]} with blocks of 1 feature, which cannot be rotated; divide its "
                f"{inputs} input features into larger blocks"
            )
        return OftLinear(site, mask, size, self)

    def optimizer(
        self, inner: optax.GradientTransformation, leaves: Mapping[str, nnx.Variable]
    ) -> optax.GradientTransformation:
        """With `constrained`, `inner` followed by the projection of every Q, so that each step starts within the bound."""
        if not self.constrained:
            return inner
        packed = [path for path in leaves if path.endswith(f".{OftLinear.leaf}")]

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            updates, state = optax.with_extra_args_support(inner).update(updates, state, params, **extra)
            return updates | {
                path: projected(params[path] + updates[path], self.eps) - params[path] for path in packed
            }, state

        return optax.GradientTransformationExtraArgs(inner.init, update)


class OftLinear(WeightAdapter):
    """(x + x N) W + b, with R = I + N.

    Attributes:
        packed_rotation: The entries above the diagonals of Q, [*stack, blocks, b (b - 1) / 2].
    """

    leaf: ClassVar = "packed_rotation"
    names: ClassVar = {"oft_R.weight": HfLeaf(leaf)}

    def __init__(self, site: Site, mask: np.ndarray, size: int, method: Oft) -> None:
        blocks = 1 if method.share else site.module.in_features // size
        shape = (*site.stack, blocks, size * (size - 1) // 2)
        self.packed_rotation = PeftParam(jnp.zeros(shape, jnp.float32), axes=site.lead("block", None))
        self.size, self.layers = size, LayerMask(mask)
        self.eps, self.terms = (method.eps if method.constrained else None), (method.terms if method.neumann else None)

    def apply(self, base: Base, x: jax.Array) -> jax.Array:
        return base(x + times_blocks(x, self.less_one()))

    def changed(self, kernel: jax.Array) -> jax.Array:
        return kernel + times_blocks(kernel.T, jnp.swapaxes(self.less_one(), -1, -2)).T

    def less_one(self) -> jax.Array:
        """N = R - I, [blocks, b, b] float32. bfloat16 could not represent R: near 1 its steps are 0.8 %."""
        packed = self.layers.or_zero(self.packed_rotation.get_value())
        if self.eps is not None:  # straight-through: the gradient at the projected point goes to the parameter
            packed = packed + jax.lax.stop_gradient(projected(packed, self.eps) - packed)
        q = skew(packed, self.size)
        return cayley_less_one(q) if self.terms is None else neumann_less_one(q, self.terms)


def near_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`; of two equally near divisors, the smaller one."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    return min(divisors, key=lambda divisor: (abs(divisor - wanted), divisor))


def projected(packed: jax.Array, eps: float) -> jax.Array:
    """Packed blocks Q [..., blocks, b (b - 1) / 2], scaled down to ||Q|| = eps / sqrt(blocks) where they are longer."""
    limit = eps / packed.shape[-2] ** 0.5
    norm = jnp.sqrt(2 * jnp.square(packed).sum(axis=-1, keepdims=True))  # of the whole matrix
    return jnp.where(norm <= limit, packed, packed * (limit / jnp.maximum(norm, limit)))


def skew(packed: jax.Array, size: int) -> jax.Array:
    """Skew-symmetric blocks [..., b, b] from the entries above their diagonals, row by row, [..., b (b - 1) / 2]."""
    rows, columns = np.triu_indices(size, 1)
    upper = jnp.zeros((*packed.shape[:-1], size, size), packed.dtype).at[..., rows, columns].set(packed)
    return upper - jnp.swapaxes(upper, -1, -2)


def cayley_less_one(q: jax.Array) -> jax.Array:
    """(I - Q) (I + Q)^-1 - I = -2 (I + Q)^-1 Q of blocks [..., b, b]; exactly 0 where Q is 0."""
    one = jnp.broadcast_to(jnp.eye(q.shape[-1], dtype=q.dtype), q.shape)
    return -2 * jnp.linalg.solve(one + q, q)


def neumann_less_one(q: jax.Array, terms: int) -> jax.Array:
    """2 Q + 2 Q^2 + ... + Q^k of blocks [..., b, b], k = max(terms - 1, 3); 2 Q for two terms."""
    if terms == 2:
        return 2 * q
    total, power = 2 * q, q
    for _ in range(2, max(terms - 1, 3)):
        power = power @ q
        total = total + 2 * power
    return total + power @ q


def times_blocks(x: jax.Array, blocks: jax.Array) -> jax.Array:
    """x [..., in] times a block-diagonal matrix, in the dtype of x. blocks: [in / b, b, b], or [1, b, b] to repeat."""
    size = blocks.shape[-1]
    parts = x.reshape(*x.shape[:-1], -1, size)
    blocks = jnp.broadcast_to(blocks, (parts.shape[-2], size, size)).astype(x.dtype)
    return jnp.einsum("...kb,kbc->...kc", parts, blocks).reshape(x.shape)
