"""model.dtype="auto" as a dtype."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from peftjax.tasks.model import compute_dtype
from peftjax.training.config import Config


def resolve_dtype(config: Config, hf_config: Mapping[str, Any], platform: str | None = None) -> Config:
    """The config with a dtype in place of model.dtype="auto", as `compute_dtype` determines it for a platform (default: JAX's).

    Full fine-tuning in bfloat16 keeps its parameters in float32, unless model.param_dtype is given: an update that is
    smaller than the rounding of a parameter would be lost.
    """
    if config.model.dtype != "auto":
        return config
    dtype = compute_dtype(config.model, hf_config, platform)
    full = config.method.trains_base and dtype == "bfloat16"
    param_dtype = config.model.param_dtype or ("float32" if full else "")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype, param_dtype=param_dtype))


def with_stored_dtype(config: Config, stored: Mapping[str, Any]) -> Config:
    """The config with the values of an earlier run's stored config in place of "auto" in model.dtype and model.attention.

    A resumed run computes in the dtype in which it started, on any device.
    """
    model, there = config.model, stored.get("model", {})
    if model.attention == "auto":  # a run that started before this default existed has another
        model = dataclasses.replace(model, attention=there.get("attention", "xla"))
    if model.dtype == "auto":
        param_dtype = model.param_dtype or there.get("param_dtype", "")
        model = dataclasses.replace(model, dtype=there.get("dtype", "float32"), param_dtype=param_dtype)
    return dataclasses.replace(config, model=model)
