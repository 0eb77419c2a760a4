"""Adapter files with only a LoRA or the biases of the task head, which is trained in full here.

The rest of the head comes from the base.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import nnx

from peftjax.adapters.method import Method
from peftjax.adapters.sites import Site, head_sites
from peftjax.core.errors import UserError
from peftjax.io.adapter_copies import base_value
from peftjax.io.adapter_keys import bare_key
from peftjax.io.adapter_tensors import PREFIX

OF_WHOLE_MODULES = ("weight", "bias", "modules_to_save", "original_module")  # after the name of a module in a key


def with_whole_head(
    method: Method, tensors: Mapping[str, np.ndarray], model: nnx.Module, path: Path
) -> tuple[dict[str, np.ndarray], bool]:
    """Return the tensors with the whole task head in place of a LoRA of it, or of its biases that `bias="all"` trains.

    Returns:
        The tensors, and whether anything was replaced.

    Raises:
        UserError: The file in `path` holds an adapter of the head that is more than a LoRA.
    """
    found, replaced = dict(tensors), False
    for site in head_sites(model):
        module = bare_key(site.names[0])
        keys = {
            bare_key(key).removeprefix(f"{module}."): key for key in tensors if bare_key(key).startswith(f"{module}.")
        }
        update = method.weight_update(site, {suffix: tensors[key] for suffix, key in keys.items()})
        others = [key for name, key in keys.items() if name.partition(".")[0] not in OF_WHOLE_MODULES]
        if others and update is None:
            raise UserError(
                f"{path} has an adapter of the task head ({module}), which is trained in full here: {others[0]} is not "
                "supported; load the adapter with peft, call merge_and_unload and save_pretrained, and load that model"
            )
        if update is None and (set(keys) != {"bias"} or getattr(method, "bias", "none") != "all"):
            continue
        whole = _parameters(model, site)
        if update is not None:
            whole["weight"] += update
        if bias := keys.get("bias") or keys.get("base_layer.bias"):
            whole["bias"] = tensors[bias]
        found = {key: value for key, value in found.items() if key not in keys.values()}
        found |= {f"{PREFIX}{site.names[0]}.{suffix}": value for suffix, value in whole.items()}
        replaced = True
    return (_with_rest(found, model) if replaced else found), replaced


def _with_rest(tensors: Mapping[str, np.ndarray], model: nnx.Module) -> dict[str, np.ndarray]:
    """The tensors, with the base's for the layers of the head that the file leaves out."""
    bare: list[str] = [bare_key(key) for key in tensors]
    found = dict(tensors)
    for site in head_sites(model):
        if not any(key.startswith(f"{bare_key(site.names[0])}.") for key in bare):
            found |= {f"{PREFIX}{site.names[0]}.{suffix}": value for suffix, value in _parameters(model, site).items()}
    return found


def _parameters(model: nnx.Module, site: Site) -> dict[str, np.ndarray]:
    """The base's own parameters of a layer that is not stacked, float32, by their names in files."""
    leaves = {suffix: leaf for leaf, (suffix, _) in site.module.hf_leaves.items() if leaf in site.parameters}
    return {suffix: np.array(base_value(model, site, leaf, None), np.float32) for suffix, leaf in leaves.items()}
