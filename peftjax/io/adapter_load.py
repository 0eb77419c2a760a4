"""Read adapter directories of Hugging Face PEFT and of AdapterHub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from peftjax.adapters import detach, use
from peftjax.adapters.attach import attach_unchecked, release_head
from peftjax.adapters.method import Method
from peftjax.adapters.registry import ModelT, active
from peftjax.adapters.sites import Site, head_sites, sites, tied_kernel
from peftjax.core import distributed
from peftjax.core.errors import UserError
from peftjax.io import adapter_hub
from peftjax.io.adapter_base import check_base, remember_formats
from peftjax.io.adapter_save import task_type
from peftjax.io.adapter_tensors import CONFIG, WEIGHTS, layout, tensors_of
from peftjax.io.hf_files import enumerate_some, read_header, read_json, read_metadata
from peftjax.methods import METHODS

PICKLE = "adapter_model.bin"
# Fields of adapter_config.json that do not belong to the method.
GENERAL_FIELDS = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
}
CLASSIFICATIONS = ("SEQ_CLS", "TOKEN_CLS")  # the task types for which peft trains the whole task head
HEAD_NAMES = ("classifier", "score")  # the modules that peft takes for the task head


def load_adapter(model: ModelT, path: str | Path, name: str = "default", *, any_base: bool = False) -> ModelT:
    """Attach the adapter in a Hugging Face PEFT or AdapterHub directory and activate it, deactivating all others.

    A directory from `save_adapter` records fingerprints of the weights that the adapter was trained on. They do not
    depend on the base's dtype or quantization. A directory from another library records nothing, and is not checked.

    Args:
        model: The model; it is changed in place.
        path: The directory.
        name: Name of the adapter in this model.
        any_base: Accept an adapter that was trained on other weights of the same shapes.

    Returns:
        The model.

    Raises:
        UserError: A file is missing, the config asks for something that is not supported, a tensor is missing,
            unexpected or of a wrong shape, or the adapter was trained on another base. The model is unchanged.

    Examples:
        >>> import peftjax
        >>> from flax import nnx
        >>> model = peftjax.load_model("embedded")
        >>> model = peftjax.attach(model, peftjax.Lora(rank=4), rngs=nnx.Rngs(0))
        >>> path = peftjax.save_adapter(model, "my-adapter")
        >>> model = peftjax.load_adapter(model, "my-adapter", name="again")
    """
    path = Path(path)
    method: Method
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
        metadata = read_metadata(path / layout(model, name).weights)
        if not any_base:
            check_base(model, name, path, metadata)
        remember_formats(model, name, path, metadata)
    except Exception:
        use(detach(model, name), before)
        raise
    return model


def _read_method(path: Path, model: nnx.Module) -> tuple[Method, bool]:
    """The method of a PEFT directory, and whether its file holds the task head."""
    _check_files(path)
    config = read_json(path / CONFIG)
    classes = {cls.peft_type: cls for cls in METHODS.values() if cls.peft_type}
    if (kind := config.get("peft_type")) not in classes:
        raise UserError(
            f"{path / CONFIG}: peft_type {kind!r} is not supported; supported: {', '.join(sorted(classes))}"
        )
    fields = {key: value for key, value in config.items() if key not in GENERAL_FIELDS}
    task = config.get("task_type")
    if task in CLASSIFICATIONS and task_type(model) not in (task, None):
        raise UserError(
            f"{path / CONFIG}: task_type {task!r} needs a model with that task head, but this model is for "
            f"{task_type(model)}; pass head= and labels= to load_model"
        )
    saved = fields.get("modules_to_save") or []
    if task in CLASSIFICATIONS or head_sites(model):
        # The task head is trained with every method, and peft lists every name that it may have.
        fields["modules_to_save"] = [entry for entry in saved if entry not in HEAD_NAMES]
    return classes[kind].from_hf(fields), task in CLASSIFICATIONS or any(entry in HEAD_NAMES for entry in saved)


def _check_files(path: Path) -> None:
    """Check that a PEFT directory has its two files."""
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give the one that holds {CONFIG} and {WEIGHTS}")
    there = sorted(item.name for item in path.iterdir())
    if PICKLE in there and WEIGHTS not in there:
        raise UserError(
            f"{path} has only {PICKLE}, a pickle. Reading a pickle can run arbitrary code, so it is not supported; convert "
            'it to safetensors: load it with peft and call model.save_pretrained("DIR")'
        )
    for file in (CONFIG, WEIGHTS):
        if file not in there:
            raise UserError(
                f"{path} is not an adapter directory: {file} is missing; it holds {', '.join(there) or 'no files'}"
            )


def _fill(model: nnx.Module, name: str, tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Write the tensors of the files into the variables of adapter `name`.

    Raises:
        UserError: A tensor is missing, unexpected or of a wrong shape, or a copy of a base parameter differs from it.
    """
    expected, keys = tensors_of(model, name), layout(model, name)
    unexpected = set(tensors) - {tensor.key for tensor in expected}
    unexpected -= _copies_of_base(model, {key: tensors[key] for key in unexpected}, keys.prefix)
    missing = [tensor.key for tensor in expected if tensor.key not in tensors]
    if missing or unexpected:
        parts = [
            f"{word} {enumerate_some(names, 6)}"
            for word, names in (("missing", missing), ("unexpected", sorted(unexpected)))
            if names
        ]
        raise UserError(f"{path / keys.weights} does not match its config and this model: {'; '.join(parts)}")
    filled: dict[int, tuple[nnx.Variable, np.ndarray]] = {}  # tensors may share a variable
    for tensor in expected:
        variable = tensor.variable
        if id(variable) not in filled:
            filled[id(variable)] = variable, np.array(distributed.whole(variable.get_value()))
        _, buffer = filled[id(variable)]
        try:
            tensor.leaf.read(tensors[tensor.key], tensor.of_layer(buffer))
        except UserError as error:
            raise UserError(
                f"{path / keys.weights}: {tensor.key} {error}; the adapter was made for another base"
            ) from None
    for variable, buffer in filled.values():
        variable.set_value(distributed.placed(buffer, variable.get_value().sharding))


