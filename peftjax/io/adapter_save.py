"""Write adapter directories in the format of Hugging Face PEFT, or of AdapterHub for bottleneck adapters."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save

from peftjax.adapters.method import Method
from peftjax.adapters.provenance import base_name
from peftjax.adapters.registry import BaseName, attached, require
from peftjax.adapters.saved_modules import is_saved
from peftjax.adapters.selection import chosen_spellings
from peftjax.adapters.sites import head_sites
from peftjax.adapters.targeted import Targeted
from peftjax.core import distributed, host_arrays
from peftjax.core.errors import UserError
from peftjax.core.files import naming, scratch_beside, sync_directory, sync_files
from peftjax.core.home import expand
from peftjax.core.paths import unmatched
from peftjax.io import adapter_hub
from peftjax.io.adapter_base import base_fingerprints, base_record
from peftjax.io.adapter_copies import TOKENS
from peftjax.io.adapter_experts_save import requires_single_experts, with_single_experts
from peftjax.io.adapter_tensors import CONFIG, PREFIX, WEIGHTS, adapter_tensors
from peftjax.io.model_card import CARD, TrainingSummary, make_card, may_replace, with_mark
from peftjax.methods import METHODS
from peftjax.methods.bottleneck import Bottleneck
from peftjax.models.base import Model

T = TypeVar("T")

CLASSIFICATIONS = ("SEQ_CLS", "TOKEN_CLS")  # the task types for which peft trains the whole task head
HEAD_NAMES = ("classifier", "score")  # the modules that peft regards as the task head


def save_adapter(
    model: nnx.Module,
    path: str | Path,
    name: str = "default",
    *,
    base: str | None = None,
    single_experts: bool = False,
) -> Path:
    """Write an adapter as a directory that Hugging Face PEFT, or AdapterHub for a bottleneck adapter, can load.

    A new directory appears complete or not at all. In an existing directory each of the adapter's files is replaced
    atomically, and other files are kept. The directory of a model from `load_model` also gets a model card, README.md. A
    README.md that was written or edited by somebody is kept.

    Args:
        model: The model.
        path: The directory.
        name: Name of the adapter.
        base: The base_model_name_or_path to record: the hub id or directory of the base model. Default: the one in the
            file that the adapter was loaded from, or the path that the model was loaded from.
        single_experts: Write a LoRA on experts as LoRAs on the layers of each expert, such as `experts.7.gate_proj`, which
            are modules in transformers 4. Default: LoRAs on all experts of a layer, which are parameters in transformers 5.
            A DoRA on experts, a LoRA whose ranks or alphas differ between experts, and other methods are always written so.

    Returns:
        The directory.

    Raises:
        UserError: The adapter is not attached, its method has no Hugging Face format, `single_experts` does not apply, or
            `path` is a file.

    Examples:
        >>> import peftjax
        >>> from flax import nnx
        >>> model = peftjax.load_model("embedded")
        >>> model = peftjax.attach(model, peftjax.Lora(rank=4), rngs=nnx.Rngs(0))
        >>> path = peftjax.save_adapter(model, "my-adapter")
    """
    named = BaseName(base) if base is not None else base_name(model, name)
    if named is None and isinstance(model, Model) and model.origin:
        named = BaseName(model.origin.path, model.origin.options["revision"])
    return write_adapter(model, expand(path), name, named, single_experts=single_experts)


def write_adapter(
    model: nnx.Module,
    path: str | Path,
    name: str,
    base: BaseName | None,
    training: TrainingSummary | None = None,
    *,
    single_experts: bool = False,
) -> Path:
    """Write an adapter directory as `save_adapter` does, and record `base` as the name of the base.

    `training` is what the model card says about the training; only the first process needs it.

    Raises:
        UserError: As `save_adapter`.
    """
    method = saved_method(model, name)
    path = Path(path)
    if path.is_file():
        raise UserError(f"{path} is a file; give a directory")
    tensors = adapter_tensors(model, name, read=host_arrays.whole)
    _warn_of_copies(model, tensors)
    config = _peft_config(model, method, name, base) if method.peft_type else {}
    if single_experts or requires_single_experts(model, name):
        tensors, config = with_single_experts(model, name, method, tensors, config)
    metadata = base_record(model, name, base_fingerprints(model, name))
    if isinstance(method, Bottleneck):
        files = _hub_files(model, method, name, base.name if base else None, tensors, metadata)
    else:
        files = {WEIGHTS: _weights(tensors, metadata), CONFIG: _json(config)}
    if jax.process_index() == 0:
        _write(path, files, training, card=isinstance(model, Model) and may_replace(path / CARD))
    distributed.meet("save_adapter")  # once it returns, every process can read the directory
    return path


def _warn_of_copies(model: nnx.Module, tensors: Mapping[str, np.ndarray]) -> None:
    """Warn if peft would load a trained or adapted embedding, such as T5's `shared`, without effect.

    The encoder and the decoder hold its table in separate modules. peft ties only single tokens of these.
    """
    if not isinstance(model, Model):
        return
    tied = {copy.removesuffix(".weight"): table.removesuffix(".weight") for copy, table in model.hf_tied.items()}
    tied.pop(model.hf_modules.get("head", ""), None)  # peft ties a head itself
    for module in sorted(set(tied.values())):
        if any(key.startswith(f"{PREFIX}{module}.") and not key.endswith(TOKENS) for key in tensors):
            warnings.warn(
                f"peft will not apply the adapter of {module}, because transformers computes with copies of it "
                f"({', '.join(tied)}); peftjax applies it. "
                "For new tokens, token_indices works in both",
                stacklevel=4,
            )


def task_type(model: nnx.Module) -> str | None:
    """Return the task_type of adapter_config.json; None if PEFT has none for the model, which then fits any adapter."""
    return model.hf_task if isinstance(model, Model) else "CAUSAL_LM"


def saved_method(model: nnx.Module, name: str) -> Method:
    """The method of adapter `name`, which must have a file format."""
    require(model, name)
    method = attached(model)[name]
    if isinstance(method, Bottleneck) and not isinstance(model, Model):
        raise UserError(
            f"save_adapter: the file format of {method.method}, AdapterHub's, is for models from load_model, and "
            f"{type(model).__name__} is an adopted network; save nnx.state(model, peftjax.PeftParam), for example with orbax"
        )
    if method.peft_type is None and not isinstance(method, Bottleneck):
        raise UserError(f"{method.method} has no adapter file; save the whole model with save_model")
    if method.peft_type not in (cls.peft_type for cls in METHODS.values()):
        kind = type(method).__name__
        raise UserError(
            f"{kind} is not registered, so nothing could load its file; register it: peftjax.methods.METHODS[{kind}.method] = {kind}"
        )
    return method


# --- The files ---


def _peft_config(model: nnx.Module, method: Method, name: str, base: BaseName | None) -> dict[str, Any]:
    """PEFT's adapter_config.json."""
    trained = [hf for site in head_sites(model) if name in site.module.adapters.names() for hf in site.names]
    task = task_type(model)
    if task in CLASSIFICATIONS and not trained:
        task = "FEATURE_EXTRACTION"  # for a classification, PEFT would require the head in the file
    config = {
        "peft_type": method.peft_type,
        "task_type": task,
        "base_model_name_or_path": base.name if base else None,
        "revision": base.revision if base else None,
        "inference_mode": True,
        "auto_mapping": None,
    } | method.to_hf(model, name)
    if trained and isinstance(method, Targeted) and isinstance(targets := config.get("target_modules"), list | tuple):
        # Entries that select only the task head. PEFT may adapt it first, and then fail to train it in full.
        adapted = chosen_spellings(method.chosen(model))
        only_head = {entry for entry in unmatched(adapted, tuple(targets)) if entry not in unmatched(trained, (entry,))}
        config["target_modules"] = [entry for entry in targets if entry not in only_head]
    # PEFT saves a layer of the task head if the task_type has a head and the layer one of PEFT's names for it. Otherwise
    # modules_to_save must name the layer.
    saved_by_task = HEAD_NAMES if task in CLASSIFICATIONS else ()
    if heads := [head for head in trained if not any(is_saved(head, entry) for entry in saved_by_task)]:
        saved = config.get("modules_to_save") or []
        config["modules_to_save"] = [*saved, *(head for head in heads if head not in saved)]
    return config


