"""Base models from Hugging Face directories, one tensor at a time."""

import dataclasses
import functools
import re
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from peftjax import sharding
from peftjax.core import variables
from peftjax.core.paths import suggest
from peftjax.io import bitsandbytes, hf_files
from peftjax.io.bitsandbytes import Packed, Unpack
from peftjax.io.entries import Entry, entries, is_linear
from peftjax.io.formats import Encode, encoders, unpackers
from peftjax.io.hf_config import read_config
from peftjax.io.hf_files import StoredTensor, enumerate_some, resolve
from peftjax.io.random_model import make, one_device


def load_model(
    path: str | Path,
    dtype: str = "float32",
    quantize: str | None = None,
    *,
    param_dtype: str | None = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
    remat: str = "none",
    skip: Sequence[str] = (),
    head: str | None = None,
    labels: int | Sequence[str] | None = None,
    problem_type: str | None = None,
    new_head: bool = False,
    seed: int = 0,
) -> Any:
    """The model in a Hugging Face directory (or hub id, or "embedded"), sharded over `mesh` (default: one device).

    Kernels that bitsandbytes stored in NF4 stay as they are.

    dtype: of the computation; param_dtype: of the parameters (default: dtype), to which any stored float is converted.
    quantize: the format of the kernels, a key of `quant.FORMATS`, into which each one is brought as it arrives. Norms,
    biases, embeddings, the head and the modules named in `skip` (whole names or their endings) stay in param_dtype.
    head: of an encoder, "sequence_classification", "token_classification", "image_classification" or "none"; by default
    the one that its config.json names. A head that the checkpoint does not have begins at random, from `seed`, with
    `labels` outputs, a number or their names, for a problem_type as transformers calls it; so does one with new_head,
    whatever the checkpoint has.
    Tensors are read one at a time, each process only what its devices hold: the peak is the model and about two and a
    half of its largest tensors.

    Raises:
        ValueError: see `resolve` and `hf_files.read_tensors`; or the tensors are not those that config.json asks for:
            every missing and unexpected one is named, and every one of a wrong shape or dtype. An unknown format, or a
            name in `skip` that no kernel has. A directory that is quantized otherwise than by bitsandbytes in NF4, or
            than `quantize`, or in some layers only.
    """
    directory = resolve(path, revision)
    chosen = {"head": head, "labels": labels, "problem_type": problem_type, "new_head": new_head}
    config, packed = read_config(directory, dtype, param_dtype, remat, chosen)
    if packed and skip:
        raise ValueError(f"skip={tuple(skip)!r} (model.skip_quantize): {directory} is quantized already")
    stored: dict[str, Any] = dict(hf_files.read_tensors(directory))
    if packed:
        stored = bitsandbytes.gather(stored, quantize)
    config = _tied_as_stored(config, stored)
    model = nnx.eval_shape(lambda: config.make(nnx.Rngs(0)))
    table = entries(model)
    encode = {} if packed else encoders(model, table, quantize, skip)
    tensors = _match(model, table, stored, directory)
    if packed:
        encode = unpackers(model, table, tensors)
    mesh = mesh or one_device()
    kept = np.dtype(config.param_dtype)
    values = {
        entry.path: _load(entry, [tensors[key] for key in entry.keys], kept, mesh, encode.get(entry.path))
        for entry in table
        if entry.keys[0] in tensors
    }
    rest = [path for path in variables.flat(model)[1] if path not in values]  # new heads, and the keys of dropout
    variables.update(model, values, make(config, rest, mesh, seed))
    return model


def load_kernels(path: str | Path, model: Any, revision: str | None = None) -> Callable[[str, int | None], np.ndarray]:
    """The kernels of a Hugging Face directory for a model that was quantized from it: a function of a module's path and a
    layer that reads one, float32 [in, out]."""
    directory = resolve(path, revision)
    if "quantization_config" in hf_files.read_json(directory / "config.json"):
        raise ValueError(f"{directory} is quantized itself: give the directory that it was made from")
    table = entries(model)
    stored = _match(model, table, dict(hf_files.read_tensors(directory)), directory)
    of_module = {entry.module: entry for entry in table if is_linear(model, entry)}

    def read(module: str, layer: int | None) -> np.ndarray:
        entry = of_module[module]
        return _ordered(np.asarray(stored[entry.keys[layer or 0]].open()[...], np.float32), entry.order)

    return read


