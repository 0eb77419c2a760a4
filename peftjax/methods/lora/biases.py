"""The biases that LoRA trains beside A and B: those of its targets, or all of the model."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, LayerMask, Override
from peftjax.adapters.selection import Chosen
from peftjax.adapters.sites import adapters_named, insert, sites
from peftjax.core.errors import UserError
from peftjax.core.variables import PeftParam
from peftjax.nn.experts import ExpertLinear


def train_biases(model: nnx.Module, name: str, which: str, chosen: Chosen) -> None:
    """Train copies of biases: of the layers `chosen` for a LoRA ("lora_only"), or of all layers ("all").

    Raises:
        UserError: There is no such bias, or one adapter would have to train both full layers and single biases in one stack.
    """
    targeted = {site.path: mask for site, mask in chosen}
    there = {site.path: adapter for site, adapter in adapters_named(model, name)}
    found = [site for site in sites(model) if "bias" in site.parameters and (which == "all" or site.path in targeted)]
    if not found:
        raise UserError(f"method.bias={which!r}: no layer that it applies to has a bias; set it to 'none'")
    if experts := [site.names[0] for site in found if isinstance(site.module, ExpertLinear)]:
        raise UserError(f"method.bias={which!r} is not supported for experts, such as {experts[0]}; set it to 'none'")
    for site in found:
        mask = np.ones(len(site.names), bool) if which == "all" else targeted[site.path]
        bias = site.parameters["bias"]
        copy = jnp.array(bias.get_value(), jnp.float32)
        if site.path in targeted:
            there[site.path].train_bias(PeftParam(copy, axes=bias.axes), LayerMask(mask))
        elif site.path not in there:
            insert(site, name, Override({"bias": copy}, {"bias": bias.axes}, {"bias": HfLeaf("bias")}, mask))
        elif not all(there[site.path].layers.chosen):
            last = site.names[0].rsplit(".", 1)[-1]
            raise UserError(
                f"method.bias='all' needs all layers of {last} in modules_to_save or none: one adapter cannot train "
                "some layers of a stack in full and only the bias of the others"
            )
