"""Base models from and to Hugging Face directories, one tensor at a time."""

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from peftjax import models, quant, sharding
from peftjax.core import distributed, variables
from peftjax.core.paths import matches, suggest, unmatched
from peftjax.io import bitsandbytes, hf_files
from peftjax.io.bitsandbytes import Packed, Unpack
from peftjax.io.hf_files import StoredTensor, enumerate_some, resolve
from peftjax.io.sentence import MODULES, POOLING, read_pooling, write_pooling
from peftjax.nn.linear import Linear
from peftjax.nn.slot import Slot
from peftjax.quant import FORMATS
from peftjax.quant.base import Quantized
from peftjax.quant.nf4 import Nf4

__all__ = ["load_kernels", "load_model", "make_random", "resolve", "save_model"]

Encode = Callable[[Any], Any]  # makes a quantized kernel of an array [in, out]; an `Unpack`, of its stored parts

MAX_SHARD_BYTES = 2 * 10**9
# transformers asks for it: the orientation of the tensors. One entry, because safetensors writes several in any order.
_METADATA = {"format": "pt"}
_MARK = {"saved_by": "peftjax"}  # in a config.json: save_model may replace the directory


@dataclasses.dataclass(frozen=True)
class Entry:
    """A base parameter and the checkpoint tensors that hold it: one, or one a layer if it is stacked.

    shape and axes are the parameter's, with a leading "layers" if stacked; stored_shape is that of each tensor, whose
    dimensions are the parameter's in `order` (torch keeps [out, in]: (1, 0)), or just those if it is None. hf_modules:
    what transformers calls the module that owns it, or its layers.
    """

    path: str
    hf_modules: tuple[str, ...]
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    stacked: bool
    order: tuple[int, ...] | None

    @property
    def module(self) -> str:
        """The path of the module that owns it."""
        return self.path.rpartition(".")[0]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self._stored(self.shape)

    def stored_sharding(self, whole: NamedSharding) -> NamedSharding:
        """Where one stored tensor lies so that every device has just what goes into its part of the parameter."""
        return NamedSharding(whole.mesh, PartitionSpec(*self._stored(tuple(whole.spec))))

    def _stored(self, dimensions: tuple) -> tuple:
        layer = dimensions[1:] if self.stacked else dimensions
        return layer if self.order is None else tuple(layer[axis] for axis in self.order)


def entries(model: Any) -> list[Entry]:
    """Every base parameter of a model with its checkpoint tensors, from `hf_modules` and its modules' `hf_leaves`.

    `hf_renamed`, where a family has it: the modules that checkpoints call otherwise than transformers' class does.
    """
    in_class = model.hf_modules
    in_file = in_class | getattr(model, "hf_renamed", {})
    result = []
    for path, variable in variables.flat(model)[1].items():
        if type(variable) is not nnx.Param:
            continue
        module_path, _, leaf = path.rpartition(".")
        module = functools.reduce(getattr, module_path.split("."), model)
        suffix, order = type(module).hf_leaves[leaf]
        stacked = variable.axes[0] == "layers"
        layers = range(variable.shape[0] if stacked else 1)
        modules = tuple(in_class[module_path].format(layer) for layer in layers)
        keys = tuple(f"{in_file[module_path]}.{suffix}".format(layer) for layer in layers)
        result.append(Entry(path, modules, keys, tuple(variable.shape), tuple(variable.axes), stacked, order))
    return result