def _copies_of_base(model: nnx.Module, tensors: Mapping[str, np.ndarray], prefix: str) -> set[str]:
    """The keys of tensors that repeat a parameter of the base: peft saves the embedding or the head beside its LoRA.

    Raises:
        UserError: Such a tensor differs from the model's parameter.
    """
    copies = set()
    for site in sites(model):
        for leaf, (suffix, order) in site.module.hf_leaves.items():
            for layer, hf in zip(site.layers, site.names, strict=True):
                for key in tensors.keys() & {f"{prefix}{hf}.{suffix}", f"{prefix}{hf}.base_layer.{suffix}"}:
                    if (own := _base_value(model, site, leaf, layer)) is None:
                        continue
                    if not _same(tensors[key], own if order is None else own.transpose(order)):
                        raise UserError(
                            f"{key} differs from this model's parameter: the adapter was trained on another base"
                        )
                    copies.add(key)
    return copies


def _base_value(model: nnx.Module, site: Site, leaf: str, layer: int | None) -> np.ndarray | None:
    """One layer of a base parameter; None if the module does not have it."""
    if leaf in site.parameters:
        value = site.parameters[leaf].get_value()
        one: Any = value if layer is None else jax.tree.map(lambda stack: stack[layer], value)
        return np.asarray(one.astype(one.dtype))  # decodes a quantized kernel
    return np.asarray(tied_kernel(model)) if leaf == "kernel" else None


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are equal once both are rounded to the narrower of their dtypes."""
    narrow = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return np.array_equal(one.astype(narrow), other.astype(narrow))
