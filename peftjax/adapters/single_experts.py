"""Adapters of experts whose files hold a module for each layer of each expert, such as `experts.7.gate_proj`."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, LayerMask, MethodAdapter
from peftjax.adapters.sites import Site
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.nn.experts import ExpertLinear


class ExpertMask(LayerMask):
    """The layers of single experts that an adapter is in: bool [layers, E, parts]."""

    axes: ClassVar = ("layers", "expert", "part")

    def __init__(self, site: Site, chosen: np.ndarray) -> None:
        self.chosen = tuple(bool(layer.any()) for layer in chosen)
        self.shape, self.singles = chosen.shape, chosen.tobytes()  # not tuples, which would take long to compare
        mask = None if chosen.all() else jnp.asarray(chosen.reshape(*site.stack, *chosen.shape[1:]))
        self.mask = nnx.data(None if mask is None else PeftConstant(mask, axes=site.lead("expert", "part")))

    @property
    def array(self) -> np.ndarray:
        array: np.ndarray = np.frombuffer(self.singles, bool).reshape(self.shape)
        return array

    def forget(self) -> None:
        super().forget()
        self.singles = b""


def layer_mask(site: Site, chosen: np.ndarray) -> LayerMask:
    """Make the mask of a site's layers, bool [layers], or of its layers of single experts, bool [layers, E, parts]."""
    return ExpertMask(site, chosen) if isinstance(site.module, ExpertLinear) else LayerMask(chosen)


def vectors(site: Site, size: int, axis: str, value: float) -> PeftParam:
    """Make one trained vector for each layer, [*stack, size], or each layer of single experts, [*stack, E, parts, size]."""
    own = {"expert": site.module.experts, "part": len(site.parts)} if isinstance(site.module, ExpertLinear) else {}
    values = jnp.full((*site.stack, *own.values(), size), value, jnp.float32)
    return PeftParam(values, axes=site.lead(*own, axis))


class SingleExperts(MethodAdapter):
    """An adapter with separate values for each layer of each expert, [*stack, E, parts, ...].

    Attributes:
        parts: The layers of an expert that its kernel consists of, by name.
    """

    parts: tuple[str, ...]

    def leaves_in(self, mask: ExpertMask, layer: int | None, leaves: Mapping[str, HfLeaf]) -> dict[str, HfLeaf]:
        """The tensors of one layer of the stack, "7.gate_proj.ia3_l", from one expert's tensors in it, "ia3_l"."""
        return {
            f"{expert}.{self.parts[part]}.{suffix}": dataclasses.replace(
                leaf, window=(slice(expert, expert + 1), slice(part, part + 1))
            )
            for expert, part in np.argwhere(mask.array[layer or 0]).tolist()
            for suffix, leaf in leaves.items()
        }