# --- Loading ---


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
    config, packed = _read_config(directory, dtype, param_dtype, remat, chosen)
    if packed and skip:
        raise ValueError(f"skip={tuple(skip)!r} (model.skip_quantize): {directory} is quantized already")
    stored: dict[str, Any] = dict(hf_files.read_tensors(directory))
    if packed:
        stored = bitsandbytes.gather(stored, quantize)
    config = _tied_as_stored(config, stored)
    model = nnx.eval_shape(lambda: config.make(nnx.Rngs(0)))
    table = entries(model)
    encoders = {} if packed else _encoders(model, table, quantize, skip)
    tensors = _match(model, table, stored, directory)
    if packed:
        encoders = _unpackers(model, table, tensors)
    mesh = mesh or _one_device()
    kept = np.dtype(config.param_dtype)
    values = {
        entry.path: _load(entry, [tensors[key] for key in entry.keys], kept, mesh, encoders.get(entry.path))
        for entry in table
        if entry.keys[0] in tensors
    }
    rest = [path for path in variables.flat(model)[1] if path not in values]  # new heads, and the keys of dropout
    variables.update(model, values, _make(config, rest, mesh, seed))
    return model


def load_kernels(path: str | Path, model: Any, revision: str | None = None) -> Callable[[str, int | None], np.ndarray]:
    """The kernels of a Hugging Face directory for a model that was quantized from it: a function of a module's path and a
    layer that reads one, float32 [in, out]."""
    directory = resolve(path, revision)
    if "quantization_config" in hf_files.read_json(directory / "config.json"):
        raise ValueError(f"{directory} is quantized itself: give the directory that it was made from")
    table = entries(model)
    stored = _match(model, table, dict(hf_files.read_tensors(directory)), directory)
    of_module = {entry.module: entry for entry in table if _is_linear(model, entry)}

    def read(module: str, layer: int | None) -> np.ndarray:
        entry = of_module[module]
        return _ordered(np.asarray(stored[entry.keys[layer or 0]].open()[...], np.float32), entry.order)

    return read


