"""Stacked blocks: built under vmap and run by one scan, so that compile time does not grow with depth."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from peftjax.core import variables
from peftjax.nn.layer import SlottedLayer
from peftjax.nn.linear import OUTPUT
from peftjax.nn.slot import Slot

M = TypeVar("M", bound=nnx.Module)
X = TypeVar("X")

INPUT = "layer_input"
_POLICIES = jax.checkpoint_policies
_KEPT: dict[str, Callable | None] = {
    "dots": _POLICIES.save_only_these_names(OUTPUT),
    "block": None,
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}  # what each kind of remat keeps for the backward pass


def make_stack(make: Callable[[nnx.Rngs], M], layers: int, rngs: nnx.Rngs) -> M:
    """Build blocks as one module whose parameters have a leading "layers" axis.

    Args:
        make: Builds one block. Each layer gets its own random bits.
        layers: Number of blocks.
        rngs: Source of random weights.
    """
    graphs: list[nnx.GraphDef] = []

    def build(key: jax.Array) -> nnx.State:
        graph, state = nnx.split(make(nnx.Rngs(key)))
        graphs.append(graph)  # vmap calls this once; what it returns must be arrays
        return state

    keys = jax.random.split(rngs.params(), layers)
    values = jax.vmap(build)(keys)
    block: M = nnx.merge(graphs[0], values)
    for _, variable in nnx.to_flat_state(nnx.state(block)):
        variable.set_metadata(axes=("layers", *variable.axes))
    return block


def scan_stack(block: M, body: Callable[[M, X, Any], tuple[X, Any]], x: X, per_layer: Any, remat: str) -> tuple[X, Any]:
    """Run `x, out = body(layer, x, per_layer[i])` through the stacked layers.

    Args:
        block: From `make_stack`. Variables without a "layers" axis, which adapters may have, are shared by all layers.
        body: Computes one layer.
        x: Input of the first layer: an array, or a pytree with whatever else the layers change, such as the arrays of a
            cache.
        per_layer: A pytree of arrays [L, ...], or None; each layer gets its slice.
        remat: What the backward pass recomputes. "none": only what `nn.recompute` marks. "dots": all but the outputs of linear
            layers. "block": the layer, from its input. "offload": the same, with the input kept in host memory.

    Returns:
        The last x, and all outs stacked.
    """
    graph, leaves = variables.flat(block)
    stacked = {path: leaf.get_value() for path, leaf in leaves.items() if variables.is_stacked(leaf)}
    shared = {path: leaf.get_value() for path, leaf in leaves.items() if path not in stacked}

    def step(x: X, slices: Any) -> tuple[X, Any]:
        layer, layer_inputs = slices
        return body(variables.join(graph, layer, shared), checkpoint_name(x, INPUT), layer_inputs)

    if remat != "none":  # a scan needs no barrier against common-subexpression elimination
        step = jax.checkpoint(step, prevent_cse=False, policy=_KEPT[remat])
    return jax.lax.scan(step, x, (stacked, per_layer))


class Residual(SlottedLayer):
    """x + f(x), with a slot for bottleneck adapters, which wrap f."""

    def __init__(self) -> None:
        self.adapters = Slot()

    def __call__(self, x: jax.Array, sublayer: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return self.join(x, self.adapters(self, sublayer, x))

    def join(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Combine the input and output of the sublayer, [B, T, D] each."""
        return x + y


class ScaledResidual(Residual):
    """x + factor * f(x), with the product in float32."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def join(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return x + times(y, self.factor)


class NormedResidual(Residual):
    """norm(x + f(x)): post-norm (Vaswani et al. 2017, section 3.1)."""

    def __init__(self, norm: Callable[[jax.Array], jax.Array]) -> None:
        super().__init__()
        self.norm = norm

    def join(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return self.norm(x + y)


def times(x: jax.Array, factor: float) -> jax.Array:
    """factor * x, computed in float32, because bfloat16 would also round the factor."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)
