"""The method of an adapter directory, from its adapter_config.json alone: without the tensors, and without a model."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftjax.adapters.method import Method
from peftjax.core.errors import UserError
from peftjax.core.listing import listing
from peftjax.io import adapter_hub
from peftjax.io.adapter_as_lora import CONVERTED, lora_config
from peftjax.io.adapter_tensors import CONFIG
from peftjax.io.hf_files import check_files, is_hub_id
from peftjax.io.json_files import read_json
from peftjax.methods import METHODS
from peftjax.methods.bottleneck import from_hub


def read_method(path: Path) -> Method:
    """Read the method and options of an adapter directory.

    Other fields are not checked here: `load_adapter` checks whether the adapter is supported.

    Raises:
        UserError: The directory holds no adapter, or one of an unknown method.
    """
    check_directory(path, (CONFIG,))
    config = read_json(path / CONFIG)
    if adapter_hub.is_hub(path):
        return from_hub(adapter_hub.options_of(config, path))
    config = lora_config(config)
    cls = peft_method_class(config, path)
    options = {hf for hf, _ in cls.hf_fields.values()} | cls.hf_training.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # load_adapter gives them
        return cls.from_hf({field: value for field, value in config.items() if field in options})


def check_directory(path: Path, files: Sequence[str]) -> None:
    """Check that an adapter directory holds these files.

    Raises:
        UserError: There is no such directory, or a file is missing or not a regular file.
    """
    if path.is_file():
        raise UserError(f"{path} is a file; give the directory that holds {' and '.join(files)}")
    if not path.is_dir():
        message = f"{path}: no such directory; give the one that holds {' and '.join(files)}"
        if "/" in str(path) and is_hub_id(str(path)):
            message += f". To use an adapter on the hub, give huggingface_hub.snapshot_download({str(path)!r})"
        raise UserError(message)
    check_files(path, files)
    for file in files:
        if not (path / file).is_file():
            inside = [folder for folder in sorted(path.iterdir()) if all((folder / name).is_file() for name in files)]
            # The workdir of a run, or the directory to which peft saved several adapters.
            inside = [folder for folder in inside if folder.name == "adapter"] or inside[:5]
            hint = f"give {' or '.join(map(str, inside))}" if inside else f"it holds {listing(path)}"
            raise UserError(f"{path} is not an adapter directory: {file} is missing; {hint}")


def peft_method_class(config: Mapping[str, Any], path: Path) -> type[Method]:
    """The class for the peft_type in a PEFT directory's adapter_config.json; if there are several, the first.

    Raises:
        UserError: peftjax does not have the method.
    """
    classes = {cls.peft_type: cls for cls in reversed(METHODS.values()) if cls.peft_type}
    if (kind := config.get("peft_type")) not in classes:
        raise UserError(
            f"{path / CONFIG}: peft_type {kind!r} is not supported; supported: {', '.join(sorted([*classes, *CONVERTED]))}"
        )
    return classes[kind]
