"""LN tuning: y = normalize(x) * s, where the scales s (and shifts) of the norms are all that is trained.

Zhao et al. 2023 (arXiv:2312.11420), section 3. s starts at the base's scale.
"""

import dataclasses
from typing import ClassVar

import numpy as np
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, Override
from peftjax.adapters.sites import Site
from peftjax.adapters.targeted import Targeted
from peftjax.nn.norm import LayerNorm, RMSNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class LnTuning(Targeted):
    """Options of LN tuning.

    Attributes:
        targets (str or tuple, default "all-norms"): The norms to train.
    """

    targets: str | tuple[str, ...] = "all-norms"

    method: ClassVar[str] = "ln_tuning"
    peft_type: ClassVar[str] = "LN_TUNING"
    fits: ClassVar = (RMSNorm, LayerNorm)
    every: ClassVar[str] = "all-norms"
    hf_fields: ClassVar = {key: Targeted.hf_fields[key] for key in ("targets", "exclude", "modules_to_save")}
    hf_ignored: ClassVar = frozenset()

    def in_every(self, site: Site, model: nnx.Module) -> bool:
        del site, model
        return True

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> Override:
        del rngs
        own, names = site.parameters, site.module.hf_leaves
        return Override(own, {f"ln_tuning_layers.{names[leaf][0]}": HfLeaf(leaf) for leaf in own}, mask)