def _hub_files(
    model: nnx.Module,
    method: Bottleneck,
    name: str,
    base: str | None,
    tensors: dict[str, np.ndarray],
    metadata: Mapping[str, str],
) -> dict[str, bytes]:
    """The files of an AdapterHub directory."""
    assert isinstance(model, Model)  # only its blocks have slots for bottleneck adapters
    rest, head = without_head(tensors)
    files = {
        adapter_hub.WEIGHTS: _weights(adapter_hub.with_both_names(rest, method), metadata),
        adapter_hub.CONFIG: _json(adapter_hub.adapter_config(model, method, name, base)),
    }
    if head:
        files |= {
            adapter_hub.HEAD: _weights(head, {}),
            adapter_hub.HEAD_CONFIG: _json(adapter_hub.head_config(model, base)),
        }
    return files


def without_head(tensors: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """The tensors of bottleneck adapters, and the task head's."""
    rest = {key: value for key, value in tensors.items() if ".adapters." in key}
    return rest, {key: value for key, value in tensors.items() if key not in rest}


def _json(config: dict[str, Any]) -> bytes:
    # Sorted at the top level only: the first matching entry of rank_pattern and alpha_pattern counts.
    return (json.dumps(dict(sorted(config.items())), indent=2) + "\n").encode()


def _weights(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The safetensors file with these tensors."""
    arrays = {key: np.asarray(value, order="C") for key, value in tensors.items()}
    return _with_sorted_metadata(save(arrays, metadata={"format": "pt", **metadata}))


def _with_sorted_metadata(file: bytes) -> bytes:
    """Sort the metadata of a safetensors file; the library writes it in an order that varies from run to run."""
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + file[start:]


def _write(path: Path, files: Mapping[str, bytes], training: TrainingSummary | None, *, card: bool) -> None:
    """Write the files, with a model card if `card`, next to `path` first, then move them there."""
    path = path.resolve()  # "." has no name, and a link may lead to another file system
    with scratch_beside(path) as scratch:
        for file, content in files.items():
            with naming(scratch / file):
                (scratch / file).write_bytes(content)
        if card:
            (scratch / CARD).write_text(with_mark(make_card(scratch, training)), encoding="utf-8")
        sync_files(scratch)
        if path.exists():
            for written in scratch.iterdir():
                written.replace(path / written.name)
            sync_directory(path)
        else:
            scratch.rename(path)
        sync_directory(path.parent)
