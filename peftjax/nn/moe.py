"""Mixture of experts: a router gives each token to a few of many feed-forward layers.

Shazeer et al. 2017 (arXiv:1701.06538), section 2. No token is dropped.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from peftjax import sharding
from peftjax.core import variables
from peftjax.nn.experts import BiasedExpertLinear, ExpertLinear, Groups, UntransposedExpertLinear, make_groups
from peftjax.nn.feedforward import GatedFeedForward, gated
from peftjax.nn.recompute import recomputed
from peftjax.nn.routing import Router, route
from peftjax.quant.base import Quantized


class Experts(nnx.Module):
    """(act(g) * u) W_down with [g; u] = x W_gate_up in each of E experts, of width F.

    Attributes:
        linear: Class of the layers.
        gate_up: Kernel [E, D, 2F].
        down: Kernel [E, F, D].
    """

    linear: ClassVar[type[ExpertLinear]] = ExpertLinear

    def __init__(
        self,
        experts: int,
        features: int,
        hidden: int,
        *,
        activation: Callable[[jax.Array], jax.Array],
        stddev: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.activation = activation
        common: dict[str, Any] = {"stddev": stddev, "dtype": dtype, "rngs": rngs}
        self.gate_up = self.linear(experts, features, 2 * hidden, axes=("embed", "mlp"), **common)
        self.down = self.linear(experts, hidden, features, axes=("mlp", "embed"), **common)

    def __call__(self, x: jax.Array, weights: jax.Array, chosen: jax.Array) -> jax.Array:
        """Sum the outputs of each token's experts, weighted: [B, T, D], [B, T, K], int [B, T, K] -> [B, T, D].

        If a mesh shards the experts, each device applies its experts to its own tokens, and the results are summed.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return self._local(x, weights, chosen, first=0).astype(x.dtype)
        graph, leaves = variables.flat(self)
        values = {path: leaf.get_value() for path, leaf in leaves.items()}
        held = {path: _held(values[path], leaf.axes) for path, leaf in leaves.items()}
        split = sharding.on_current_mesh(("expert",), (self.gate_up.experts,))[0]
        tokens = sharding.on_current_mesh(("batch", "length"), x.shape[:2])
        shards = tuple(jax.tree.leaves((*tokens, split)))
        dropout = [path for path, leaf in leaves.items() if isinstance(leaf, variables.DropoutKey)]

        def compute(values: variables.FlatTree, x: jax.Array, weights: jax.Array, chosen: jax.Array) -> jax.Array:
            keys = {path: _key_of_shard(values[path], shards) for path in dropout}
            own: Experts = variables.join(graph, values | keys)
            if not split:
                return own._local(x, weights, chosen, first=0).astype(x.dtype)
            here = self.gate_up.experts // sharding.shard_count("expert", self.gate_up.experts)
            part = own._local(x, weights, chosen, first=jax.lax.axis_index(split) * here)
            return jax.lax.psum(part, split).astype(x.dtype)

        mapped = jax.shard_map(compute, in_specs=(held, tokens, tokens, tokens), out_specs=tokens, check_vma=False)
        return mapped(values, x, weights, chosen)

    def _local(self, x: jax.Array, weights: jax.Array, chosen: jax.Array, first: jax.Array | int) -> jax.Array:
        """The sum over the experts whose kernels are here, the first of which is number `first`, in float32."""
        flat = lambda array: array.reshape(-1, array.shape[-1])  # noqa: E731
        kernel = self.gate_up.kernel.get_value()
        groups = make_groups(flat(chosen), self.gate_up.experts, kernel.shape[0], first)
        rows, weights = self.weighted_rows(flat(x), flat(weights), groups)
        y = self.down(self.hidden(self.gate_up(rows, groups)), groups)
        return groups.combine(y, weights).reshape(x.shape)

    def weighted_rows(self, x: jax.Array, weights: jax.Array, groups: Groups) -> tuple[jax.Array, jax.Array]:
        """Return the inputs of the experts, [n, rows, D], and the weights of their outputs, [N, K]; x is [N, D]."""
        return groups.spread(x), weights

    def hidden(self, gate_up: jax.Array) -> jax.Array:
        """Apply the gated activation: [..., 2F] -> [..., F]."""
        gate, up = jnp.split(gate_up, 2, axis=-1)
        return gated(self.activation, gate, up)


class InputWeightedExperts(Experts):
    """f(w x) with the weight w of a choice, in place of w f(x): the experts of Llama 4."""

    linear: ClassVar = UntransposedExpertLinear

    def weighted_rows(self, x: jax.Array, weights: jax.Array, groups: Groups) -> tuple[jax.Array, jax.Array]:
        return groups.spread(x) * groups.spread_weights(weights).astype(x.dtype), jnp.ones_like(weights)


