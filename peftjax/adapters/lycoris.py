"""What LoHa and LoKr have in common: their options, and what they drop in training."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.method import positive
from peftjax.adapters.sites import Chosen, Site, by_name, check_table
from peftjax.adapters.targeted import Targeted
from peftjax.nn.dropout import Dropout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lycoris(Targeted):
    """Options beside those of `Targeted`.

    rank, alpha: the update is scaled by alpha / rank. rank_pattern, alpha_pattern: exceptions by module name.
    rank_dropout: the probability with which, in training, one output of the update is dropped in a whole batch.
    module_dropout: the probability with which the whole update of a layer is.
    """

    rank: int = 8
    alpha: float = 8.0
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    rank_dropout: float = 0.0
    module_dropout: float = 0.0

    hf_fields: ClassVar = Targeted.hf_fields | {
        "rank": ("r", 8),
        "alpha": ("alpha", 8),
        "rank_pattern": ("rank_pattern", None),
        "alpha_pattern": ("alpha_pattern", None),
        "rank_dropout": ("rank_dropout", 0.0),
        "module_dropout": ("module_dropout", 0.0),
    }
    hf_constants: ClassVar = {"init_weights": True, "use_effective_conv2d": False}
    hf_ignored: ClassVar = Targeted.hf_ignored | {"use_effective_conv2d"}  # convolutions'
    hf_training: ClassVar = {"init_weights": True}

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, field)
            items = value.items() if isinstance(value, Mapping) else value
            object.__setattr__(self, field, tuple((str(key), number) for key, number in items))
        for rank in (self.rank, *dict(self.rank_pattern).values()):
            if not isinstance(rank, int) or rank < 1:
                raise ValueError(f"method.rank must be a whole number of at least 1, it is {rank!r}")
        for alpha in (self.alpha, *dict(self.alpha_pattern).values()):
            positive(alpha=alpha)
        for field in ("rank_dropout", "module_dropout"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise ValueError(f"method.{field} must be at least 0 and below 1, it is {getattr(self, field)!r}")

    def chosen(self, model: nnx.Module) -> Chosen:
        chosen = super().chosen(model)
        check_table("rank_pattern", self.rank_pattern, chosen)
        check_table("alpha_pattern", self.alpha_pattern, chosen)
        return chosen

    def ranks_and_scales(self, site: Site, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each layer of a site its rank and alpha / rank; both 0 in a layer that is left out."""
        ranks = by_name(site, self.rank_pattern, self.rank)
        scales = by_name(site, self.alpha_pattern, self.alpha) / ranks
        return np.where(mask, ranks, 0), np.where(mask, scales, 0.0)

    def to_hf(self, model: nnx.Module, name: str) -> dict[str, Any]:
        patterns = {"rank_pattern": dict(self.rank_pattern), "alpha_pattern": dict(self.alpha_pattern)}
        return super().to_hf(model, name) | patterns


class UpdateDropout(nnx.Module):
    """An update [..., out] without some of its outputs, the same ones in the whole batch, or all zero; in training.

    rescale: divide by the share of the outputs that are kept.
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
    """1 where the dropout keeps and 0 where it drops, float32 [size]."""
    return (dropout(jnp.ones(size, jnp.float32)) > 0).astype(jnp.float32)
