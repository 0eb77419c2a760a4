"""Stacked blocks: built under vmap and run by one scan, so that compile time does not grow with depth."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from peftjax.core import variables
from peftjax.nn.linear import OUTPUT

M = TypeVar("M", bound=nnx.Module)
X = TypeVar("X")

INPUT = "layer_input"
_POLICIES = jax.checkpoint_policies
# What each kind of remat keeps for the backward pass.
_KEPT: dict[str, Callable | None] = {
    "dots": _POLICIES.save_only_these_names(OUTPUT),
    "block": None,
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


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
    graph, stacked, shared = open_stack(block)

    def step(x: X, slices: Any) -> tuple[X, Any]:
        layer, layer_inputs = slices
        return body(variables.join(graph, layer, shared), checkpoint_name(x, INPUT), layer_inputs)

    return jax.lax.scan(_recomputing(step, remat), x, (stacked, per_layer))


def scan_variants(
    block: M,
    variants: Sequence[nnx.Module],
    kinds: Sequence[int],
    body: Callable[[M, Any, X, Any], X],
    x: X,
    per_layer: Any,
    remat: str,
) -> X:
    """Run `x = body(layer, variant, x, per_layer[i])` through layers of several kinds.

    A repeating pattern of kinds is one scan, whose body runs the layers of one repetition. Compile time grows with the
    lengths of the different patterns, as `find_patterns` finds them. A stack that takes part in several scans is copied.

    Args:
        block: From `make_stack`, what all layers have.
        variants: From `make_stack`, what only the layers of one kind have, by kind.
        kinds: The kind of each layer, L indices into `variants`.
        body: Computes one layer from its slices of `block` and of the stack of its kind.
        x: Input of the first layer, as in `scan_stack`.
        per_layer: As in `scan_stack`.
        remat: As in `scan_stack`.
    """
    block_graph, block_stacked, block_shared = open_stack(block)
    opened = [open_stack(variant) for variant in variants]
    kinds = tuple(kinds)
    for start, size, repeats in find_patterns(kinds):
        pattern, end = kinds[start : start + size], start + size * repeats

        def layer(x: X, slices: Any, *, index: int, pattern: tuple[int, ...] = pattern) -> tuple[X, None]:
            own, of_kinds, inputs = slices
            kind = pattern[index]
            graph, _, shared = opened[kind]
            variant = variables.join(graph, _at(of_kinds[kind], pattern[:index].count(kind)), shared)
            whole = variables.join(block_graph, _at(own, index), block_shared)
            return body(whole, variant, checkpoint_name(x, INPUT), _at(inputs, index)), None

        layers = [_recomputing(partial(layer, index=index), remat) for index in range(size)]

        def step(x: X, slices: Any, layers: Sequence[Callable] = layers) -> tuple[X, None]:
            for run in layers:
                x, _ = run(x, slices)
            return x, None

        own, inputs = (_grouped(tree, start, end, repeats) for tree in (block_stacked, per_layer))
        of_kinds = {
            kind: _grouped(opened[kind][1], kinds[:start].count(kind), kinds[:end].count(kind), repeats)
            for kind in set(pattern)
        }
        x, _ = jax.lax.scan(step, x, (own, of_kinds, inputs))
    return x


def find_patterns(kinds: Sequence[int]) -> list[tuple[int, int, int]]:
    """Split a sequence into repeating patterns: their starts, lengths and numbers of repetitions.

    From the left, each pattern is the one that reaches furthest; among several, the shortest. Elements that do not repeat are
    patterns of length 1.

    Examples:
        >>> find_patterns([0, 1, 1, 1]), find_patterns([1, 0, 1, 0, 1])
        ([(0, 1, 1), (1, 1, 3)], [(0, 2, 2), (4, 1, 1)])
    """
    found, start = [], 0
    while start < len(kinds):
        rest = kinds[start:]
        repeats = {size: _repeats(rest, size) for size in range(1, max(len(rest) // 2, 1) + 1)}
        size = max((size for size in repeats if size == 1 or repeats[size] > 1), key=lambda size: size * repeats[size])
        found.append((start, size, repeats[size]))
        start += size * repeats[size]
    return found


def _repeats(kinds: Sequence[int], size: int) -> int:
    """How often the first `size` elements are repeated from the start."""
    same = (kinds[at : at + size] == kinds[:size] for at in range(0, len(kinds), size))
    return sum(1 for _ in itertools.takewhile(bool, same))


def _grouped(tree: Any, start: int, end: int, repeats: int) -> Any:
    """Layers `start` to `end` of stacked leaves in equal groups, [L, ...] -> [repeats, (end - start) / repeats, ...]."""
    return jax.tree.map(lambda leaf: leaf[start:end].reshape(repeats, -1, *leaf.shape[1:]), tree)


def _at(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _recomputing(step: Callable[[X, Any], tuple[X, Any]], remat: str) -> Callable[[X, Any], tuple[X, Any]]:
    """The step of a scan, recomputed in the backward pass as `scan_stack` says."""
    if remat == "none":
        return step
    # a scan needs no barrier against common-subexpression elimination
    return jax.checkpoint(step, prevent_cse=False, policy=_KEPT[remat])


def open_stack(block: nnx.Module) -> tuple[nnx.GraphDef, variables.FlatTree, variables.FlatTree]:
    """Return a stack's structure, its leaves with a "layers" axis, and the leaves that all layers share, by path."""
    graph, leaves = variables.flat(block)
    stacked = {path: leaf.get_value() for path, leaf in leaves.items() if variables.is_stacked(leaf)}
    return graph, stacked, {path: leaf.get_value() for path, leaf in leaves.items() if path not in stacked}