class ClampedExperts(Experts):
    """((u + 1) g sigmoid(alpha g)) W_down + b_down, with g <= limit and |u| <= limit: the experts of gpt-oss.

    The columns of g and u alternate: [g_0, u_0, g_1, ...] = x W_gate_up + b_gate_up.

    Args:
        alpha: Factor in the sigmoid.
        limit: Bound of g and u.
        **options: The arguments of `Experts`.
    """

    linear: ClassVar = BiasedExpertLinear

    def __init__(self, *sizes: int, alpha: float, limit: float, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.alpha, self.limit = alpha, limit

    def hidden(self, gate_up: jax.Array) -> jax.Array:
        return clamped_swiglu(gate_up, self.alpha, self.limit)


@recomputed
def clamped_swiglu(gate_up: jax.Array, alpha: float, limit: float) -> jax.Array:
    """(u + 1) g sigmoid(alpha g) of alternating columns g and u, clamped, in float32: [..., 2F] -> [..., F]."""
    wide = gate_up.astype(jnp.float32)
    gate, up = jnp.minimum(wide[..., ::2], limit), jnp.clip(wide[..., 1::2], -limit, limit)
    return ((up + 1) * gate * jax.nn.sigmoid(alpha * gate)).astype(gate_up.dtype)


def _held(value: jax.Array | Quantized, axes: tuple[str | None, ...]) -> PartitionSpec:
    """The part of a layer's variable that a device needs: everything except the experts of other devices."""
    kept = tuple(axis if axis == "expert" else None for axis in axes if axis != "layers")
    leaves, structure = jax.tree.flatten(value)
    of_leaves = value.axes(kept) if isinstance(value, Quantized) else [kept]
    specs = [sharding.on_current_mesh(own, leaf.shape) for own, leaf in zip(of_leaves, leaves, strict=True)]
    return jax.tree.unflatten(structure, specs)


def _key_of_shard(key: jax.Array, shards: tuple[str, ...]) -> jax.Array:
    """A separate dropout key, uint32 [2], for each shard of the tokens and experts; with one key all masks would be equal."""
    if not shards:
        return key
    own = jax.random.fold_in(jax.random.wrap_key_data(key), jax.lax.axis_index(shards))
    return jax.random.key_data(own)


class MixtureOfExperts(nnx.Module):
    """sum_k w_k f_k(x) over the experts that the router chooses, plus the shared expert: [B, T, D] -> [B, T, D].

    Attributes:
        router: [D, E].
        experts: The routed experts, f.
        shared: A feed-forward layer for all tokens, or None.
        shared_gate: [D, 1], or None; the sigmoid of its output multiplies the output of `shared`.

    Args:
        experts: Number of experts.
        choices: Number of experts per token.
        normalized: Whether the weights of a token's experts sum to 1.
        features: Width of input and output, D.
        hidden: Hidden width of an expert, F.
        shared: Hidden width of the shared expert; 0: there is none.
        shared_gated: Whether the shared expert has a gate.
        sigmoid: Whether the weights are sigmoids of the router's logits, not a softmax.
        router_bias: Whether the router has a bias.
        make_experts: Class or function that builds the experts.
        activation: One of `ACTIVATIONS`.
        stddev: Standard deviation of random kernels.
        dtype: Dtype of the parameters.
        rngs: Source of random weights.
    """

    def __init__(
        self,
        experts: int,
        choices: int,
        normalized: bool,
        features: int,
        hidden: int,
        *,
        shared: int = 0,
        shared_gated: bool = True,
        sigmoid: bool = False,
        router_bias: bool = False,
        make_experts: Callable[..., Experts] = Experts,
        activation: Callable[[jax.Array], jax.Array],
        stddev: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.choices, self.normalized, self.sigmoid = choices, normalized, sigmoid
        common: dict[str, Any] = {"stddev": stddev, "dtype": dtype, "rngs": rngs}
        self.router = Router(features, experts, axes=("embed", "expert"), use_bias=router_bias, **common)
        self.experts = make_experts(experts, features, hidden, activation=activation, **common)
        self.shared: Any = nnx.data(None)
        self.shared_gate: Any = nnx.data(None)
        if shared:
            self.shared = nnx.data(GatedFeedForward(features, shared, activation=activation, **common))
            if shared_gated:
                self.shared_gate = nnx.data(Router(features, 1, axes=("embed", "expert"), **common))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.with_logits(x)[0]

    def with_logits(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return also the logits of the router, [B, T, E]."""
        logits = self.router(x)
        weights, chosen = route(logits, self.choices, sigmoid=self.sigmoid, normalized=self.normalized)
        y = self.experts(x, weights, chosen)
        if self.shared is not None:
            y = y + (1 if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x))) * self.shared(x)
        return y, logits
