"""The record of the base in an adapter file: fingerprints of its weights, and the formats of its quantized kernels.

Both are in the metadata of the safetensors file, as JSON objects by parameter path. A file that peft wrote has neither. The
name of the base is in adapter_config.json.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.adapters import provenance
from peftjax.adapters.registry import BaseName, parameters_before, registry_of, set_registry
from peftjax.adapters.saved_modules import replaced
from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.core.fingerprint import marks
from peftjax.core.host_arrays import OnHost
from peftjax.core.listing import enumerate_some
from peftjax.io.adapter_hub import CONFIG, is_hub
from peftjax.io.json_files import parse_json, read_json
from peftjax.quant.base import Quantized

FINGERPRINTS, FORMATS = "peftjax.base", "peftjax.formats"


def base_record(model: nnx.Module, name: str, fingerprints: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata that describes the base of adapter `name`, with its fingerprints."""
    formats = provenance.formats_of(_beneath(model, name))
    return {FINGERPRINTS: json.dumps(fingerprints), FORMATS: json.dumps(formats)}


def base_fingerprints(model: nnx.Module, name: str) -> dict[str, str]:
    """Return fingerprints of the base weights of adapter `name`, by path; quantized kernels have none.

    float32 weights and the same weights in bfloat16 have equal fingerprints.
    """
    arrays = _fingerprinted(model, name)
    found = marks({path: array for path, array in arrays.items() if not isinstance(array, OnHost)})
    for path, array in arrays.items():
        if isinstance(array, OnHost):  # one at a time on the devices
            found |= marks({path: array.back()})
    return {path: found[path] for path in arrays}


def placeholder_fingerprints(model: nnx.Module, name: str) -> dict[str, str]:
    """Return strings of the length of `base_fingerprints`; the model may be abstract."""
    return dict.fromkeys(_fingerprinted(model, name), "0" * 16)


def _fingerprinted(model: nnx.Module, name: str) -> dict[str, jax.Array | OnHost]:
    """The float32 and bfloat16 base parameters of adapter `name`."""
    return {
        path: array
        for path, array in _beneath(model, name).items()
        if not isinstance(array, Quantized) and array.dtype in (jnp.float32, jnp.bfloat16)
    }


def _beneath(model: nnx.Module, name: str) -> dict[str, Any]:
    """The base's parameters by path; where adapters are merged, those from before the merge of `name`."""
    arrays = {path: leaf.get_value() for path, leaf in variables.flat(model)[1].items() if type(leaf) is nnx.Param}
    return arrays | parameters_before(model, name)


def check_base(model: nnx.Module, name: str, path: Path, metadata: Mapping[str, str]) -> None:
    """Check that the adapter in directory `path` was trained on the model's weights.

    Raises:
        UserError: They differ.
    """
    recorded = _recorded(metadata, FINGERPRINTS, path)
    own = base_fingerprints(model, name)
    unused = replaced(model, name)  # as a new head, whose random weights depend on the seed
    differ = [leaf for leaf in recorded if leaf in own and own[leaf] != recorded[leaf] and leaf not in unused]
    if differ:
        raise UserError(
            f"{path} was trained on another base: the weights of this model differ in {enumerate_some(differ, 3)}. "
            "Load the base that the adapter was trained on, or pass any_base=True to use it on this one"
        )


def remember_formats(model: nnx.Module, name: str, path: Path, metadata: Mapping[str, str]) -> None:
    """Record the kernel formats that the adapter was trained on; warn if the model's are different."""
    recorded, own = _recorded(metadata, FORMATS, path), provenance.formats(model)
    set_registry(model, registry_of(model).with_formats(name, recorded))
    if FORMATS in metadata and recorded != own:
        here, there = (", ".join(sorted(set(kinds.values()))) or "not quantized" for kinds in (own, recorded))
        warnings.warn(
            f"{path} was trained on a base whose kernels are in another format than this one's (there {there}, here "
            f"{here}), so its outputs differ; merge() measures how much the kernels differ",
            stacklevel=3,
        )


def recorded_name(directory: Path) -> BaseName | None:
    """Return what the adapter_config.json in a directory calls the base; None if it does not name it."""
    config = read_json(directory / CONFIG)
    name = config.get("model_name" if is_hub(directory) else "base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return None
    revision = config.get("revision")
    return BaseName(name, revision if isinstance(revision, str) else None)


def _recorded(metadata: Mapping[str, str], key: str, path: Path) -> dict[str, str]:
    """The strings by path that the metadata has under a key; empty if the key is missing."""
    where = f"{path}: {key} in the metadata of the weights"
    recorded = parse_json(metadata.get(key, "{}"), where)
    if not isinstance(recorded, dict) or not all(isinstance(value, str) for value in recorded.values()):
        raise UserError(f"{where} must be an object whose values are strings; save the adapter again")
    return recorded
