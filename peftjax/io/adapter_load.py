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
from peftjax.adapters.provenance import formats, remember_base
from peftjax.adapters.registry import ModelT, active
from peftjax.adapters.sites import head_sites
from peftjax.core import host_arrays
from peftjax.core.errors import UserError
from peftjax.core.home import expand
from peftjax.core.listing import enumerate_some
from peftjax.core.paths import matching
from peftjax.io import adapter_hub
from peftjax.io.adapter_as_lora import lora_config, lora_tensors, with_truncated_base
from peftjax.io.adapter_base import check_base, recorded_name, remember_formats
from peftjax.io.adapter_check import copies_in, reason, with_new_rows
from peftjax.io.adapter_experts_load import with_all_experts
from peftjax.io.adapter_fit import (
    older_names,
    with_all_parameters,
    with_factors_of,
    with_full_factors,
    with_joined_experts,
    with_named_layers,
    with_names,
    without_nested,
    without_parameters,
    without_unmatched,
)
from peftjax.io.adapter_head import with_whole_head
from peftjax.io.adapter_keys import bare_key, respelled, with_older_names
from peftjax.io.adapter_method import check_directory, peft_method_class
from peftjax.io.adapter_projections import drawn_projections
from peftjax.io.adapter_save import CLASSIFICATIONS, HEAD_NAMES, task_type
from peftjax.io.adapter_tensors import CONFIG, WEIGHTS, layout, tensors_of
from peftjax.io.adapter_variants import as_plain
from peftjax.io.finite import check_finite
from peftjax.io.json_files import read_json
from peftjax.io.parts import in_other_parts, warn_of_adapters
from peftjax.io.safetensors_files import read_file, read_metadata
from peftjax.methods.lora.init import RESIDUAL
from peftjax.methods.lora.lora import Lora
from peftjax.models.base import LanguageModel

PICKLE = "adapter_model.bin"
PATTERNS = ("targets", "exclude", "rank_pattern", "alpha_pattern")  # options that match names of layers
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
    method, tensors = _fitted(method, tensors, model, path, config)
    tensors = with_truncated_base(method, model, tensors, theirs, path)
    method = with_new_rows(method, model, tensors, path / WEIGHTS)
    return method, tensors | drawn_projections(method, model, config), has_head


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
    """The fields without those that no peft up to `NEWEST_PEFT` has, which peft ignores.

    The fields of a newer peft may change the result. They are kept, and rejected later.
    """
    unknown = [key for key in fields if key not in method.hf_known() and fields[key] not in (None, False, "", [], {})]
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    if not unknown or (numbers and tuple(map(int, numbers.groups())) > NEWEST_PEFT):
        return fields
    some = ", ".join(f"{key}={fields[key]!r}" for key in unknown)
    warnings.warn(f"{path / CONFIG}: {some} is ignored, since peft has no such field", stacklevel=4)
    return {key: value for key, value in fields.items() if key not in unknown}


def _fitted(
    method: Method, tensors: dict[str, np.ndarray], model: nnx.Module, path: Path, config: Mapping[str, Any]
) -> tuple[Method, dict[str, np.ndarray]]:
    """The method and the tensors in this model's names, without what peft ignores; one warning names it.

    Raises:
        UserError: The adapter needs a changed base that cannot be computed.
    """
    older, parameters = older_names(model, tensors), config.get("target_parameters") or ()
    with matching(str(path / CONFIG), *(value for option, value in vars(method).items() if option in PATTERNS)):
        method = with_joined_experts(with_names(method, model, older), model)
        method = with_named_layers(method, model, config.get("layers_pattern"))
        method = with_all_parameters(method, model, parameters)
        method = without_parameters(method, model, tensors, parameters)
        method, inner = without_nested(method, model)
        method, removed = without_unmatched(method, model, with_older_names(tensors, older))
    if inner:
        warnings.warn(
            f"{path / CONFIG}: modules_to_save {', '.join(map(repr, inner))} also matches modules inside others that are "
            "trained in full, and is ignored for the inner ones",
            stacklevel=3,
        )
    if removed:
        warnings.warn(
            f"{path / CONFIG}: ignoring entries that match nothing in this model: {'; '.join(removed)}", stacklevel=3
        )
    method, differing = with_factors_of(method, tensors)
    if differing:
        warnings.warn(
            f"{path / CONFIG}: ignoring {differing}, because the tensors have another number of factors", stacklevel=3
        )
    _check_residual(method, model, path)
    return with_full_factors(method, model, with_older_names(tensors, older))


def _check_residual(method: Method, model: nnx.Module, path: Path) -> None:
    """Check that the initial update that is to be subtracted from the base can be computed.

    Raises:
        UserError: The base is quantized, or the rank exceeds a dimension of a layer.
    """
    if not isinstance(method, Lora) or not RESIDUAL.fullmatch(method.init):
        return
    try:
        method.check(model)
    except UserError as error:
        raise UserError(f"{path / CONFIG}: init_lora_weights={method.init!r}: {error}") from error
    if kinds := set(formats(model).values()):
        raise UserError(
            f"{path / CONFIG}: init_lora_weights={method.init!r} subtracts the initial update from the base, and the update cannot be "
            f"recomputed from {', '.join(sorted(kinds))} kernels; load the base without quantize=, call load_adapter and "
            "save_adapter, and load that plain LoRA on the quantized base"
        )


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
    unexpected -= copies_in(model, tensors, unexpected)
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
            raise UserError(f"{path / keys.weights}: {tensor.key} {error}{reason(tensor, tensors)}") from None
    for variable, buffer in zip(variables.values(), buffers.values(), strict=True):
        variable.set_value(host_arrays.placed(buffer, variable.get_value().sharding))
