"""Write the weights of a model to safetensors files, one shard at a time."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError
from safetensors.numpy import save_file

from peftjax.core import variables
from peftjax.io import bitsandbytes
from peftjax.io.entries import Entry, entries
from peftjax.io.experts import single_names, split_experts
from peftjax.io.hf_files import INDEX, WEIGHTS
from peftjax.io.multimodal import Surroundings
from peftjax.io.packed_experts import split_kernels
from peftjax.models.base import Model
from peftjax.quant.base import Quantized
from peftjax.quant.nf4 import Nf4

# Required by transformers. Only one entry, because safetensors writes several in arbitrary order.
_METADATA = {"format": "pt"}


def write_weights(
    model: Model, directory: Path, max_shard_bytes: int, writing: bool, around: Surroundings | None = None
) -> None:
    """Write a model's base parameters into a directory as model.safetensors, or as shards and their index.

    A tensor of more than `max_shard_bytes` is a separate shard. All processes take part in gathering the parameters,
    including those that are not `writing`. The other tensors of `around`, the multimodal checkpoint of the model, are
    copied.
    """
    values = {path: variable.get_value() for path, variable in variables.flat(model)[1].items()}
    sources = {key: (entry, layer) for entry in entries(model) for layer, key in enumerate(entry.keys)}
    sizes = {key: _stored_bytes(model, key, values[entry.path], entry) for key, (entry, _) in sources.items()}
    # Unstacked parameters first, then layer by layer.
    keys = sorted(sources, key=lambda key: sources[key][1] if sources[key][0].stacked else -1)
    others = around.others if around else {}
    sizes |= {key: tensor.nbytes for key, tensor in others.items()}
    keys += others
    shards = _split(keys, sizes, max_shard_bytes)
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [WEIGHTS]
    where: dict[str, str] = {}
    total = 0
    for name, shard in zip(names, shards, strict=True):
        arrays: dict[str, np.ndarray] = {}
        for key in shard:
            if key in others:
                if writing:
                    arrays[key] = np.asarray(others[key].open()[...], order="C")
                continue
            entry, layer = sources[key]
            stored_as = around.stored_name(key) if around else key
            value = values[entry.path]
            fetched = _fetch(value, entry, layer)  # in every process, to gather the shards of others
            if writing:
                arrays |= _tensors(model, stored_as, fetched, value)
        where |= dict.fromkeys(arrays, name)
        total += sum(array.nbytes for array in arrays.values())
        if writing:
            _save(arrays, directory / name)
    if writing and len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Write a safetensors file. Raises an OSError if that fails, for example because the disk is full."""
    try:
        save_file(arrays, path, _METADATA)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def _split(keys: Sequence[str], sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Consecutive runs of at most `max_bytes`; a larger tensor is alone."""
    shards: list[list[str]] = [[]]
    total = 0
    for key in keys:
        if shards[-1] and total + sizes[key] > max_bytes:
            shards.append([])
            total = 0
        shards[-1].append(key)
        total += sizes[key]
    return shards


def _stored_bytes(model: Model, key: str, value: jax.Array | Quantized, entry: Entry) -> int:
    """The size of one layer in a file."""
    taken = jax.eval_shape(functools.partial(_take, stacked=entry.stacked, order=entry.order), value, 0)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(taken))
    kernels = sum(map(len, single_names(model, key))) or 1
    return size + (bitsandbytes.OVERHEAD * kernels if isinstance(value, Nf4) else 0)


def _fetch(value: jax.Array | Quantized, entry: Entry, layer: int) -> Any:
    """What `_take` returns, on the host of every process."""
    everywhere = None
    leaf = jax.tree.leaves(value)[0]
    if not leaf.is_fully_addressable:  # only then the devices must gather it
        assert isinstance(leaf.sharding, NamedSharding), leaf.sharding
        everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    take = jax.jit(_take, static_argnums=(2, 3), out_shardings=everywhere)
    taken = take(value, layer, entry.stacked, entry.order)
    # In C order, as save_file assumes; a TPU may use another.
    return jax.tree.map(lambda array: np.asarray(array, order="C"), taken)


def _tensors(model: Model, key: str, fetched: Any, value: jax.Array | Quantized) -> dict[str, np.ndarray]:
    """The tensors of one layer by name. A kernel in NF4 has several tensors; each expert has its own."""
    if not isinstance(value, Nf4):
        return split_experts(model, key, fetched)
    names = single_names(model, key)
    return split_kernels(names, fetched, value) if names else bitsandbytes.tensors(key, fetched, value)


def _take(
    value: jax.Array | Nf4, layer: jax.Array | int, stacked: bool, order: tuple[int, ...] | None
) -> jax.Array | dict[str, jax.Array]:
    """One layer in its stored form."""
    if stacked:
        value = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, axis=0, keepdims=False), value)
    if isinstance(value, Nf4):
        return bitsandbytes.pack_kernel(value) if value.ndim == 2 else jax.vmap(bitsandbytes.pack_kernel)(value)
    return value if order is None else value.transpose(order)