def _tied_as_stored(config: Any, stored: dict[str, Any]) -> Any:
    """The config, of a family where the tensors and not config.json say whether the head is tied: as they say."""
    if not hasattr(config, "tied_if_equal"):
        return config
    one, other = (stored.get(name) for name in config.tied_if_equal)
    return dataclasses.replace(config, tied=one is None or other is None or _equal(one, other))


def _match(model: Any, table: Sequence[Entry], stored: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The stored tensor (or `Packed` kernel) of every key in the table; whatever does not fit is told in one error,
    before any is read."""
    stored = _renamed(model, stored, {key for entry in table for key in entry.keys} | model.hf_tied.keys(), directory)
    stored = {name: tensor for name, tensor in stored.items() if not _ignored(model, name)}
    fresh = _absent_parts(model, table, stored)
    expected = {key: entry for entry in table if _part(entry) not in fresh for key in entry.keys}
    tied = {other: key for other, key in model.hf_tied.items() if other not in expected and other in stored}
    twins: dict[str, Any] = {}
    for other, key in tied.items():
        twins[other] = stored.pop(other)
        stored.setdefault(key, twins[other])
    missing = [key for key in expected if key not in stored]
    unexpected = sorted(name for name in stored if name not in expected)
    unexpected[:20] = [f"{name}{suggest(name, missing)}" for name in unexpected[:20]]  # all of them could take minutes
    shapes: list[str] = []
    dtypes: list[str] = []
    for packed in (tensor for tensor in stored.values() if isinstance(tensor, Packed)):
        for told, found in zip((missing, unexpected, shapes), packed.faults(), strict=True):
            told += found
    for key in (key for key in expected if key in stored):
        shape, asked = stored[key].shape, expected[key].stored_shape
        if shape != asked:
            shapes.append(f"{key} is stored as {list(shape)}, config.json asks for {list(asked)}")
        if stored[key].dtype not in hf_files.FLOATS:
            dtypes.append(f"{key} is stored as {stored[key].dtype}, a float of 8 to 64 bits is needed")
    problems = {"missing": missing, "unexpected": unexpected, "of a wrong shape": shapes, "of a wrong dtype": dtypes}
    if any(problems.values()):
        told = [f"  {len(names)} {what}: {enumerate_some(names)}" for what, names in problems.items() if names]
        raise ValueError(
            f"{directory}: the stored tensors are not those of its config.json (model_type "
            f"{hf_files.read_json(directory / 'config.json').get('model_type')!r}):\n" + "\n".join(told) + "\n"
            "Check that config.json and the weights belong together, and that the weights are those of the whole model"
        )
    for other, key in tied.items():
        if stored[key] is not twins[other] and not _equal(stored[key], twins[other]):
            raise ValueError(
                f"{directory}: config.json ties {other} to {key}, but both are stored and differ; "
                "to keep both set tie_word_embeddings to false, to keep one take the other out of the file"
            )
    return stored


def _renamed(model: Any, stored: dict[str, Any], known: Container[str], directory: Path) -> dict[str, Any]:
    """The tensors by our keys, where a family's checkpoints have more than one name for a tensor (`hf_stored`)."""
    rename = getattr(model, "hf_stored", lambda name: name)
    renamed: dict[str, Any] = {}
    for name, tensor in stored.items():
        ours = rename(name)
        key = ours if ours in known or _ignored(model, ours) else name  # what is not ours is told by its own name
        if (other := renamed.setdefault(key, tensor)) is not tensor:
            raise ValueError(f"{directory}: {other.name} and {name} are the same tensor; take one out of the file")
    return renamed


def _absent_parts(model: Any, table: Sequence[Entry], stored: dict[str, Any]) -> set[str]:
    """The parts that the checkpoint lacks as a whole, of those that it may lack (`hf_fresh`)."""
    there = {_part(entry) for entry in table if any(key in stored for key in entry.keys)}
    return set(getattr(model, "hf_fresh", ())) - there


def _part(entry: Entry) -> str:
    return entry.path.split(".")[0]


def _ignored(model: Any, name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in model.hf_ignored)


def _equal(one: Any, other: Any, rows: int = 1024) -> bool:
    """Whether two stored tensors hold the same numbers, compared some rows at a time."""
    if one.shape != other.shape or isinstance(one, Packed) or isinstance(other, Packed):
        return False
    chunks = (slice(start, min(start + rows, one.shape[0])) for start in range(0, one.shape[0], rows))
    first, second = one.open(), other.open()
    return all(np.array_equal(np.float64(first[chunk]), np.float64(second[chunk])) for chunk in chunks)


def _load(entry: Entry, tensors: Sequence[Any], dtype: np.dtype, mesh: Mesh, encode: Encode | None) -> Any:
    """The parameter on its devices: an array, or what `encode` makes of each layer's kernel as soon as it is there."""
    stored: Any = jax.ShapeDtypeStruct(entry.stored_shape, dtype)
    order = entry.order
    if packed := isinstance(encode, Unpack):
        stored, order = encode.inputs, None
    one = jax.eval_shape(functools.partial(_made, order=order, encode=encode), stored)
    if turned := encode is not None and order == (1, 0):
        order = None  # once more it need not be
    stack = entry.shape[: entry.stacked]
    whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*stack, *leaf.shape), leaf.dtype), one)
    placed = sharding.placement(whole, entry.axes, mesh)
    part = entry.stored_sharding(sharding.spec(entry.axes, entry.shape, mesh))

    def read(tensor: Any) -> Any:
        if packed:
            return tensor.read(placed)
        value = _read(tensor, dtype, part)
        # By a program of its own: within the encoder's, the CPU's compiler reads across the rows, at three times the cost.
        return _turned(value) if turned else value

    if not entry.stacked:
        return jax.jit(_made, static_argnums=(1, 2), out_shardings=placed)(read(tensors[0]), order, encode)
    stack = jax.jit(lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), whole), out_shardings=placed)()
    options = sharding.compiler_options(mesh)
    put = jax.jit(_put, donate_argnums=0, static_argnums=(3, 4), out_shardings=placed, compiler_options=options)
    for layer, tensor in enumerate(tensors):
        # Without the wait all layers would be read before the first is in its place.
        stack = jax.block_until_ready(put(stack, read(tensor), layer, order, encode))
    return stack


