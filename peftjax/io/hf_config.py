"""Read the config.json of a model directory."""

from pathlib import Path
from typing import Any

from peftjax import models
from peftjax.core.errors import UserError
from peftjax.io import hf_files
from peftjax.io.save import MARK
from peftjax.io.sentence import read_pooling
from peftjax.models.base import ModelConfig
from peftjax.models.heads import HeadOptions


def read_config(
    directory: Path, dtype: str, param_dtype: str | None, remat: str, head: HeadOptions
) -> tuple[ModelConfig, dict[str, Any]]:
    """Return the model's configuration, and the quantization_config of config.json, empty if there is none.

    Args:
        directory: The model directory.
        dtype: As in `load_model`.
        param_dtype: As in `load_model`.
        remat: As in `load_model`.
        head: The head options of `load_model`.

    Raises:
        UserError: An option, the architecture or a field is not supported.
    """
    for name in (dtype, param_dtype or dtype):
        if name not in ("float32", "bfloat16", "float16"):
            raise UserError(f"dtype {name!r} is not one of float32, bfloat16, float16")
    fields = {k: v for k, v in hf_files.read_json(directory / "config.json").items() if k not in MARK}
    # Not a part of the configuration: kernels may be merged or quantized differently before it is written again.
    quantization = fields.pop("quantization_config", None) or {}
    options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype or dtype, "remat": remat}
    if models.family(fields).heads:
        options |= head | (read_pooling(directory) if head["head"] in (None, "none") else {})
    elif any(head.values()):
        given = ", ".join(f"{name}={value!r}" for name, value in head.items() if value)
        raise UserError(
            f"{given}: a model of type {fields['model_type']!r} has no task head to choose; only encoders do"
        )
    return models.from_hf_config(fields, **options), quantization
