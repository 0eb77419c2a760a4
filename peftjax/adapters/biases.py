"""Biases that are trained alongside the adapters: of the targets, or of the whole model."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self

import numpy as np
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, MethodAdapter, Override
from peftjax.adapters.joint import add_copies, parts
from peftjax.adapters.options import one_of
from peftjax.adapters.selection import Chosen
from peftjax.adapters.sites import Site, sites
from peftjax.adapters.targeted import Targeted
from peftjax.core.errors import UserError
from peftjax.nn.experts import ExpertLinear


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithBiases(Targeted):
    """The option to train biases.

    Attributes:
        bias (str, default "none"): Biases to train: "none", "targets" (of the target layers) or "all" (of the whole
            model).
    """

    bias: str = "none"

    hf_fields: ClassVar[dict[str, tuple[str, Any]]] = Targeted.hf_fields | {"bias": ("bias", "none")}

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(("none", "all", "targets"), bias=self.bias)

    def attach(self, model: nnx.Module, name: str, rngs: nnx.Rngs) -> None:
        super().attach(model, name, rngs)
        train_biases(model, name, self.bias, self.chosen(model))

    def to_hf(self, model: nnx.Module, name: str) -> dict[str, Any]:
        config = super().to_hf(model, name)
        return config | {"bias": f"{self.method}_only"} if self.bias == "targets" else config

    def without_effect(self, model: nnx.Module, has_tensors: Callable[[str], bool]) -> dict[str, Any]:
        idle = self.bias != "none" and not biased_sites(model, self.bias, self.chosen(model))
        return {"bias": "none"} if idle else {}

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        bias = config.get("bias")
        of_targets = isinstance(bias, str) and bias.endswith("_only")  # peft accepts any prefix
        return super().from_hf(config | {"bias": "targets"} if of_targets else config)


def train_biases(model: nnx.Module, name: str, which: str, chosen: Chosen) -> None:
    """Train biases as part of adapter `name`, except in layers that it trains in full.

    Args:
        model: The model.
        name: The attached adapter.
        which: "none", "all", or any other word for the biases of `chosen`.
        chosen: The targets.

    Raises:
        UserError: There is no such bias, or it is one of experts.
    """
    if which == "none":
        return
    targeted = {site.path: mask for site, mask in chosen}
    found = biased_sites(model, which, chosen)
    if not found:
        raise UserError(f"method.bias={which!r}: no layer that it applies to has a bias; set it to 'none'")
    if experts := [site.names[0] for site in found if isinstance(site.module, ExpertLinear)]:
        raise UserError(f"method.bias={which!r} is not supported for experts, such as {experts[0]}; set it to 'none'")
    for site in found:
        slot = site.module.adapters
        others = parts(slot.adapter(name)) if name in slot.names() else []
        mask = np.ones(len(site.names), bool) if which == "all" else targeted[site.path]
        for part in others:
            mask = mask & ~part.layers.array if isinstance(part, Override) else mask
        if mask.any():
            bias = TrainedBias(site, mask, others)
            if not (others and others[0].hold_bias(vars(bias)["bias"], bias.layers)):
                add_copies(site, name, bias)


def biased_sites(model: nnx.Module, which: str, chosen: Chosen) -> list[Site]:
    """The layers whose biases `train_biases` trains with these arguments, unless `which` is "none"."""
    targeted = {site.path for site, _ in chosen}
    return [site for site in sites(model) if "bias" in site.parameters and (which == "all" or site.path in targeted)]


class TrainedBias(Override):
    """A trained copy of a bias.

    Attributes:
        wrapped: The layers that also have an adapter of the method: peft calls their bias `base_layer.bias`.
    """

    def __init__(self, site: Site, mask: np.ndarray, others: Iterable[MethodAdapter]) -> None:
        super().__init__({"bias": site.parameters["bias"]}, {"bias": HfLeaf("bias")}, mask)
        adapters = [adapter for adapter in others if not isinstance(adapter, Override)]
        self.wrapped = tuple(layer for layer in site.layers if any(adapter.hf_leaves(layer) for adapter in adapters))

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        leaves = super().hf_leaves(layer)
        return {f"base_layer.{key}": leaf for key, leaf in leaves.items()} if layer in self.wrapped else leaves
