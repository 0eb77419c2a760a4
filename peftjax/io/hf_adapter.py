"""Adapter directories in the format of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors.

Those of bottleneck adapters, which PEFT does not have, are in the format of AdapterHub (`adapter_hub`).
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save

from peftjax.adapters import attached, detach, provenance, use
from peftjax.adapters.adapter import HfLeaf, MethodAdapter
from peftjax.adapters.attach import attach_unchecked, release_head
from peftjax.adapters.method import Method
from peftjax.adapters.registry import active, parameters_before
from peftjax.adapters.sites import Site, adapters_named, head_sites, sites, tied_kernel
from peftjax.adapters.soft_prompt import SoftPrompt
from peftjax.core import distributed, variables
from peftjax.core.distributed import OnHost
from peftjax.core.fingerprint import marks
from peftjax.core.paths import suggest
from peftjax.io import adapter_hub
from peftjax.io.adapter_hub import Files
from peftjax.io.hf_files import enumerate_some, read_header, read_json, read_metadata
from peftjax.methods import METHODS
from peftjax.methods.bottleneck import Bottleneck
from peftjax.quant.base import Quantized

PREFIX, PROMPT_PREFIX = "base_model.model.", "base_model."  # peft puts a prompt beside a model, other methods into it
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
# In the metadata of the weights: by path, the marks of the base's arrays, and the formats of its quantized kernels.
BASE, FORMATS = "peftjax.base", "peftjax.formats"
# Fields of adapter_config.json that are not the method's.
ABOUT = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
}
CLASSIFICATIONS = ("SEQ_CLS", "TOKEN_CLS")  # the task types beside which peft trains the head whole
HEAD_NAMES = ("classifier", "score")  # what it takes for a head then


def save_adapter(model: Any, path: str | Path, name: str = "default", *, base: str | None = None) -> Path:
    """Write the adapters called `name` as a directory that Hugging Face PEFT (or AdapterHub) loads; returns its path.

    base: what to record as base_model_name_or_path. A new directory appears whole or not at all; in one that is there
    the two files are replaced, each whole, and others stay.

    Raises:
        ValueError: no such adapter, or the method has no Hugging Face format.

    Example:
        >>> import peftjax
        >>> from flax import nnx
        >>> model = peftjax.load_model("embedded")
        >>> model = peftjax.attach(model, peftjax.Lora(rank=4), rngs=nnx.Rngs(0))
        >>> path = peftjax.save_adapter(model, "my-adapter")
    """
    method = _method(model, name)
    tensors = adapter_tensors(model, name)
    record = _record(model, base_marks(model, name))
    if isinstance(method, Bottleneck):
        files = _hub_files(model, method, name, base, tensors, record)
    else:
        config = {
            "peft_type": method.peft_type,
            "task_type": _task_type(model),
            "base_model_name_or_path": base,
            "revision": None,
            "inference_mode": True,
            "auto_mapping": None,
        } | method.to_hf(model, name)
        if _task_type(model) is None and (heads := _trained_heads(model, name)):  # else the task says it
            saved = config.get("modules_to_save") or []
            config["modules_to_save"] = [*saved, *(head for head in heads if head not in saved)]
        files = {WEIGHTS: _weights(tensors, record), CONFIG: _json(config)}
    path = Path(path)
    if jax.process_index() == 0:
        _write(path, files)
    distributed.meet("save_adapter")  # every process may read it once it returns
    return path


def _write(path: Path, files: dict[str, bytes]) -> None:
    scratch = path.with_name(f".{path.name}.peftjax-tmp")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed
    scratch.mkdir(parents=True)
    try:
        for file, content in files.items():
            (scratch / file).write_bytes(content)
        if path.exists():
            for file in files:
                (scratch / file).replace(path / file)
        else:
            scratch.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _hub_files(
    model: Any, method: Bottleneck, name: str, base: str | None, tensors: dict[str, jax.Array], record: dict[str, str]
) -> dict[str, bytes]:
    head = {key: value for key, value in tensors.items() if ".adapters." not in key}
    rest = {key: value for key, value in tensors.items() if key not in head}
    files = {
        adapter_hub.WEIGHTS: _weights(adapter_hub.with_both_names(rest, method), record),
        CONFIG: _json(adapter_hub.make_config(model, method, name, base)),
    }
    if head:
        files |= {
            adapter_hub.HEAD: _weights(head, {}),
            adapter_hub.HEAD_CONFIG: _json(adapter_hub.head_config(model, base)),
        }
    return files


def weights_bytes(model: Any, name: str = "default") -> int:
    """The bytes of the safetensors files that `save_adapter` writes; the model may be shapes alone."""
    method = _method(model, name)
    graph, state = nnx.split(model)
    tensors = jax.eval_shape(lambda state: adapter_tensors(nnx.merge(graph, state), name), state)
    record = _record(model, dict.fromkeys(_marked(model, name), "0" * 16))
    if not isinstance(method, Bottleneck):
        return _file_bytes(tensors, record)
    head = {key: value for key, value in tensors.items() if ".adapters." not in key}
    rest = {key: value for key, value in tensors.items() if key not in head}
    size = _file_bytes(adapter_hub.with_both_names(rest, method), record)
    return size + (_file_bytes(head, {}) if head else 0)


def _file_bytes(tensors: dict[str, jax.ShapeDtypeStruct], metadata: dict[str, str]) -> int:
    """Of `_weights`: the header's length, the header, the tensors in the library's order, the widest first."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | metadata}
    end = 0
    for key, value in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        begin, end = end, end + value.size * value.dtype.itemsize
        short = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[value.dtype.name]
        header[key] = {"dtype": short, "shape": list(value.shape), "data_offsets": [begin, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + length + -length % 8 + end


def _record(model: Any, marked: dict[str, str]) -> dict[str, str]:
    return {BASE: json.dumps(marked), FORMATS: json.dumps(provenance.formats(model))}


def _weights(tensors: dict[str, jax.Array], metadata: dict[str, str]) -> bytes:
    arrays = {key: np.ascontiguousarray(distributed.whole(value)) for key, value in tensors.items()}
    return _in_order(save(arrays, metadata={"format": "pt"} | metadata))


def _json(config: dict[str, Any]) -> bytes:
    # sorted at the top only: of rank_pattern's and alpha_pattern's entries the first that matches counts
    return (json.dumps(dict(sorted(config.items())), indent=2) + "\n").encode()


def _task_type(model: Any) -> str | None:
    """What peft calls the model's task; None where it has no word for it, and takes an adapter of any task."""
    return getattr(model, "hf_task", "CAUSAL_LM")


def _trained_heads(model: Any, name: str) -> list[str]:
    """The names of the layers of a classification head that are trained as a part of the adapters called `name`."""
    return [hf for site in head_sites(model) if name in site.module.adapters.names() for hf in site.names]


def load_adapter(model: Any, path: str | Path, name: str = "default", *, any_base: bool = False) -> Any:
    """Attach the adapter of a Hugging Face PEFT (or AdapterHub) directory under `name`, active; returns the model.

    A directory written here records marks of the weights it was trained on; any_base: take it to other ones, if their
    shapes allow. Files of others say nothing about it. A base in another dtype, or quantized, is not another one.

    Raises:
        ValueError: a file is missing, the config asks for what is not supported, a tensor is missing, unread or of
            another shape, or the adapter was trained on another base. The model is unchanged then.

    Example:
        >>> import peftjax
        >>> from flax import nnx
        >>> model = peftjax.load_model("embedded")
        >>> model = peftjax.attach(model, peftjax.Lora(rank=4), rngs=nnx.Rngs(0))
        >>> path = peftjax.save_adapter(model, "my-adapter")
        >>> model = peftjax.load_adapter(model, "my-adapter", name="again")
    """
    path = Path(path)
    if adapter_hub.is_hub(path):
        method, tensors = adapter_hub.read(path, model, name)
        has_head = (path / adapter_hub.HEAD).is_file()
    else:
        method, has_head = _read_method(path, model)
        tensors = {key: np.array(stored.open()[...]) for key, stored in read_header(path / WEIGHTS).items()}
    before = active(model)
    attach_unchecked(model, method, name, rngs=nnx.Rngs(0))
    try:
        if not has_head:
            release_head(model, name)
        _fill(model, name, tensors, path)
        metadata = read_metadata(path / _files(model, name).weights)
        if not any_base:
            _check_base(model, name, path, metadata)
        _remember_formats(model, name, path, metadata)
    except Exception:
        use(detach(model, name), before)
        raise
    return model


def _method(model: Any, name: str) -> Method:
    methods = attached(model)
    if name not in methods:
        raise ValueError(f"no adapter {name!r} is attached.{suggest(name, methods)} Attached: {list(methods)}")
    if methods[name].peft_type is None and not isinstance(methods[name], Bottleneck):
        raise ValueError(f"{methods[name].method} has no adapter file; save the whole model with save_model")
    return methods[name]


def _read_method(path: Path, model: Any) -> tuple[Method, bool]:
    """The method of a directory, and whether its file holds a classification head."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; give the one that holds {CONFIG} and {WEIGHTS}")
    there = sorted(item.name for item in path.iterdir())
    if PICKLE in there and WEIGHTS not in there:
        raise ValueError(
            f"{path} has only {PICKLE}, a pickle, which can run any code and is never read here; convert it to "
            'safetensors: load it with peft and call model.save_pretrained("DIR")'
        )
    for file in (CONFIG, WEIGHTS):
        if file not in there:
            raise ValueError(
                f"{path} is no adapter directory: {file} is missing; it holds {', '.join(there) or 'nothing'}"
            )
    config = read_json(path / CONFIG)
    classes = {cls.peft_type: cls for cls in METHODS.values() if cls.peft_type}
    if (kind := config.get("peft_type")) not in classes:
        raise ValueError(
            f"{path / CONFIG}: peft_type {kind!r} is not supported; supported: {', '.join(sorted(classes))}"
        )
    rest = {key: value for key, value in config.items() if key not in ABOUT}
    task = config.get("task_type")
    if task in CLASSIFICATIONS and _task_type(model) not in (task, None):
        raise ValueError(
            f"{path / CONFIG}: task_type {task!r} needs a model with such a head, and this one is for "
            f"{_task_type(model)}; give load_model the head and the number of labels"
        )
    saved = rest.get("modules_to_save") or []
    if task in CLASSIFICATIONS or head_sites(model):  # trained beside any method; peft lists all names that it may have
        rest["modules_to_save"] = [entry for entry in saved if entry not in HEAD_NAMES]
    return classes[kind].from_hf(rest), task in CLASSIFICATIONS or any(entry in HEAD_NAMES for entry in saved)


class _Tensor(NamedTuple):
    """A tensor of the adapter's file and where it lives; layer: None for a whole leaf."""

    key: str
    adapter: MethodAdapter
    layer: int | None
    leaf: HfLeaf

    def array(self) -> jax.Array:
        value = getattr(self.adapter, self.leaf.leaf).get_value()
        return value if self.layer is None else value[self.layer]


def _files(model: Any, name: str) -> Files:
    method = attached(model)[name]
    if isinstance(method, Bottleneck):
        return adapter_hub.files(name)
    return Files(WEIGHTS, PROMPT_PREFIX if isinstance(method, SoftPrompt) else PREFIX, ".")


def _in_file(model: Any, name: str) -> list[_Tensor]:
    found: dict[str, _Tensor] = {}
    files = _files(model, name)
    heads = [site.path for site in head_sites(model)]
    for site, adapter in adapters_named(model, name):
        key_of = files.head_key if site.path in heads else files.key
        written = adapter.exported()
        for key, leaf in written.hf_shared().items():
            found.setdefault(key, _Tensor(key, written, None, leaf))  # the same in each layer that shares it
        for layer, hf in zip(site.layers, site.names, strict=True):
            for suffix, leaf in written.hf_leaves(layer).items():
                key = key_of(hf, suffix)
                found[key] = _Tensor(key, written, layer, leaf)
    return list(found.values())


def adapter_tensors(model: Any, name: str = "default") -> dict[str, jax.Array]:
    """What the adapter's file holds, by key."""
    return {tensor.key: tensor.leaf.write(tensor.array()) for tensor in _in_file(model, name)}


def _fill(model: Any, name: str, tensors: dict[str, np.ndarray], path: Path) -> None:
    expected, files = _in_file(model, name), _files(model, name)
    unread = set(tensors) - {tensor.key for tensor in expected}
    unread -= _copies_of_base(model, {key: tensors[key] for key in unread}, files.prefix)
    missing = [tensor.key for tensor in expected if tensor.key not in tensors]
    if missing or unread:
        parts = [
            f"{word} {enumerate_some(keys, 6)}"
            for word, keys in (("missing", missing), ("unexpected", sorted(unread)))
            if keys
        ]
        raise ValueError(f"{path / files.weights} does not fit its config and this model: {'; '.join(parts)}")
    filled: dict[int, tuple[nnx.Variable, np.ndarray]] = {}
    for tensor in expected:
        variable = getattr(tensor.adapter, tensor.leaf.leaf)
        if id(variable) not in filled:
            filled[id(variable)] = variable, np.array(distributed.whole(variable.get_value()))
        _, buffer = filled[id(variable)]
        try:
            tensor.leaf.read(tensors[tensor.key], buffer if tensor.layer is None else buffer[tensor.layer])
        except ValueError as error:
            raise ValueError(f"{path / files.weights}: {tensor.key} {error}: the adapter is for another base") from None
    for variable, buffer in filled.values():
        variable.set_value(distributed.placed(buffer, variable.get_value().sharding))


def _in_order(file: bytes) -> bytes:
    """A safetensors file with its metadata sorted, which the library writes in an order that changes from run to run."""
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + file[start:]


def base_marks(model: Any, name: str) -> dict[str, str]:
    """Marks of the weights beneath the adapters called `name`, by path; of those that are not quantized."""
    marked = _marked(model, name)
    found = marks({path: array for path, array in marked.items() if not isinstance(array, OnHost)})
    for path, kept in marked.items():
        if isinstance(kept, OnHost):  # one at a time on the devices
            found |= marks({path: kept.back()})
    return {path: found[path] for path in marked}


def _marked(model: Any, name: str) -> dict[str, Any]:
    arrays = {path: leaf.get_value() for path, leaf in variables.flat(model)[1].items() if type(leaf) is nnx.Param}
    arrays |= parameters_before(model, name)
    return {
        path: array
        for path, array in arrays.items()
        if not isinstance(array, Quantized) and array.dtype in (jnp.float32, jnp.bfloat16)
    }


def _check_base(model: Any, name: str, path: Path, metadata: dict[str, str]) -> None:
    recorded = json.loads(metadata.get(BASE, "{}"))
    own = base_marks(model, name)
    differ = [leaf for leaf in recorded if leaf in own and own[leaf] != recorded[leaf]]
    if differ:
        raise ValueError(
            f"{path} was trained on another base: its weights differ from this model's in {enumerate_some(differ, 3)}. "
            "Load the base it was made for, or, if that is meant, load_adapter(..., any_base=True)"
        )


def _remember_formats(model: Any, name: str, path: Path, metadata: dict[str, str]) -> None:
    recorded, own = json.loads(metadata.get(FORMATS, "{}")), provenance.formats(model)
    provenance.remember(model, name, recorded)
    if FORMATS in metadata and recorded != own:
        here, there = (", ".join(sorted(set(kinds.values()))) or "not quantized" for kinds in (own, recorded))
        warnings.warn(
            f"{path} was trained on a base whose kernels are in another format than this one's (there {there}, here "
            f"{here}), so it does not compute here what it did there; merge() measures by how much the kernels differ",
            stacklevel=3,
        )


def _copies_of_base(model: Any, tensors: dict[str, np.ndarray], prefix: str) -> set[str]:
    """Those of the keys that only repeat the base: peft stores the table of an embedding or a head beside its LoRA."""
    copies = set()
    for site in sites(model):
        for leaf, (suffix, order) in getattr(type(site.module), "hf_leaves", {}).items():
            for layer, hf in zip(site.layers, site.names, strict=True):
                for key in tensors.keys() & {f"{prefix}{hf}.{suffix}", f"{prefix}{hf}.base_layer.{suffix}"}:
                    if (own := _base_value(model, site, leaf, layer)) is None:
                        continue
                    if not _same(tensors[key], own if order is None else own.transpose(order)):
                        raise ValueError(
                            f"{key} differs from this model's own: the adapter was trained on another base"
                        )
                    copies.add(key)
    return copies


def _base_value(model: Any, site: Site, leaf: str, layer: int | None) -> np.ndarray | None:
    if leaf in site.parameters:
        value = site.parameters[leaf].get_value()
        one = value if layer is None else jax.tree.map(lambda stack: stack[layer], value)
        return np.asarray(one.astype(one.dtype))
    return np.asarray(tied_kernel(model)) if leaf == "kernel" else None


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are equal once both are rounded to the narrower of their dtypes."""
    narrow = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return np.array_equal(one.astype(narrow), other.astype(narrow))