def make_random(
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
    """A model with random weights, from the config.json of a directory alone; born sharded over `mesh`. The other
    arguments are those of `load_model`."""
    directory = resolve(path, revision)
    chosen = {"head": head, "labels": labels, "problem_type": problem_type, "new_head": new_head}
    config, packed = _read_config(directory, dtype, param_dtype, remat, chosen)
    if packed and not quantize:
        raise ValueError(f'{directory} is quantized; for random weights say so by quantize="nf4"')
    model = nnx.eval_shape(lambda: config.make(nnx.Rngs(0)))
    paths = list(variables.flat(model)[1])
    variables.update(model, _make(config, paths, mesh or _one_device(), seed, quantize, skip))
    return model


def _make(
    config: Any, paths: Sequence[str], mesh: Mesh, seed: int, quantize: str | None = None, skip: Sequence[str] = ()
) -> variables.FlatTree:
    """Values of some variables, as a model of this config is born with; nothing else is computed."""
    if not paths:
        return {}
    axes: dict[str, Any] = {}

    def make() -> variables.FlatTree:
        made = variables.flat(make_quantized(config, quantize, skip, seed))[1]
        axes.update({path: made[path].axes for path in paths})
        return {path: made[path].get_value() for path in paths}

    shardings = {path: sharding.placement(leaf, axes[path], mesh) for path, leaf in jax.eval_shape(make).items()}
    return jax.jit(make, out_shardings=shardings)()


def make_quantized(config: Any, quantize: str | None, skip: Sequence[str], seed: int) -> Any:
    """A model of a family's `config` with random weights, its kernels quantized as by `load_model`; to be traced."""
    model = config.make(nnx.Rngs(seed))
    leaves = variables.flat(model)[1]
    chosen = _encoders(model, entries(model), quantize, skip)
    variables.update(model, {path: quant.quantize(leaves[path].get_value(), quantize or "") for path in chosen})
    return model


def _encoders(model: Any, table: Sequence[Entry], quantize: str | None, skip: Sequence[str]) -> dict[str, Encode]:
    """What brings a kernel into its format, by its path, for those that are to be quantized."""
    if not quantize:
        if skip:
            raise ValueError(f"skip={tuple(skip)!r} (model.skip_quantize) means something only where quantize is given")
        return {}
    if quantize not in FORMATS:
        raise ValueError(
            f"quantize={quantize!r} is no format.{suggest(quantize, FORMATS)} Formats: {', '.join(FORMATS)}"
        )
    chosen: dict[str, Encode] = {}
    names: list[str] = []
    for entry in table:
        if not _is_linear(model, entry) or entry.module in model.output_layers:
            continue
        modules = entry.hf_modules
        names += modules
        skipped = [name for name in modules if matches(name, tuple(skip))]
        if skipped and len(skipped) < len(modules):
            raise ValueError(
                f"skip (model.skip_quantize): {skipped[0]} is one layer of several, which share one format; name them all"
            )
        if not skipped:
            chosen[entry.path] = FORMATS[quantize]
    if missing := unmatched(names, tuple(skip)):
        last = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise ValueError(
            f"skip (model.skip_quantize): {missing[0]!r} is no module with a kernel to quantize.{suggest(missing[0], last)} "
            f"There are: {', '.join(last)}"
        )
    return chosen


def _unpackers(model: Any, table: Sequence[Entry], tensors: dict[str, Any]) -> dict[str, Encode]:
    """`_encoders` of a model whose file holds kernels in NF4 already."""
    chosen: dict[str, Encode] = {}
    for entry in table:
        kinds = {key: tensors[key].unpack if isinstance(tensors[key], Packed) else None for key in entry.keys}
        one, *others = kinds
        if differing := [key for key in others if kinds[key] != kinds[one]]:
            told = [
                f"{key} is {f'{kind.format} of {kind.dtype}' if (kind := kinds[key]) else 'not quantized'}"
                for key in (one, differing[0])
            ]
            raise ValueError(f"{told[0]} and {told[1]}: the layers of a stack share one format")
        if (unpack := kinds[one]) is None:
            continue
        if not _is_linear(model, entry):
            raise ValueError(f"{one} is stored in {unpack.format}, which is read as the kernel of a linear layer only")
        chosen[entry.path] = unpack
    return chosen


def _is_linear(model: Any, entry: Entry) -> bool:
    """Whether the parameter is the kernel of a linear layer, which may be quantized."""
    module = functools.reduce(getattr, entry.module.split("."), model)
    return isinstance(module, Linear) and entry.path.endswith(".kernel")


def _one_device() -> Mesh:
    return sharding.make_mesh(devices=jax.local_devices()[:1])  # jax.devices()[0] may be another process's


def _read_config(
    directory: Path,
    dtype: str,
    param_dtype: str | None,
    remat: str,
    head: dict[str, Any],
) -> tuple[Any, bool]:
    """The model's config, and whether the directory holds kernels in NF4."""
    for name in (dtype, param_dtype or dtype):
        if name not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype {name!r} is not one of float32, bfloat16, float16")
    fields = {k: v for k, v in hf_files.read_json(directory / "config.json").items() if k not in _MARK}
    # Not a part of the model's config: kernels may be merged, or quantized otherwise, before it is written again.
    if quantization := fields.pop("quantization_config", None):
        bitsandbytes.check_config(quantization, directory)
    options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype or dtype, "remat": remat}
    if hasattr(models.family(fields), "HEADS"):
        options |= head | (read_pooling(directory) if head["head"] in (None, "none") else {})
    elif any(head.values()):
        given = ", ".join(f"{name}={value!r}" for name, value in head.items() if value)
        raise ValueError(
            f"{given}: a model of type {fields['model_type']!r} has no heads to choose from here; encoders have"
        )
    return models.from_hf_config(fields, **options), bool(quantization)


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


# --- Saving ---


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
            config.write_text(
                json.dumps(model.config.to_hf() | quantization | _MARK, indent=2) + "\n", encoding="utf-8"
            )
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
        elif _is_linear(model, entry):
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
    if not config.is_file() or not _MARK.items() <= hf_files.read_json(config).items():
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
