"""Adapter directories in the format of AdapterHub's library `adapters` 1.3: adapter_config.json, adapter.safetensors.

A key contains the adapter's name: model.layers.0.output_adapters.adapters.NAME.adapter_up.weight.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flax import nnx

from peftjax.adapters.sites import sites
from peftjax.core.errors import UserError
from peftjax.io.json_files import read_json
from peftjax.io.safetensors_files import read_file
from peftjax.methods.bottleneck import Bottleneck, from_hub
from peftjax.models.base import Model
from peftjax.models.encoder import Encoder
from peftjax.nn.residual import NormedResidual

T = TypeVar("T")

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
HEAD = "model_head.safetensors"  # the task head, which the library saves with an adapter even if it was not trained
HEAD_CONFIG = "head_config.json"
INTERFACE = "adapter_interface.json"
VERSION = "adapters.1.3.0"  # the version of the library
# The library saves a LayerNorm before W_down under both names. Of two different tensors it loads the second.
NORM_NAMES = ("adapter_norm_before.", "adapter_down.0.")
OLD_NON_LINEARITIES = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # in files without a version


def is_hub(path: Path) -> bool:
    """Return whether a directory's adapter_config.json is in AdapterHub's format."""
    return (path / CONFIG).is_file() and read_json(path / CONFIG).keys() >= {"config", "model_type", "name"}


def options_of(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the options of the method in the adapter_config.json of directory `path`, by the names of the library.

    Raises:
        UserError: They are not an object.
    """
    options = config["config"]
    if not isinstance(options, dict):
        raise UserError(f"{path / CONFIG}: config must be an object, not {json.dumps(options)}")
    non_linearity = options.get("non_linearity")
    if "version" not in config and non_linearity in OLD_NON_LINEARITIES:
        return options | {"non_linearity": OLD_NON_LINEARITIES[non_linearity]}
    return options


def adapter_config(model: Model, method: Bottleneck, name: str, base: str | None) -> dict[str, Any]:
    """Return adapter_config.json."""
    return {
        "config": dict(sorted(method.to_hf(model, name).items())),
        "hidden_size": model.config.embed,
        "model_name": base,
        "model_type": model.config.to_hf()["model_type"],
        "name": name,
        "version": VERSION,
    }


def head_config(model: Model, base: str | None) -> dict[str, Any]:
    """Return head_config.json. The library loads a task head only into the model class that it was saved from."""
    assert isinstance(model, Encoder)  # other models have no task head
    fields = model.config.to_hf()
    return {
        "config": None,
        "hidden_size": model.config.embed,
        "label2id": {label: number for number, label in enumerate(model.config.labels)},
        "model_class": fields["architectures"][0],
        "model_name": base,
        "model_type": fields["model_type"],
        "name": None,
        "num_labels": len(model.config.labels),
        "version": VERSION,
    }


def with_both_names(tensors: Mapping[str, T], method: Bottleneck) -> dict[str, T]:
    """Add the second name of a LayerNorm before W_down."""
    one, other = NORM_NAMES
    again = {key.replace(other, one): value for key, value in tensors.items() if method.norm_before and other in key}
    return {**tensors, **again}


def read_adapter(path: Path, model: nnx.Module, name: str) -> tuple[Bottleneck, dict[str, np.ndarray]]:
    """Read the method and the tensors of directory `path`, for a model.

    The keys are as in our own files, in which the adapter is called `name`.

    Raises:
        UserError: The model has no slots for bottleneck adapters, the config asks for something that is not supported,
            or there is no safetensors file.
    """
    if not isinstance(model, Model):
        raise UserError(
            f"{path} holds a bottleneck adapter of AdapterHub, which needs a model from load_model; "
            f"{type(model).__name__} is an adopted network"
        )
    config = read_json(path / CONFIG)
    options = options_of(config, path)
    _check_files(path)
    method = from_hub(options)
    if not options.get("original_ln_after", True) and any(isinstance(s.module, NormedResidual) for s in sites(model)):
        raise UserError(
            f"{path / CONFIG}: original_ln_after=False is not supported for a post-norm model, which normalizes x + f(x): "
            "its own norm would precede the adapter"
        )
    tensors = read_file(path / WEIGHTS) | (read_file(path / HEAD) if (path / HEAD).is_file() else {})
    return method, _renamed(tensors, model, config["name"], name)


def _check_files(path: Path) -> None:
    if (path / INTERFACE).exists():
        raise UserError(f"{path / INTERFACE}: adapters placed by a custom adapter interface are not supported")
    if not (path / WEIGHTS).is_file():
        pickle = f" but {PICKLE}, a pickle. Reading a pickle can run arbitrary code, so it is not supported"
        raise UserError(
            f"{path} holds no {WEIGHTS}{pickle if (path / PICKLE).is_file() else ''}; load it with adapters and call "
            'model.save_adapter("DIR", NAME, use_safetensors=True)'
        )


def _renamed(tensors: dict[str, np.ndarray], model: Model, old: str, new: str) -> dict[str, np.ndarray]:
    """The tensors by our keys, with adapter `old` called `new`."""
    first, second = NORM_NAMES
    ordered = sorted(tensors, key=lambda key: second in key)  # the second name of a LayerNorm overwrites the first
    infix = f".adapters.{old}.", f".adapters.{new}."
    # hf_stored: the adapter may have been saved from the transformers class without the head
    return {model.hf_stored(key.replace(*infix).replace(first, second)): tensors[key] for key in ordered}
