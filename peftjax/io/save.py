"""Base models to Hugging Face directories, one shard at a time."""

import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from peftjax.core import distributed, variables
from peftjax.io import bitsandbytes, hf_files
from peftjax.io.entries import Entry, entries, is_linear
from peftjax.io.hf_files import enumerate_some, resolve
from peftjax.io.sentence import MODULES, POOLING, write_pooling
from peftjax.nn.slot import Slot
from peftjax.quant.base import Quantized
from peftjax.quant.nf4 import Nf4

MAX_SHARD_BYTES = 2 * 10**9


# transformers asks for it: the orientation of the tensors. One entry, because safetensors writes several in any order.
_METADATA = {"format": "pt"}


MARK = {"saved_by": "peftjax"}  # in a config.json: save_model may replace the directory


def save_model(
    model: Any, path: str | Path, *, source: str | Path | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a model as a Hugging Face directory: config.json, and model.safetensors or shards of it with their index.

    The dtype is the parameters'; kernels in NF4 are stored as bitsandbytes does. `source`: a model directory (as for
    `resolve`) whose tokenizer and generation files are copied. One shard at a time is brought to the host. The directory
    appears when it is complete, and replaces one that was written here before. Adapters that are attached but not active
    are left out.

    Raises:
        ValueError: adapters are active, kernels are in int8, or the target holds something else.
    """
    target = Path(path).expanduser()
    if active := sorted(
        {name for _, slot in nnx.iter_modules(model) if isinstance(slot, Slot) for name in slot.active}
    ):
        raise ValueError(
            f"adapters are active in the model: {', '.join(active)}; a Hugging Face model directory cannot hold them: "
            "merge or detach them first, or save them by save_adapter"
        )
    quantization = _quantization_config(model)
    _check_target(target)
    side_files = [] if source is None else _side_files(resolve(source))
    writing = jax.process_index() == 0
    temporary = target.with_name(f".{target.name}.peftjax-tmp")
    if writing:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
        temporary.mkdir(parents=True)
    try:
        _write_weights(model, temporary, max_shard_bytes, writing)
        if writing:
            config = temporary / "config.json"
            config.write_text(json.dumps(model.config.to_hf() | quantization | MARK, indent=2) + "\n", encoding="utf-8")
            write_pooling(model.config, temporary)
            for file in temporary.glob("*.safetensors"):
                shutil.copymode(config, file)  # the safetensors package lets nobody but the owner read them
            for file in side_files:
                shutil.copyfile(file, temporary / file.name)
            _replace(target, temporary)
    finally:
        if writing:
            shutil.rmtree(temporary, ignore_errors=True)
    distributed.meet("save_model")  # every process may read it once it returns


def _quantization_config(model: Any) -> dict[str, Any]:
    """What config.json says of quantized kernels: nothing if there are none."""
    leaves = variables.flat(model)[1]
    kernels = {}
    dense = [model.hf_modules[path] for path in model.output_layers if path in model.hf_modules]  # that this head has
    for entry in entries(model):
        value = leaves[entry.path].get_value()
        if isinstance(value, Quantized):
            kernels[entry.path] = value
            dense = [name for name in dense if name not in entry.hf_modules]
        elif is_linear(model, entry):
            dense += [name for name in entry.hf_modules if name not in dense]
    if other := [path for path, value in kernels.items() if not isinstance(value, Nf4)]:
        raise ValueError(
            f"{other[0]} is in {type(kernels[other[0]]).__name__.lower()}, for which a Hugging Face directory has no format "
            "(bitsandbytes' int8 rounds the activations too): quantize the model it was made from again when it is needed"
        )
    if not kernels:
        return {}
    nested = any(isinstance(kernel, Nf4) and kernel.scales is not None for kernel in kernels.values())
    return {"quantization_config": bitsandbytes.make_config(nested, dense, model.config.dtype)}


def _check_target(target: Path) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; give a directory that is not there yet")
    config = target / "config.json"
    if not config.is_file() or not MARK.items() <= hf_files.read_json(config).items():
        raise ValueError(
            f"{target} exists and is no model directory written by save_model: choose another, or delete it"
        )
    known = ("config.json", "model*.safetensors", hf_files.INDEX, *hf_files.SIDE_FILES, MODULES, POOLING)
    if foreign := sorted(
        entry.name for entry in target.iterdir() if not any(entry.match(pattern) for pattern in known)
    ):
        raise ValueError(
            f"{target} holds more than a model and would be replaced: {enumerate_some(foreign)}; move that away, or "
            "choose another directory"
        )


def _side_files(directory: Path) -> list[Path]:
    return sorted(file for pattern in hf_files.SIDE_FILES for file in directory.glob(pattern) if file.is_file())


def _replace(target: Path, complete: Path) -> None:
    if target.exists() and any(target.iterdir()):
        old = target.with_name(f".{target.name}.peftjax-old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        complete.rename(target)
        shutil.rmtree(old)
    else:
        complete.rename(target)


def _write_weights(model: Any, directory: Path, max_shard_bytes: int, writing: bool) -> None:
    values = {path: variable.get_value() for path, variable in variables.flat(model)[1].items()}
    sources = {key: (entry, layer) for entry in entries(model) for layer, key in enumerate(entry.keys)}
    sizes = {key: _stored_bytes(values[entry.path], entry) for key, (entry, _) in sources.items()}
    # What is not stacked, then layer by layer.
    keys = sorted(sources, key=lambda key: sources[key][1] if sources[key][0].stacked else -1)
    shards = _split(keys, sizes, max_shard_bytes)
    names = [hf_files.WEIGHTS] if len(shards) == 1 else _shard_names(len(shards))
    where: dict[str, str] = {}
    total = 0
    for name, shard in zip(names, shards, strict=True):
        arrays: dict[str, np.ndarray] = {}
        for key in shard:
            entry, layer = sources[key]
            fetched = _fetch(key, values[entry.path], entry, layer)  # in every process, to gather what lies in others
            arrays |= fetched if writing else {}
        where |= dict.fromkeys(arrays, name)
        total += sum(array.nbytes for array in arrays.values())
        if writing:
            save_file(arrays, directory / name, _METADATA)
    if writing and len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / hf_files.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(keys: Sequence[str], sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Consecutive runs of at most `max_bytes`; a tensor larger than that stands alone."""
    shards: list[list[str]] = [[]]
    total = 0
    for key in keys:
        if shards[-1] and total + sizes[key] > max_bytes:
            shards.append([])
            total = 0
        shards[-1].append(key)
        total += sizes[key]
    return shards


