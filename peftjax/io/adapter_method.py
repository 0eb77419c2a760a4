"""The method of an adapter directory, from its adapter_config.json alone: without the tensors, and without a model."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftjax.adapters.method import Method
from peftjax.core.errors import UserError
from peftjax.io import adapter_hub
from peftjax.io.adapter_tensors import CONFIG
from peftjax.io.hf_files import check_files, read_json
from peftjax.methods import METHODS
from peftjax.methods.bottleneck import from_hub


def read_method(path: Path) -> Method:
    """Read the method and options of an adapter directory.

    Other fields are not checked here: `load_adapter` checks whether the adapter is supported.

    Raises:
        UserError: The directory holds no adapter, or one of an unknown method.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give one that holds {CONFIG}")
    check_files(path, (CONFIG,))
    if not (path / CONFIG).is_file():
        there = sorted(item.name for item in path.iterdir())
        raise UserError(
            f"{path} is not an adapter directory: {CONFIG} is missing; it holds {', '.join(there[:10]) or 'no files'}"
        )
    config = read_json(path / CONFIG)
    if adapter_hub.is_hub(path):
        return from_hub(dict(config["config"]))
    cls = method_class(config, path)
    options = {hf for hf, _ in cls.hf_fields.values()} | cls.hf_training.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # load_adapter gives them
        return cls.from_hf({field: value for field, value in config.items() if field in options})


def method_class(config: Mapping[str, Any], path: Path) -> type[Method]:
    """The class for the peft_type in the adapter_config.json of a PEFT directory.

    Raises:
        UserError: peftjax does not have the method.
    """
    classes = {cls.peft_type: cls for cls in METHODS.values() if cls.peft_type}
    if (kind := config.get("peft_type")) not in classes:
        raise UserError(
            f"{path / CONFIG}: peft_type {kind!r} is not supported; supported: {', '.join(sorted(classes))}"
        )
    return classes[kind]
