"""Save base models as Hugging Face directories."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from peftjax.core import distributed, variables
from peftjax.core.errors import UserError
from peftjax.core.files import scratch_beside, sync_directory, sync_files
from peftjax.core.home import expand
from peftjax.core.listing import enumerate_some
from peftjax.io import bitsandbytes
from peftjax.io.entries import entries, is_linear
from peftjax.io.experts import single_names
from peftjax.io.hf_files import INDEX, PROMPT_FORMAT, SIDE_FILES, TEMPLATES, find_model
from peftjax.io.json_files import read_json
from peftjax.io.multimodal import Surroundings
from peftjax.io.packed_experts import can_split
from peftjax.io.sentence import MODULES, POOLING, write_pooling
from peftjax.io.shards import write_weights
from peftjax.models.base import Model
from peftjax.nn.slot import Slot
from peftjax.quant.base import Quantized
from peftjax.quant.nf4 import Nf4

MAX_SHARD_BYTES = 2 * 10**9
SAVED_BY = {"saved_by": "peftjax"}  # in a config.json: save_model may replace the directory


def save_model(
    model: Model, path: str | Path, *, source: str | Path | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Save a model as a Hugging Face directory: config.json, and model.safetensors or its shards with their index.

    Tensors have the parameters' dtype; kernels in NF4 are stored in bitsandbytes' format. One shard at a time is copied to
    the host. The directory appears once it is complete, and replaces one written by this function. Inactive adapters are
    not saved.

    Args:
        model: The model.
        path: The directory to write.
        source: A model directory or hub id whose tokenizer and generation files are copied. For the text model of a multimodal
            model it is required: the directory it was loaded from, whose other parts are copied.
        max_shard_bytes: Maximum size of a shard in bytes.

    Raises:
        UserError: The model is not one from `load_model`, adapters are active, kernels are int8 or, in the text model of a
            multimodal model, quantized in any format, quantized experts cannot be divided, `source` is missing or another
            model, or `path` holds something else.

    Examples:
        >>> import peftjax
        >>> model = peftjax.load_model("embedded")
        >>> peftjax.save_model(model, "my-model")
        >>> model = peftjax.load_model("my-model")
    """
    if not isinstance(model, Model):
        raise UserError(
            f"save_model: a {type(model).__name__} is not a model from load_model, and has no Hugging Face format; save "
            "nnx.state(model), for example with orbax"
        )
    target = expand(path).resolve()  # a link to a directory cannot be replaced
    if active := sorted(
        {name for _, slot in nnx.iter_modules(model) if isinstance(slot, Slot) for name in slot.active}
    ):
        raise UserError(
            f"adapters are active in the model: {', '.join(active)}; a Hugging Face model directory cannot hold them; "
            "merge or detach them first, or save them with save_adapter"
        )
    quantization = _quantization_config(model)
    _check_target(target)
    directory = None if source is None else find_model(source)
    side_files = {} if directory is None else _side_files(directory)
    around = Surroundings(model, directory) if model.hf_part else None
    if around and quantization:
        raise UserError(
            "save_model: kernels of this text model are quantized and cannot be saved in a multimodal directory; "
            "load it without quantize"
        )
    writing = jax.process_index() == 0
    with scratch_beside(target) if writing else contextlib.nullcontext(target) as temporary:
        write_weights(model, temporary, max_shard_bytes, writing, around)
        if writing:
            config = temporary / "config.json"
            fields = model.config.to_hf() | quantization | SAVED_BY
            config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
            write_pooling(model.config, temporary)
            for file in temporary.glob("*.safetensors"):
                shutil.copymode(config, file)  # safetensors makes them readable by the owner only
            for file, name in side_files.items():
                (temporary / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, temporary / name)
            sync_files(temporary)
            _replace(target, temporary)
            sync_directory(target.parent)
    distributed.meet("save_model")  # once it returns, every process may read the directory


def _quantization_config(model: Model) -> dict[str, Any]:
    """The fields of config.json that describe quantized kernels; empty if there are none."""
    leaves = variables.flat(model)[1]
    kernels: list[Nf4] = []
    dense = [model.hf_modules[path] for path in model.output_layers if path in model.hf_modules]  # if it has them
    for entry in entries(model):
        value = leaves[entry.path].get_value()
        if isinstance(value, Nf4):
            kernels.append(value)
            names = single_names(model, entry.keys[0])  # of experts
            if value.ndim - entry.stacked > 2 and not (names and can_split(value, len(names[0]))):
                raise UserError(
                    f"{entry.path} is quantized in {value.format}, and cannot be divided into the kernels of single experts that "
                    f'bitsandbytes directories have; load the unquantized model with quantize="{value.format}" instead'
                )
            dense = [
                name for name in dense if not any(f"{module}.".startswith(f"{name}.") for module in entry.hf_modules)
            ]
        elif isinstance(value, Quantized):
            raise UserError(
                f"{entry.path} is in {type(value).__name__.lower()}, which Hugging Face directories cannot hold "
                '(bitsandbytes\' int8 rounds the activations too); load the unquantized model with quantize="int8" instead'
            )
        elif is_linear(model, entry):
            dense += [name for name in entry.hf_modules if name not in dense]
    if not kernels:
        return {}
    nested = any(kernel.scales is not None for kernel in kernels)
    return {"quantization_config": bitsandbytes.quantization_config(nested, dense, model.config.dtype)}


def _check_target(target: Path) -> None:
    if target == Path.cwd():
        raise UserError(f"{target} is the working directory and cannot be replaced; give a new directory")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file; give a directory that does not exist yet")
    config = target / "config.json"
    if not config.is_file() or not SAVED_BY.items() <= read_json(config).items():
        raise UserError(
            f"{target} exists and is not a model directory written by save_model; choose another, or delete it"
        )
    known = ("config.json", "model*.safetensors", INDEX, *SIDE_FILES, MODULES, PROMPT_FORMAT, POOLING, TEMPLATES)
    if foreign := sorted(
        entry.name for entry in target.iterdir() if not any(entry.match(pattern) for pattern in known)
    ):
        raise UserError(
            f"{target} holds more than a model and would be replaced: {enumerate_some(foreign)}; move these files, or "
            "choose another directory"
        )


def _side_files(directory: Path) -> dict[Path, Path]:
    """The side files of a directory, each with its name in it."""
    found = sorted(file for pattern in SIDE_FILES for file in directory.glob(pattern) if file.is_file())
    return {file: file.relative_to(directory) for file in found}


def _replace(target: Path, complete: Path) -> None:
    if target.exists() and any(target.iterdir()):
        old = target.with_name(f".{target.name}.peftjax-old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        complete.rename(target)
        shutil.rmtree(old)
    else:
        complete.rename(target)