def _shard_names(count: int) -> list[str]:
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _stored_bytes(value: Any, entry: Entry) -> int:
    """The size of one layer in a file."""
    taken = jax.eval_shape(functools.partial(_take, stacked=entry.stacked, order=entry.order), value, 0)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(taken))
    return size + (bitsandbytes.OVERHEAD if isinstance(value, Nf4) else 0)


def _fetch(key: str, value: Any, entry: Entry, layer: int) -> dict[str, np.ndarray]:
    """One stored parameter on the host of every process, under its key; a kernel in NF4 is several tensors."""
    everywhere = None
    leaf = jax.tree.leaves(value)[0]
    if not leaf.is_fully_addressable:  # only then must the devices gather it
        assert isinstance(leaf.sharding, NamedSharding), leaf.sharding
        everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    take = jax.jit(_take, static_argnums=(2, 3), out_shardings=everywhere)
    taken = take(value, layer, entry.stacked, entry.order)
    # In C order, as save_file takes for granted; on a TPU it need not be.
    host = jax.tree.map(lambda array: np.asarray(array, order="C"), taken)
    return bitsandbytes.tensors(key, host, value) if isinstance(value, Nf4) else {key: host}


def _take(value: Any, layer: jax.Array | int, stacked: bool, order: tuple[int, ...] | None) -> Any:
    """One layer as it is stored."""
    if stacked:
        value = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, axis=0, keepdims=False), value)
    if isinstance(value, Nf4):
        return bitsandbytes.pack(value)
    return value if order is None else value.transpose(order)
