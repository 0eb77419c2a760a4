"""Ranks that differ by layer: the options, and adapters whose leaves are padded to the largest rank of a stack."""

import dataclasses
from typing import Any, ClassVar

import numpy as np
from flax import nnx

from peftjax.adapters.adapter import DeltaAdapter, HfLeaf, LayerMask
from peftjax.adapters.options import pattern, positive, positive_integer
from peftjax.adapters.selection import Chosen, by_name, check_rank, check_table
from peftjax.adapters.sites import Site
from peftjax.adapters.targeted import Targeted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranked(Targeted):
    """Options of methods that scale an update of low rank by alpha / rank.

    Attributes:
        rank (int, default 8): Rank of the update.
        alpha (float, default 8.0): The update is multiplied by alpha / rank.
        rank_pattern (mapping, default none): Ranks of some modules, by name: {"layers.0.self_attn.q_proj": 4}.
        alpha_pattern (mapping, default none): Values of alpha of some modules, by name.
    """

    rank: int = 8
    alpha: float = 8.0
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    tables: ClassVar = ("rank_pattern", "alpha_pattern")
    traced_options: ClassVar[frozenset[str]] = Targeted.traced_options | {"rank", "rank_pattern", "alpha_pattern"}
    hf_fields: ClassVar[dict[str, tuple[str, Any]]] = Targeted.hf_fields | {
        "rank": ("r", 8),
        "rank_pattern": ("rank_pattern", {}),
        "alpha_pattern": ("alpha_pattern", {}),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self._replace(
            rank_pattern=pattern("rank_pattern", self.rank_pattern),
            alpha_pattern=pattern("alpha_pattern", self.alpha_pattern),
        )
        for rank in self.all_ranks:
            positive_integer(rank=rank)
        for alpha in (self.alpha, *dict(self.alpha_pattern).values()):
            positive(alpha=alpha)

    @property
    def all_ranks(self) -> tuple[int, ...]:
        """The default rank and the ranks of the pattern."""
        return (self.rank, *dict(self.rank_pattern).values())

    def check(self, model: nnx.Module) -> None:
        for site, mask in self.chosen(model):
            check_rank(int(self.ranks(site, mask).max()), site)

    def chosen(self, model: nnx.Module) -> Chosen:
        chosen = super().chosen(model)
        check_table("rank_pattern", self.rank_pattern, chosen)
        check_table("alpha_pattern", self.alpha_pattern, chosen)
        return chosen

    def ranks(self, site: Site, mask: np.ndarray) -> np.ndarray:
        """The rank of each layer of a site, int [layers]; 0 in a layer that is left out."""
        return np.where(mask, by_name(site, self.rank_pattern, self.rank), 0)

    def alphas(self, site: Site) -> np.ndarray:
        """The alpha of each layer of a site, [layers]."""
        return by_name(site, self.alpha_pattern, self.alpha)


class RankedAdapter(DeltaAdapter):
    """A delta adapter whose leaves have an axis "rank", padded to the largest rank of the stack.

    Attributes:
        ranks: The rank of each layer; 0 or None in a layer without the adapter.
    """

    zero_is_identity: ClassVar = True
    ranks: tuple[int | None, ...]

    def set_ranks(self, ranks: np.ndarray) -> None:
        """Set the ranks, and the layers with the adapter: those whose rank is not 0."""
        self.ranks, self.layers = tuple(int(rank) for rank in ranks), LayerMask(ranks > 0)

    def forget_layers(self) -> None:
        super().forget_layers()
        self.ranks = (1,) * len(self.ranks)

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        rank = self.ranks[layer or 0]
        return {key: self.unpadded(leaf, rank) for key, leaf in self.names.items()} if rank else {}

    def unpadded(self, leaf: HfLeaf, rank: int | None) -> HfLeaf:
        """The first `rank` entries of a leaf along its axis "rank"."""
        axes = [axis for axis in getattr(self, leaf.leaf).axes if axis != "layers"]
        return dataclasses.replace(leaf, window=tuple(slice(rank if axis == "rank" else None) for axis in axes))


def within(ranks: np.ndarray, stack: tuple[int, ...]) -> np.ndarray:
    """1 for the entries within each rank and 0 for the padding, float32 [*stack, R]."""
    return (np.arange(ranks.max()) < ranks[..., None]).astype(np.float32).reshape(*stack, ranks.max())
