"""The pooling of sentence-transformers directories: modules.json, 1_Pooling and 2_Normalize."""

import json
from pathlib import Path
from typing import Any

from peftjax.core.errors import UserError
from peftjax.io.json_files import load_json, read_json
from peftjax.models.base import ModelConfig
from peftjax.models.text_encoder import TextEncoderConfig

MODULES, POOLING = "modules.json", "1_Pooling"
FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def read_pooling(directory: Path) -> dict[str, Any]:
    """Read the options `pooling` and `normalize` of `TextEncoderConfig` from modules.json; empty if there is none.

    Raises:
        UserError: A module or a pooling mode is not supported.
    """
    file = directory / MODULES
    if not file.is_file():
        return {}
    options: dict[str, Any] = {"normalize": False}
    for module in _modules(file):
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Pooling":
            options["pooling"] = _mode(directory / module["path"] / "config.json")
        elif kind == "Normalize":
            options["normalize"] = True
        elif kind != "Transformer" or module["path"]:
            raise UserError(
                f"{file}: module {module['type']!r} at {module['path']!r} is not supported; supported: a Transformer in "
                "the directory itself, Pooling and Normalize"
            )
    return options


def write_pooling(config: ModelConfig, directory: Path) -> None:
    """Write the files that `read_pooling` reads, if the model has a pooling and no task head."""
    if not isinstance(config, TextEncoderConfig) or config.pooling is None or config.head != "none":
        return
    paths = {"Transformer": "", "Pooling": POOLING} | ({"Normalize": "2_Normalize"} if config.normalize else {})
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(paths.items())
    ]
    flags = {flag: mode == config.pooling for flag, mode in FLAGS.items()}
    pooling = {"word_embedding_dimension": config.embed} | flags
    (directory / POOLING).mkdir()
    for file, content in ((MODULES, modules), (f"{POOLING}/config.json", pooling)):
        (directory / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _modules(file: Path) -> list[dict[str, str]]:
    modules = load_json(file)
    if not isinstance(modules, list) or not all(
        isinstance(module, dict) and all(isinstance(module.get(name), str) for name in ("type", "path"))
        for module in modules
    ):
        raise UserError(f"{file} must hold a list of modules with type and path, as sentence-transformers writes it")
    return modules


def _mode(file: Path) -> str:
    """The pooling mode. Newer versions name it; older ones have a flag for each."""
    if not file.is_file():
        raise UserError(f"{file} is missing, but modules.json names it; download it too")
    config = read_json(file)
    if "pooling_mode" in config:
        return str(config["pooling_mode"])
    modes = [FLAGS.get(key, key) for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    if len(modes) != 1:
        raise UserError(
            f"{file}: {len(modes)} pooling modes are enabled ({', '.join(modes) or 'none'}); exactly one is supported"
        )
    return modes[0]
