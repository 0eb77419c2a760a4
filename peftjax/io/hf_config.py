"""The config.json of a model directory as the config of its family."""

from pathlib import Path
from typing import Any

from peftjax import models
from peftjax.io import bitsandbytes, hf_files
from peftjax.io.save import MARK
from peftjax.io.sentence import read_pooling


def read_config(
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
    fields = {k: v for k, v in hf_files.read_json(directory / "config.json").items() if k not in MARK}
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
