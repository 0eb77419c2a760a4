"""Blocks made under vmap and run by one scan, so that compile time and code do not grow with depth."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from peftjax.core import variables
from peftjax.nn.linear import OUTPUT
from peftjax.nn.slot import Slot

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
}  # what the backward pass finds, for each kind of remat


def make_stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> Any:
    """`layers` blocks as one module whose every parameter has a leading "layers" axis, each layer its own random bits."""
    graph = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]
    keys = jax.random.split(rngs.params(), layers)
    block = nnx.merge(graph, jax.vmap(lambda key: nnx.split(make(nnx.Rngs(key)))[1])(keys))
    for _, variable in nnx.to_flat_state(nnx.state(block)):
        variable.set_metadata(axes=("layers", *variable.axes))
    return block


def scan_stack(
    block: Any, body: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]], x: jax.Array, per_layer: Any, remat: str
) -> tuple[jax.Array, Any]:
    """Run `x, out = body(layer, x, per_layer[i])` through the stacked layers; returns the last x and all outs stacked.

    Variables without a "layers" axis, which an adapter may share among its layers, are the same in each of them.
    remat: what the backward pass computes again. "block": the layer, of which its input alone is kept; "offload": likewise,
    and the input is kept in the host's memory; "dots": all but the outputs of linear layers.
    """
    graph, leaves = variables.flat(block)
    stacked = {path: leaf.get_value() for path, leaf in leaves.items() if variables.is_stacked(leaf)}
    shared = {path: leaf.get_value() for path, leaf in leaves.items() if path not in stacked}

    def step(x: jax.Array, slices: Any) -> tuple[jax.Array, Any]:
        layer, layer_inputs = slices
        return body(variables.join(graph, layer, shared), checkpoint_name(x, INPUT), layer_inputs)

    if remat != "none":  # a scan needs no barrier against common-subexpression elimination
        step = jax.checkpoint(step, prevent_cse=False, policy=_KEPT[remat])
    return jax.lax.scan(step, x, (stacked, per_layer))


class Residual(nnx.Module):
    """x + f(x), with the slot in which bottleneck adapters sit: they wrap f."""

    def __init__(self) -> None:
        self.adapters = Slot()

    def __call__(self, x: jax.Array, sublayer: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return self.join(x, self.adapters(self, sublayer, x))

    def join(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """What the block goes on with, from the sublayer's input and output."""
        return x + y


class NormedResidual(Residual):
    """norm(x + f(x)): post-norm (Vaswani et al. 2017, section 3.1)."""

    def __init__(self, norm: nnx.Module) -> None:
        super().__init__()
        self.norm: Any = norm

    def join(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return self.norm(x + y)
