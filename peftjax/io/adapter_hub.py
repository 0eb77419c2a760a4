"""Adapter directories in the format of AdapterHub's library `adapters` 1.3: adapter_config.json, adapter.safetensors.

The keys hold the adapter's name: model.layers.0.output_adapters.adapters.NAME.adapter_up.weight.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from peftjax.adapters.method import Method
from peftjax.adapters.sites import sites
from peftjax.io.hf_files import read_header, read_json
from peftjax.methods.bottleneck import Bottleneck, from_hub
from peftjax.nn.stack import NormedResidual, Residual

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
HEAD = "model_head.safetensors"  # which the library writes beside an adapter, trained or not
HEAD_CONFIG = "head_config.json"
INTERFACE = "adapter_interface.json"
VERSION = "adapters.1.3.0"  # of the library whose format this is
# A LayerNorm before W_down has two names there for the same tensors; of both in a file the library takes the second.
NORM_TWICE = ("adapter_norm_before.", "adapter_down.0.")
OLD_NAMES = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # of non-linearities, in files without a version


@dataclasses.dataclass(frozen=True)
class Files:
    """What an adapter directory holds. prefix, infix: what stands before and after a module's name in the keys."""

    weights: str
    prefix: str
    infix: str

    def key(self, module: str, suffix: str) -> str:
        """The key of one tensor of a module's adapter."""
        return f"{self.prefix}{module}{self.infix}{suffix}"

    def head_key(self, module: str, suffix: str) -> str:
        """The key of one tensor of a classification head."""
        return f"{self.prefix}{module}.{suffix}"


def files(name: str) -> Files:
    """Of an adapter called `name`."""
    return Files(WEIGHTS, "", f".adapters.{name}.")


def is_hub(path: Path) -> bool:
    """Whether a directory's adapter_config.json is one of AdapterHub."""
    return (path / CONFIG).is_file() and read_json(path / CONFIG).keys() >= {"config", "model_type", "name"}


def make_config(model: Any, method: Bottleneck, name: str, base: str | None) -> dict[str, Any]:
    """adapter_config.json."""
    return {
        "config": dict(sorted(method.to_hf(model, name).items())),
        "hidden_size": model.config.embed,
        "model_name": base,
        "model_type": model.config.to_hf()["model_type"],
        "name": name,
        "version": VERSION,
    }


def head_config(model: Any, base: str | None) -> dict[str, Any]:
    """head_config.json: the library reads a head only into the class of model that it was written from."""
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


def with_both_names(tensors: dict[str, Any], method: Bottleneck) -> dict[str, Any]:
    """The tensors, those of a LayerNorm before W_down under both of their names."""
    one, other = NORM_TWICE
    again = {key.replace(other, one): value for key, value in tensors.items() if method.norm_before and other in key}
    return tensors | again


def read(path: Path, model: Any, name: str) -> tuple[Method, dict[str, np.ndarray]]:
    """The method and the tensors of a directory, keyed as if the adapter were called `name`.

    Raises:
        ValueError: the config asks for what is not supported, or there are no safetensors.
    """
    config = read_json(path / CONFIG)
    if not isinstance(config["config"], dict):
        raise ValueError(f"{path / CONFIG}: config must be an object, it is {json.dumps(config['config'])}")
    if (path / INTERFACE).exists():
        raise ValueError(f"{path / INTERFACE}: adapters placed by an interface of one's own are not supported")
    if not (path / WEIGHTS).is_file():
        pickle = f" but {PICKLE}, a pickle, which can run any code and is never read here"
        raise ValueError(
            f"{path} holds no {WEIGHTS}{pickle if (path / PICKLE).is_file() else ''}; load it with adapters and call "
            'model.save_adapter("DIR", NAME, use_safetensors=True)'
        )
    options = dict(config["config"])
    if "version" not in config and options.get("non_linearity") in OLD_NAMES:
        options["non_linearity"] = OLD_NAMES[options["non_linearity"]]
    stored = read_header(path / WEIGHTS) | (read_header(path / HEAD) if (path / HEAD).is_file() else {})
    tensors = {key: np.array(tensor.open()[...]) for key, tensor in stored.items()}
    method = from_hub(options)
    if not options.get("original_ln_after", True) and any(isinstance(s.module, NormedResidual) for s in sites(model)):
        raise ValueError(
            f"{path / CONFIG}: original_ln_after=False is not supported in a model that normalises x + f(x): its own norm "
            "would come before the adapter"
        )
    old, new = (f".adapters.{each}." for each in (config["name"], name))
    rename = _key_of(model, tensors)
    return method, {
        rename(key.replace(old, new).replace(*NORM_TWICE)): value
        for key, value in sorted(tensors.items(), key=lambda item: NORM_TWICE[1] in item[0])
    }


def _key_of(model: Any, tensors: dict[str, np.ndarray]) -> Callable[[str], str]:
    """What makes our key of the file's: an adapter may be saved from the model without its head, or with it."""
    if hasattr(model, "hf_stored"):
        return model.hf_stored
    root = next(site.names[0] for site in sites(model) if isinstance(site.module, Residual)).split(".")[0]
    bare = "" if any(key.startswith(f"{root}.") for key in tensors) else f"{root}."
    return lambda key: bare + key
