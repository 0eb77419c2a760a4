"""Linear layers of experts, and the order of their rows: sorted by expert, in blocks of one expert each."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from peftjax.nn.layer import HfLeaves, SlottedLayer
from peftjax.nn.linear import OUTPUT
from peftjax.nn.slot import Slot
from peftjax.quant.grouped import grouped_matmul

SMALLEST, LARGEST = 8, 512  # rows of a block


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """N tokens with K experts each, in n blocks of rows that belong to one expert each. No token is dropped.

    An expert's last block is filled up with zeros. There are enough blocks for any routing; the last ones may be unused.

    Attributes:
        owner: int [n], the expert of each block.
        used: int [], the number of blocks in use.
        source: int [n * rows], the token in each row; N where the row is empty.
        position: int [N, K], the row of each token and choice; n * rows for an expert on another device.
        rows: Rows of a block.
    """

    owner: jax.Array
    used: jax.Array
    source: jax.Array
    position: jax.Array
    rows: int = dataclasses.field(metadata={"static": True})

    def spread(self, x: jax.Array) -> jax.Array:
        """Copy tokens [N, D] to their rows: [n, rows, D]."""
        taken = jnp.take(x, self.source, axis=0, mode="fill", fill_value=0)
        return taken.reshape(len(self.owner), self.rows, -1)

    def spread_weights(self, weights: jax.Array) -> jax.Array:
        """Copy the weights [N, K] of tokens and choices to their rows: [n, rows, 1], 0 where the row is empty."""
        rows = jnp.zeros(len(self.source), weights.dtype)
        return rows.at[self.position].set(weights, mode="drop").reshape(len(self.owner), self.rows, 1)

    def combine(self, y: jax.Array, weights: jax.Array) -> jax.Array:
        """Sum the rows [n, rows, D] of each token, multiplied by weights [N, K]: float32 [N, D]."""
        taken = jnp.take(y.reshape(-1, y.shape[-1]), self.position, axis=0, mode="fill", fill_value=0)  # [N, K, D]
        return jnp.einsum("nkd,nk->nd", taken, weights, preferred_element_type=jnp.float32)


def make_groups(chosen: jax.Array, experts: int, here: int, first: jax.Array | int = 0) -> Groups:
    """Sort tokens by expert.

    Args:
        chosen: int [N, K], the experts of each token.
        experts: Number of experts.
        here: Number of experts on this device.
        first: The first of them.
    """
    tokens, choices = chosen.shape
    pairs = tokens * choices
    rows, most = block_sizes(pairs, experts, here)
    local = chosen.reshape(-1) - first
    expert = jnp.where((local >= 0) & (local < here), local, here)  # `here` stands for other devices
    counts = jnp.zeros(here + 1, jnp.int32).at[expert].add(1)
    blocks = -(-counts[:here] // rows)
    ends, before = jnp.cumsum(blocks), jnp.cumsum(counts) - counts
    starts = jnp.append((ends - blocks) * rows, most * rows)  # first row of each expert
    order = jnp.argsort(expert, stable=True)
    by_expert = expert[order]
    row = jnp.minimum(starts[by_expert] + jnp.arange(pairs) - before[by_expert], most * rows)
    return Groups(
        owner=jnp.minimum(jnp.searchsorted(ends, jnp.arange(most), side="right"), here - 1).astype(jnp.int32),
        used=ends[-1],
        source=jnp.full(most * rows, tokens).at[row].set(order // choices, mode="drop"),
        position=jnp.zeros(pairs, row.dtype).at[order].set(row).reshape(chosen.shape),
        rows=rows,
    )


def block_sizes(pairs: int, experts: int, here: int) -> tuple[int, int]:
    """Return the number of rows of a block, and how many blocks suffice for any routing.

    Args:
        pairs: Number of tokens times number of experts per token.
        experts: Number of experts.
        here: Number of experts on this device.
    """
    rows = min(max(-(-pairs // experts // 8) * 8, SMALLEST), LARGEST)  # about as many as an expert gets
    return rows, pairs // rows + here


class ExpertLinear(SlottedLayer):
    """x W_e in the rows of each expert e: [n, rows, in] -> [n, rows, out] in the dtype of x.

    Attributes:
        kernel: [E, in, out].

    Args:
        experts: Number of experts, E.
        in_features: Input width.
        out_features: Output width.
        axes: Logical axes of one kernel.
        stddev: Standard deviation of random kernels.
        dtype: Dtype of the parameters.
        rngs: Source of random weights.
    """

    # In checkpoints this is not a module, but a parameter of the module of all experts.
    hf_leaves: ClassVar[HfLeaves] = {"kernel": ("", (0, 2, 1))}

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str, str],
        stddev: float = 0.02,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.experts, self.in_features, self.out_features, self.axes = experts, in_features, out_features, axes
        value = stddev * jax.random.normal(rngs.params(), (experts, in_features, out_features), jnp.float32)
        self.kernel = nnx.Param(value.astype(dtype), axes=("expert", *axes))
        self.adapters = Slot()

    def __call__(self, x: jax.Array, groups: Groups) -> jax.Array:
        return checkpoint_name(self.adapters(self, self.dense, x, groups), OUTPUT)

    def dense(self, x: jax.Array, groups: Groups, kernel: jax.Array | None = None) -> jax.Array:
        """The base computation; `kernel` replaces the layer's own."""
        return grouped_matmul(x, self.kernel.get_value() if kernel is None else kernel, groups.owner, groups.used)


class UntransposedExpertLinear(ExpertLinear):
    """An ExpertLinear whose kernels are [E, in, out] in checkpoints. peft treats them as [E, out, in]."""

    hf_leaves: ClassVar[HfLeaves] = {"kernel": ("", None)}


class BiasedExpertLinear(ExpertLinear):
    """x W_e + b_e in the rows of each expert e. Checkpoints store the kernels as [E, in, out].

    Attributes:
        bias: [E, out].
    """

    hf_leaves: ClassVar[HfLeaves] = {"kernel": ("", None), "bias": ("_bias", None)}

    def __init__(self, experts: int, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(experts, in_features, out_features, **options)
        self.bias = nnx.Param(jnp.zeros((experts, out_features), options["dtype"]), axes=("expert", self.axes[1]))

    def dense(self, x: jax.Array, groups: Groups, kernel: jax.Array | None = None) -> jax.Array:
        y = super().dense(x, groups, kernel)
        bias = self.bias.get_value()[groups.owner]  # [n, out]
        return y + jnp.broadcast_to(bias[:, None].astype(y.dtype), y.shape)
