"""BitFit: y = x W + b + d, where d, zero at initialization, is all that is trained.

Ben Zaken et al. 2021 (arXiv:2106.10199), section 3, train b itself. Training d takes the same steps, since weight decay
does not apply to vectors, and it is what peft's BEFT (arXiv:2509.15974) stores, whose file format this method uses. peft
reads the file if all biases belong to linear layers; biases of norms are only read here.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, LayerMask, WeightAdapter
from peftjax.adapters.selection import Chosen
from peftjax.adapters.sites import Site, sites
from peftjax.adapters.targeted import Targeted
from peftjax.core.errors import UserError
from peftjax.core.variables import PeftParam
from peftjax.nn.experts import ExpertLinear
from peftjax.nn.routing import Router
from peftjax.nn.slot import Base


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFit(Targeted):
    """Options of BitFit.

    Attributes:
        targets (str or tuple, default "all-biases"): The layers whose bias is trained.
    """

    targets: str | tuple[str, ...] = "all-biases"

    method: ClassVar[str] = "bitfit"
    peft_type: ClassVar[str] = "BEFT"
    fits: ClassVar = (nnx.Module,)
    every: ClassVar[str] = "all-biases"
    hf_fields: ClassVar = {key: Targeted.hf_fields[key] for key in ("targets", "modules_to_save")}
    hf_ignored: ClassVar = frozenset()
    hf_training: ClassVar = {"init_weights": True}

    def in_every(self, site: Site, model: nnx.Module) -> bool:
        del model
        return "bias" in site.parameters and not isinstance(site.module, ExpertLinear | Router)

    def chosen(self, model: nnx.Module) -> Chosen:
        if not any("bias" in site.parameters for site in sites(model)):
            raise UserError(f"method.targets={self.targets!r}: no layer of this model has a bias; use another method")
        chosen = super().chosen(model)
        for site, _ in chosen:
            if "bias" not in site.parameters:
                raise UserError(f"method.targets={self.targets!r}: {site.names[0]} has no bias; leave it out")
            if isinstance(site.module, ExpertLinear):
                raise UserError(
                    f"method.targets={self.targets!r}: {site.names[0]} holds experts, whose biases BitFit does not train; "
                    "remove it from the targets"
                )
        return chosen

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> "BiasDelta":
        del rngs
        return BiasDelta(site, mask)


class BiasDelta(WeightAdapter):
    """b + delta.

    Attributes:
        delta: d, [*stack, out].
    """

    zero_is_identity: ClassVar = True
    names: ClassVar = {"beft_bias": HfLeaf("delta", shape=(1, -1))}
    kernel: ClassVar = "bias"

    def __init__(self, site: Site, mask: np.ndarray) -> None:
        bias = site.parameters["bias"]
        self.delta = PeftParam(jnp.zeros(bias.shape, jnp.float32), axes=bias.axes)
        self.layers = LayerMask(mask)

    def apply(self, base: Base, x: jax.Array) -> jax.Array:
        return base(x, bias=self.changed(base.parameter("bias").astype(jnp.float32)))  # not rounded to the bias's dtype

    def changed(self, kernel: jax.Array) -> jax.Array:
        return self.layers(kernel + self.delta.get_value(), kernel)
