"""The adapter of a residual sublayer: f(x) + B(u) in place of f(x)."""

from collections.abc import Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, LayerMask, MethodAdapter, transposed
from peftjax.adapters.sites import Site
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.methods.bottleneck.options import NON_LINEARITIES, BottleneckOptions
from peftjax.nn.dropout import Dropout
from peftjax.nn.norm import layer_norm
from peftjax.nn.slot import Base
from peftjax.quant.matmul import matmul

NORM_EPS = 1e-5


class BottleneckAdapter(MethodAdapter):
    """f(x) + B(u), with B(u) = dropout(scale (act(u down + down_bias) up + up_bias)).

    Attributes:
        down: [*stack, D, R].
        down_bias: [*stack, R].
        up: [*stack, R, D].
        up_bias: [*stack, D].
        scale: [*stack, 1 or D].
        before_scale, before_shift: The LayerNorm of u, [*stack, D] each, or None.
        after_scale, after_shift: The LayerNorm of B(u) or of f(x) + B(u), [*stack, D] each, or None.
    """

    zero_is_identity: ClassVar = True

    def __init__(
        self, method: BottleneckOptions, site: Site, width: int, chosen: Iterable[bool], rngs: nnx.Rngs
    ) -> None:
        size = max(int(width // method.reduction_factor), 1)
        self.reads, self.non_linearity = method.reads, method.non_linearity
        self.residual_before_norm = method.residual_before_norm
        self.layers = LayerMask(chosen)
        self.dropout = Dropout(method.dropout, site.stack)

        def vector(size: int, value: float, axis: str | None) -> nnx.Variable:
            return PeftParam(jnp.full((*site.stack, size), value, jnp.float32), axes=site.lead(axis))

        down, up = _initial((*site.stack, width, size), method.init, rngs)
        self.down, self.down_bias = PeftParam(down, axes=site.lead("embed", None)), vector(size, 0.0, None)
        self.up, self.up_bias = PeftParam(up, axes=site.lead(None, "embed")), vector(width, 0.0, "embed")
        channel = method.learned_scale == "channel"
        scales = vector(width if channel else 1, method.scale, "embed" if channel else None)
        self.scale = PeftConstant(scales.get_value(), axes=scales.axes) if method.learned_scale == "none" else scales

        def norm(wanted: bool) -> Any:
            return [nnx.data(vector(width, value, "embed") if wanted else None) for value in (1.0, 0.0)]

        self.before_scale, self.before_shift = norm(method.norm_before)
        self.after_scale, self.after_shift = norm(method.norm_after)

    def apply(self, base: Base, x: jax.Array) -> jax.Array:
        y = base(x)
        update = self.update(x if self.reads == "input" else y if self.reads == "output" else base.layer.join(x, y))
        if self.after_scale is None:
            changed = y + update
        elif self.residual_before_norm:
            changed = _layer_norm(y + update, self.after_scale, self.after_shift)
        else:
            changed = y + _layer_norm(update, self.after_scale, self.after_shift)
        return self.layers(changed, y)

    def update(self, u: jax.Array) -> jax.Array:
        """dropout(B(u)): [..., D] -> [..., D]."""
        if self.before_scale is not None:
            u = _layer_norm(u, self.before_scale, self.before_shift)
        low = NON_LINEARITIES[self.non_linearity](_affine(u, self.down, self.down_bias))  # [..., R]
        y = _affine(low, self.up, self.up_bias)
        return self.dropout((y * jnp.broadcast_to(self.scale.get_value(), y.shape)).astype(y.dtype))

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        if layer not in self.layers:
            return {}
        norm = {"adapter_down.0.weight": HfLeaf("before_scale"), "adapter_down.0.bias": HfLeaf("before_shift")}
        first = int(self.before_scale is not None)  # index in adapter_down, a sequence of modules
        leaves = (norm if first else {}) | {
            f"adapter_down.{first}.weight": transposed("down"),
            f"adapter_down.{first}.bias": HfLeaf("down_bias"),
            "adapter_up.weight": transposed("up"),
            "adapter_up.bias": HfLeaf("up_bias"),
        }
        if isinstance(self.scale, PeftParam):
            leaves["scaling"] = HfLeaf("scale")
        if self.after_scale is not None:
            leaves["adapter_norm_after.weight"] = HfLeaf("after_scale")
            leaves["adapter_norm_after.bias"] = HfLeaf("after_shift")
        return leaves


def _initial(shape: tuple[int, ...], init: str, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
    """Initial W_down [*stack, D, R], which is `shape`, and W_up [*stack, R, D], float32."""
    *stack, width, size = shape
    turned = (*stack, size, width)
    first, second = rngs.params(), rngs.params()
    if init == "mam_adapter":
        bound = 1 / np.sqrt(width)
        return jax.random.uniform(first, shape, jnp.float32, -bound, bound), jnp.zeros(turned, jnp.float32)
    if init == "houlsby":
        down, up = (
            jax.random.truncated_normal(key, -2.0, 2.0, each) for key, each in ((first, shape), (second, turned))
        )
        return 0.01 * down, 0.01 * up
    return 0.02 * jax.random.normal(first, shape), 0.02 * jax.random.normal(second, turned)


def _affine(x: jax.Array, kernel: nnx.Variable, bias: nnx.Variable) -> jax.Array:
    y = matmul(x, kernel.get_value())
    return y + jnp.broadcast_to(bias.get_value().astype(y.dtype), y.shape)


def _layer_norm(x: jax.Array, scale: nnx.Variable, shift: nnx.Variable) -> jax.Array:
    return layer_norm(x, scale.get_value(), shift.get_value(), NORM_EPS)
