"""Read adapter directories of Hugging Face PEFT and of AdapterHub."""

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from peftjax.adapters import detach, use
from peftjax.adapters.attach import attach_unchecked, release_head
from peftjax.adapters.method import Method
from peftjax.adapters.projected import Projected
from peftjax.adapters.provenance import remember_base
from peftjax.adapters.registry import ModelT, active
from peftjax.adapters.sites import head_sites
from peftjax.core import host_arrays
from peftjax.core.errors import UserError
from peftjax.core.home import expand
from peftjax.core.listing import enumerate_some
from peftjax.io import adapter_hub
from peftjax.io.adapter_as_lora import lora_config, lora_tensors, with_truncated_base
from peftjax.io.adapter_base import check_base, recorded_name, remember_formats
from peftjax.io.adapter_copies import copies_in, with_new_rows
from peftjax.io.adapter_experts_load import with_all_experts
from peftjax.io.adapter_fit import fitted
from peftjax.io.adapter_head import with_whole_head
from peftjax.io.adapter_keys import bare_key, respelled
from peftjax.io.adapter_method import check_directory, peft_method_class
from peftjax.io.adapter_save import CLASSIFICATIONS, HEAD_NAMES, task_type
from peftjax.io.adapter_tensors import CONFIG, WEIGHTS, AdapterTensor, layout, tensors_of
from peftjax.io.adapter_variants import as_plain
from peftjax.io.finite import check_finite
from peftjax.io.json_files import read_json
from peftjax.io.multimodal import in_other_parts, warn_of_adapters
from peftjax.io.safetensors_files import read_file, read_metadata
from peftjax.models.base import LanguageModel, Model
from peftjax.nn.experts import ExpertLinear

PICKLE = "adapter_model.bin"
NEWEST_PEFT = (0, 21)  # whose fields `Method.hf_known` lists
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
    path = expand(path)
    method: Method
    if adapter_hub.is_hub(path):
        method, tensors = adapter_hub.read_adapter(path, model, name)
        has_head = (path / adapter_hub.HEAD).is_file()
    else:
        method, tensors, has_head = _read(path, model)
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
        remember_base(model, name, recorded_name(path))
    except Exception:  # of any kind: the model is restored
        use(detach(model, name), before)
        raise
    return model


def method_for(path: Path, model: nnx.Module) -> Method:
    """Return the method of a PEFT directory as `load_adapter` attaches it to a model, which may be abstract.

    Raises:
        UserError: As `load_adapter`, except for tensors that are missing or unexpected.
    """
    return _read(path, model)[0]


def _read(path: Path, model: nnx.Module) -> tuple[Method, dict[str, np.ndarray], bool]:
    """The method and the tensors of a PEFT directory in the model's names, and whether its file holds the task head."""
    _check_files(path)
    theirs = read_json(path / CONFIG)
    config = lora_config(theirs)
    method, has_head = _read_method(config, model, path)
    tensors = as_plain(lora_tensors(read_file(path / WEIGHTS), theirs, path), config)
    tensors, replaced = with_whole_head(method, tensors, model, path / WEIGHTS)
    has_head = replaced or _holds_head(method, has_head, tensors, model)
    method, tensors = with_all_experts(method, tensors, model)
    method, tensors = fitted(method, tensors, model, path, config)
    tensors = with_truncated_base(method, model, tensors, theirs, path)
    method = with_new_rows(method, model, tensors, path / WEIGHTS)
    if config.get("save_projection") is False and isinstance(method, Projected):
        tensors = tensors | _drawn_projections(method, model)
    return method, tensors, has_head


def _read_method(config: Mapping[str, Any], model: nnx.Module, path: Path) -> tuple[Method, bool]:
    """The method that an adapter_config.json describes, and whether the file of the tensors holds the task head."""
    method = peft_method_class(config, path)
    general = GENERAL_FIELDS - method.hf_constants.keys()
    fields = {key: value for key, value in config.items() if key not in general}
    task = config.get("task_type")
    if task in CLASSIFICATIONS and task_type(model) not in (task, None):
        fix = (
            "language models have none in peftjax"
            if isinstance(model, LanguageModel)
            else "pass head= and labels= to load_model"
        )
        raise UserError(
            f"{path / CONFIG}: task_type {task!r} needs a model with that task head, but this model is for "
            f"{task_type(model)}; {fix}"
        )
    saved = fields.get("modules_to_save") or []
    if task in CLASSIFICATIONS or head_sites(model):
        # The task head is trained with every method, and peft lists every name that it may have.
        fields["modules_to_save"] = [entry for entry in saved if entry not in HEAD_NAMES]
    fields = _without_unknown(fields, method, config.get("peft_version"), path)
    return method.from_hf(fields), task in CLASSIFICATIONS or any(entry in HEAD_NAMES for entry in saved)


def _holds_head(method: Method, by_config: bool, tensors: Iterable[str], model: nnx.Module) -> bool:
    """Whether a file with these tensors holds the task head; by_config: whether its config says so."""
    names = [bare_key(name) for site in head_sites(model) for name in site.names]
    held = any(bare_key(key).startswith(f"{name}.") for key in tensors for name in names)
    # peft does not train the head with methods whose config has no modules_to_save.
    return by_config and (held or "modules_to_save" in method.hf_known())


