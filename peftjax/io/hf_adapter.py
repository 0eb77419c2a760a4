"""Adapter directories in the format of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from peftjax.core.paths import suggest
from peftjax.methods import METHODS, attach, attached, detach
from peftjax.methods.base import Method, Site, sites

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(model: Any, path: str | Path, name: str = "default", *, base: str | None = None) -> Path:
    """Write the adapters called `name` as a directory that Hugging Face PEFT loads; returns its path.

    base: what to record as base_model_name_or_path. The directory appears whole or not at all.

    Raises:
        ValueError: no such adapter, or the method has no Hugging Face format.
    """
    method = _method(model, name)
    config = {
        "peft_type": method.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "auto_mapping": None,
    } | method.to_hf(model, name)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        save_file(_tensors(model, name), scratch / WEIGHTS, metadata={"format": "pt"})
        (scratch / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        path.mkdir(exist_ok=True)
        for file in (WEIGHTS, CONFIG):
            (scratch / file).replace(path / file)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def load_adapter(model: Any, path: str | Path, name: str = "default") -> Any:
    """Attach the adapter of a Hugging Face PEFT directory under `name`, active; returns the model.

    Raises:
        ValueError: a file is missing, the config asks for what is not supported, a tensor is missing, unread or of
            another shape. The model is unchanged then.
    """
    path = Path(path)
    method = _read_method(path)
    attach(model, method, name, rngs=nnx.Rngs(0))
    try:
        with safe_open(path / WEIGHTS, framework="numpy") as file:
            _fill(model, name, {key: file.get_tensor(key) for key in file.keys()}, path)  # noqa: SIM118
    except Exception:
        detach(model, name)
        raise
    return model


def _method(model: Any, name: str) -> Method:
    methods = attached(model)
    if name not in methods:
        raise ValueError(f"no adapter {name!r} is attached.{suggest(name, methods)} Attached: {list(methods)}")
    if methods[name].peft_type is None:
        raise ValueError(f"{methods[name].method} has no adapter file; save the whole model with save_model")
    return methods[name]


def _read_method(path: Path) -> Method:
    for file in (CONFIG, WEIGHTS):
        if not (path / file).is_file():
            there = sorted(item.name for item in path.iterdir()) if path.is_dir() else "nothing: no such directory"
            raise ValueError(f"{path} is no adapter directory: {file} is missing; it holds {there}")
    config = json.loads((path / CONFIG).read_text())
    classes = {cls.peft_type: cls for cls in METHODS.values() if cls.peft_type}
    if (kind := config.get("peft_type")) not in classes:
        raise ValueError(f"{path / CONFIG}: peft_type {kind!r} is not supported; supported: {', '.join(sorted(classes))}")
    about = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"}
    return classes[kind].from_hf({key: value for key, value in config.items() if key not in about})


def _leaves(model: Any, name: str) -> list[tuple[str, Site, int | None, Any]]:
    """Every tensor of the adapter's file: (key, site, layer, where it is)."""
    return [
        (f"{PREFIX}{hf}.{suffix}", site, layer, leaf)
        for site in sites(model)
        if name in site.module.adapters.names()
        for layer, hf in zip(site.layers, site.names, strict=True)
        for suffix, leaf in site.module.adapters.adapter(name).hf_leaves(layer).items()
    ]


def _tensors(model: Any, name: str) -> dict[str, np.ndarray]:
    tensors = {}
    for key, site, layer, leaf in _leaves(model, name):
        value = getattr(site.module.adapters.adapter(name), leaf.leaf).get_value()
        part = np.asarray(value if layer is None else value[layer])[leaf.window]
        tensors[key] = np.ascontiguousarray(part.T if leaf.transposed else part)
    return tensors


def _fill(model: Any, name: str, tensors: dict[str, np.ndarray], path: Path) -> None:
    leaves = _leaves(model, name)
    unread = set(tensors) - {key for key, *_ in leaves} - _copies_of_base(model, name, tensors)
    missing = [key for key, *_ in leaves if key not in tensors]
    if missing or unread:
        parts = [f"{word} {_shortened(keys)}" for word, keys in (("missing", missing), ("unexpected", sorted(unread))) if keys]
        raise ValueError(f"{path / WEIGHTS} does not fit its config and this model: {'; '.join(parts)}")
    filled: dict[tuple[str, str], np.ndarray] = {}
    for key, site, layer, leaf in leaves:
        variable = getattr(site.module.adapters.adapter(name), leaf.leaf)
        buffer = filled.setdefault((site.path, leaf.leaf), np.array(variable.get_value()))
        window = (buffer if layer is None else buffer[layer])[leaf.window]  # a view: writing fills the buffer
        value = tensors[key].T if leaf.transposed else tensors[key]
        if value.shape != window.shape:
            raise ValueError(
                f"{path / WEIGHTS}: {key} has shape {tensors[key].shape}, this model needs "
                f"{window.T.shape if leaf.transposed else window.shape}: the adapter is for another base"
            )
        window[...] = value.astype(window.dtype)
    by_path = {site.path: site for site in sites(model)}
    for (site_path, leaf_name), buffer in filled.items():
        variable = getattr(by_path[site_path].module.adapters.adapter(name), leaf_name)
        variable.set_value(jax.device_put(buffer, variable.get_value().sharding))


def _copies_of_base(model: Any, name: str, tensors: dict[str, np.ndarray]) -> set[str]:
    """Keys that only repeat the base: peft stores the whole table of an embedding that has a LoRA."""
    copies = set()
    for site in sites(model):
        key = f"{PREFIX}{site.names[0]}.base_layer.weight"
        if name in site.module.adapters.names() and "embedding" in site.parameters and key in tensors:
            table = np.asarray(site.parameters["embedding"].get_value())
            if tensors[key].shape != table.shape or not np.allclose(tensors[key], table):
                raise ValueError(f"{key} differs from this model's embedding: the adapter was trained on another base")
            copies.add(key)
    return copies


def _shortened(keys: list[str]) -> str:
    return ", ".join(keys[:20]) + (f" and {len(keys) - 20} more" if len(keys) > 20 else "")
