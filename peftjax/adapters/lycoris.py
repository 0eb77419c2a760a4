"""What LoHa and LoKr share: options, dropout of the update, and initial factors."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.ranks import Ranked
from peftjax.adapters.sites import Site
from peftjax.nn.dropout import Dropout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lycoris(Ranked):
    """Dropout options of the LyCORIS methods.

    Attributes:
        rank_dropout (float, default 0.0): Probability, in training, of dropping an output of the update, for the whole
            batch.
        module_dropout (float, default 0.0): Probability, in training, of dropping the whole update of a layer.
    """

    rank_dropout: float = 0.0
    module_dropout: float = 0.0

    hf_fields: ClassVar = Ranked.hf_fields | {
        "alpha": ("alpha", 8),
        "rank_dropout": ("rank_dropout", 0.0),
        "module_dropout": ("module_dropout", 0.0),
    }
    hf_constants: ClassVar = {"init_weights": True, "use_effective_conv2d": False}
    hf_ignored: ClassVar = Ranked.hf_ignored | {"use_effective_conv2d"}  # for convolutions
    hf_training: ClassVar = {"init_weights": True}

    def scales(self, site: Site, ranks: np.ndarray) -> jax.Array:
        """alpha / rank of each layer, float32 [*stack]; 0 in a layer that is left out."""
        scales = np.where(ranks, self.alphas(site) / np.maximum(ranks, 1), 0.0)
        return jnp.asarray(scales, jnp.float32).reshape(site.stack)

    def update_dropout(self, site: Site, *, rescale: bool) -> "UpdateDropout":
        """The dropout of a site's update."""
        return UpdateDropout(self.rank_dropout, self.module_dropout, rescale=rescale, stack=site.stack)


class UpdateDropout(nnx.Module):
    """Drop outputs of an update [..., out], the same ones in the whole batch, or all of it; in training only.

    Attributes:
        rescale: Whether to divide by the share of the outputs that are kept.
    """

    def __init__(self, outputs: float, whole: float, *, rescale: bool, stack: tuple[int, ...]) -> None:
        self.outputs, self.whole, self.rescale = Dropout(outputs, stack), Dropout(whole, stack), rescale

    def __call__(self, update: jax.Array) -> jax.Array:
        if self.outputs.rate:
            kept = _kept(self.outputs, update.shape[-1])
            if self.rescale:
                kept = kept / jnp.maximum(kept.mean(), 1 / kept.size)
            update = update * jnp.broadcast_to(kept.astype(update.dtype), update.shape)
        if self.whole.rate:
            update = update * _kept(self.whole, 1).astype(update.dtype)[0]
        return update


def _kept(dropout: Dropout, size: int) -> jax.Array:
    """1 for the entries that the dropout keeps and 0 for those it drops, float32 [size]."""
    return (dropout(jnp.ones(size, jnp.float32)) > 0).astype(jnp.float32)


def kaiming(site: Site, rows: int, columns: int, bound: float | jax.Array, rngs: nnx.Rngs) -> jax.Array:
    """Uniform within +-bound, [*stack, rows, columns]; peft's Kaiming uniform with a = sqrt(5), whose bound is 1 over the
    root of the number of columns of the matrix in torch's orientation."""
    return jax.random.uniform(rngs.params(), (*site.stack, rows, columns), jnp.float32, -1, 1) * bound


def inverse_root(ranks: np.ndarray, stack: tuple[int, ...]) -> jax.Array:
    """1 / sqrt(rank) of each layer, float32 [*stack, 1, 1]."""
    return jnp.asarray(np.maximum(ranks, 1) ** -0.5, jnp.float32).reshape(*stack, 1, 1)
