"""The config.json of a model directory: the model and the quantization that it describes."""

from pathlib import Path
from typing import Any

from peftjax import models
from peftjax.core.errors import UserError
from peftjax.io import bitsandbytes, mxfp4
from peftjax.io.json_files import read_json
from peftjax.io.multimodal import text_tensors
from peftjax.io.safetensors_files import DTYPES, read_tensors
from peftjax.io.save import SAVED_BY
from peftjax.io.sentence import read_pooling
from peftjax.models.base import ModelConfig
from peftjax.models.heads import HeadOptions
from peftjax.models.multimodal import WHOLES

REMATS = ("none", "dots", "block", "offload")
PACKED = "packed"  # what `stored_quantization` adds to a quantization_config: the names of the weights in NF4


def read_fields(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of config.json that describe the model, and its quantization_config, empty if there is none.

    It is also empty for MXFP4, whose kernels are decoded when they are read.
    """
    fields = read_json(directory / "config.json")
    quantization = fields.pop("quantization_config", None) or {}
    if quantization.get("quant_method") == mxfp4.METHOD:
        quantization = {}
    return {name: value for name, value in fields.items() if name not in SAVED_BY}, quantization


def read_config(
    directory: Path, dtype: str, param_dtype: str | None, remat: str, head: HeadOptions
) -> tuple[ModelConfig, dict[str, Any]]:
    """Return the model's configuration, and the quantization_config of config.json, empty if there is none.

    The options are as in `load_model`.

    Raises:
        UserError: An option, the architecture or a field is not supported.
    """
    options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype or dtype, "remat": remat}
    for name, value in options.items():
        values = REMATS if name == "remat" else tuple(DTYPES)
        if value not in values:
            raise UserError(f"{name}={value!r} is not one of {', '.join(values)}")
    # Quantization is not a part of the configuration: kernels may be merged or quantized differently before it is written.
    fields, quantization = read_fields(directory)
    if models.family(fields).heads and head.get("head") in (None, "none"):
        options |= read_pooling(directory)
    options |= head
    return models.from_hf_config(fields, **options), quantization


def stored_quantization(directory: Path) -> dict[str, Any]:
    """Return the quantization_config that describes the weights of a directory; empty if they are dense.

    The tensors decide, as in `load_model`, with a warning if config.json disagrees, and `PACKED` lists those in NF4. If they
    cannot be read, because the directory has no weights or not all of them, config.json decides.

    Raises:
        UserError: The weights are quantized in another format than NF4.
    """
    fields, quantization = read_fields(directory)
    try:
        tensors = mxfp4.with_decoded_kernels(read_tensors(directory))
    except UserError:
        return quantization
    if fields.get("model_type") in WHOLES:
        tensors = text_tensors(tensors)
    if not bitsandbytes.is_packed(tensors, quantization, directory):
        return {}
    nested = any(name.endswith(".nested_absmax") for name in tensors)
    packed = {PACKED: bitsandbytes.packed_names(tensors)}
    return quantization | bitsandbytes.quantization_config(nested, (), "float32") | packed