def _without_unknown(fields: dict[str, Any], method: type[Method], version: str | None, path: Path) -> dict[str, Any]:
    """The fields, without those that peft ignores because no version up to `NEWEST_PEFT` has them.

    The fields of a newer peft may change the result. They are kept, and rejected later.
    """
    unknown = [key for key in fields if key not in method.hf_known() and fields[key] not in (None, False, "", [], {})]
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    if not unknown or (numbers and tuple(map(int, numbers.groups())) > NEWEST_PEFT):
        return fields
    some = ", ".join(f"{key}={fields[key]!r}" for key in unknown)
    warnings.warn(f"{path / CONFIG}: {some} is ignored, since peft has no such field", stacklevel=4)
    return {key: value for key, value in fields.items() if key not in unknown}


def _drawn_projections(method: Projected, model: nnx.Module) -> dict[str, np.ndarray]:
    """The random projections that a file with save_projection=False lacks, by key; peft draws them from the seed.

    Raises:
        UserError: Their sizes also depend on modules that this model lacks.
    """
    chosen = method.chosen(model)
    if (isinstance(model, Model) and model.hf_part) or any(isinstance(site.module, ExpertLinear) for site, _ in chosen):
        raise UserError(
            f"{CONFIG}: save_projection=False: the file lacks its random projections, and their sizes depend on modules of "
            "other parts of this model. Save it again from peft with save_projection=True"
        )
    return method.peft_projections(chosen)


def _check_files(path: Path) -> None:
    """Check that a PEFT directory has its two files."""
    if (path / PICKLE).exists() and not (path / WEIGHTS).exists():
        raise UserError(
            f"{path} has only {PICKLE}, a pickle. Reading a pickle can run arbitrary code, so it is not supported; convert "
            'it to safetensors: load it with peft and call model.save_pretrained("DIR")'
        )
    check_directory(path, (CONFIG, WEIGHTS))


def _fill(model: nnx.Module, name: str, tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Write the tensors of the files into the variables of adapter `name`.

    Raises:
        UserError: A tensor is missing, unexpected, not finite or of a wrong shape, or a copy of a base parameter differs
            from it.
    """
    expected, keys = tensors_of(model, name, exported=False), layout(model, name)
    tensors, renamed = respelled(tensors, (tensor.key for tensor in expected))
    if renamed:
        key, old = next(iter(renamed.items()))
        warnings.warn(
            f"{path / keys.weights}: {len(renamed)} keys differ from peft's by a prefix or the adapter's name ({old} is "
            f"read as {key})",
            stacklevel=3,
        )
    unexpected = set(tensors) - {tensor.key for tensor in expected}
    if others := in_other_parts(unexpected):
        warn_of_adapters(others, path / keys.weights)
        unexpected -= set(others)
    unexpected -= copies_in(model, name, tensors, unexpected)
    missing = [tensor.key for tensor in expected if tensor.key not in tensors]
    if missing or unexpected:
        parts = [
            f"{word} {enumerate_some(names, 6)}"
            for word, names in (("missing", missing), ("unexpected", sorted(unexpected)))
            if names
        ]
        raise UserError(f"{path / keys.weights} does not match its config and this model: {'; '.join(parts)}")
    variables = {id(tensor.variable): tensor.variable for tensor in expected}  # tensors may share one
    buffers = {key: np.array(host_arrays.whole(variable.get_value())) for key, variable in variables.items()}
    for tensor in expected:
        check_finite(tensors[tensor.key], f"{path / keys.weights}: {tensor.key}")
        try:
            tensor.leaf.read(tensors[tensor.key], tensor.of_layer(buffers[id(tensor.variable)]))
        except UserError as error:
            raise UserError(
                f"{path / keys.weights}: {tensor.key} {error}{_reason(tensor, tensors[tensor.key])}"
            ) from None
    for variable, buffer in zip(variables.values(), buffers.values(), strict=True):
        variable.set_value(host_arrays.placed(buffer, variable.get_value().sharding))


def _reason(tensor: AdapterTensor, stored: np.ndarray) -> str:
    """Why the shape of a stored tensor differs from the model's, for the end of a message; empty if that is not certain."""
    leaf = tensor.leaf
    if leaf.shape is not None or (leaf.axes is None and stored.ndim != 1):
        return ""
    names = [axis for axis in tensor.variable.axes if axis != "layers"]
    needed = leaf.write(tensor.of_layer(np.broadcast_to(np.zeros(()), tensor.variable.shape))).shape
    names = names if leaf.axes is None else [names[axis] for axis in leaf.axes]
    if len(needed) != stored.ndim:
        return ""
    differ = {name for name, one, other in zip(names, needed, stored.shape, strict=True) if one != other}
    of_base = {"vocab", "embed", "heads", "kv_heads", "head_dim", "mlp"}
    if differ == {"rank"}:
        return f"; {CONFIG} gives a different rank"
    if differ == {"vocab"}:
        return "; the adapter was made for a vocabulary of a different size: resize the embedding of the base first"
    return "; the adapter was made for another base" if differ and differ <= of_base else ""