def _put(stack: Any, value: Any, layer: jax.Array, order: tuple[int, ...] | None, encode: Encode | None) -> Any:
    one = _made(value, order, encode)
    return jax.tree.map(lambda all_, own: jax.lax.dynamic_update_index_in_dim(all_, own, layer, axis=0), stack, one)


_turned = jax.jit(jnp.transpose)


def _made(value: Any, order: tuple[int, ...] | None, encode: Encode | None) -> Any:
    """A stored tensor, or the parts of one, as the parameter has it."""
    value = _ordered(value, order)
    return jnp.copy(value) if encode is None else encode(value)  # what was read may lie in the file's own pages


def _ordered(value: Any, order: tuple[int, ...] | None) -> Any:
    """A stored array with the parameter's dimensions: the inverse of `_take`'s order."""
    return value if order is None else value.transpose(np.argsort(order))


def _read(tensor: StoredTensor, dtype: np.dtype, placed: NamedSharding) -> jax.Array:
    """The tensor on the devices, each device's slice read from disk and converted by itself."""
    view = tensor.open()
    read = jax.make_array_from_callback(tensor.shape, placed, lambda index: np.asarray(view[index], dtype, order="C"))
    return jax.block_until_ready(read)  # so that the host's copy is gone before anything is made of the devices'
