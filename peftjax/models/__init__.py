"""Model families, found by the `model_type` of a Hugging Face config.json."""

import importlib
from typing import Any

from peftjax.core.paths import suggest

# model_type -> the module whose `from_hf` reads such a config
FAMILIES = {
    "bert": "peftjax.models.bert",
    "llama": "peftjax.models.llama",
    "mistral": "peftjax.models.llama",
    "qwen2": "peftjax.models.llama",
    "qwen3": "peftjax.models.llama",
    "roberta": "peftjax.models.bert",
    "gpt2": "peftjax.models.gpt2",
    "phi3": "peftjax.models.phi3",
    "gemma2": "peftjax.models.gemma",
    "gemma3_text": "peftjax.models.gemma",
    "t5": "peftjax.models.t5",
    "mt5": "peftjax.models.t5",
    "vit": "peftjax.models.vit",
}


def family(config: dict[str, Any]) -> Any:
    """The module of a Hugging Face config.json's model family.

    Raises:
        ValueError: the architecture is not supported.
    """
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise ValueError(
            f"config.json: model_type {kind!r} is not supported.{suggest(kind, FAMILIES)} Supported: {', '.join(sorted(FAMILIES))}"
        )
    return importlib.import_module(FAMILIES[kind])


def from_hf_config(config: dict[str, Any], **options: Any) -> Any:
    """The `ModelConfig` of a Hugging Face config.json; `options`: dtype, param_dtype, remat, and those of encoders.

    Raises:
        ValueError: the architecture is not supported, or a field's value is not.
    """
    return family(config).from_hf(config, **options)
