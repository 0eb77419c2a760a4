"""BitFit: y = x W + b + d, where d, zero at the start, is all that is trained.

Ben Zaken et al. 2021 (arXiv:2106.10199), section 3, train b itself. b + d makes the same steps, since weight decay leaves
vectors alone, and it is what peft's BEFT (arXiv:2509.15974) has in its file, which is the file of this method. peft reads
it where the biases are those of linear layers; those of norms are read here alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, LayerMask, MethodAdapter, parameter
from peftjax.adapters.sites import Chosen, Site, sites
from peftjax.adapters.targeted import Targeted
from peftjax.core.variables import PeftParam


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFit(Targeted):
    """Options of BitFit: those of `Targeted`, where the targets are layers with a bias, "all-biases" by default."""

    targets: str | tuple[str, ...] = "all-biases"

    method: ClassVar[str] = "bitfit"
    peft_type: ClassVar[str] = "BEFT"
    fits: ClassVar = (nnx.Module,)
    every: ClassVar[str] = "all-biases"
    hf_fields: ClassVar = {key: Targeted.hf_fields[key] for key in ("targets", "modules_to_save")}
    hf_ignored: ClassVar = frozenset()
    hf_training: ClassVar = {"init_weights": True}

    def in_every(self, site: Site, model: nnx.Module) -> bool:
        return "bias" in site.parameters

    def chosen(self, model: nnx.Module) -> Chosen:
        if not any("bias" in site.parameters for site in sites(model)):
            raise ValueError(f"method.targets={self.targets!r}: no layer of this model has a bias; take another method")
        chosen = super().chosen(model)
        for site, _ in chosen:
            if "bias" not in site.parameters:
                raise ValueError(f"method.targets={self.targets!r}: {site.names[0]} has no bias; leave it out")
        return chosen

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> "BiasDelta":
        del rngs
        return BiasDelta(site, mask)


class BiasDelta(MethodAdapter):
    """b + delta. delta: [*stack, out]."""

    def __init__(self, site: Site, mask: np.ndarray) -> None:
        bias = site.parameters["bias"]
        self.delta = PeftParam(jnp.zeros(bias.shape, jnp.float32), axes=bias.axes)
        self.layers = LayerMask(tuple(bool(layer) for layer in mask))

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        return compute(*inputs, **(parameters | {"bias": self._changed(parameter(owner, "bias", parameters))}))

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        return {"beft_bias": HfLeaf("delta", shape=(1, -1))} if self.layers.chosen[layer or 0] else {}

    def merged(self, **parameters: jax.Array) -> dict[str, jax.Array]:
        return {"bias": self._changed(parameters["bias"]).astype(parameters["bias"].dtype)}

    def _changed(self, bias: jax.Array) -> jax.Array:
        bias = bias.astype(jnp.float32)
        return self.layers(bias + self.delta.get_value(), bias)
