"""Model families, one per file, selected by the `model_type` in a Hugging Face config.json.

base.py declares what every model provides. decoder.py, text_encoder.py and encoder_decoder.py hold what families share. A
family's file ends with its Hugging Face names and the reading of its config.json.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from peftjax.core.errors import UserError
from peftjax.core.paths import suggest
from peftjax.models import (
    bert,
    deberta,
    distilbert,
    gemma,
    glm4,
    gpt2,
    gpt_oss,
    granite,
    llama,
    llama4,
    ministral,
    mixtral,
    modernbert,
    multimodal,
    olmo,
    phi3,
    qwen_moe,
    roberta,
    smollm3,
    t5,
    vit,
)
from peftjax.models.base import Model, ModelConfig
from peftjax.models.fields import Fields
from peftjax.models.heads import HeadOptions
from peftjax.models.text_encoder import HEADS

__all__ = ["FAMILIES", "Family", "Model", "ModelConfig", "family", "from_hf_config"]


@dataclasses.dataclass(frozen=True)
class Family:
    """What the module of a model family provides.

    Attributes:
        from_hf: Reads a config.json. Called with its `Fields`, the `ComputeOptions` as keyword arguments and, for a family
            with `heads`, the `HeadOptions`. Raises a `UserError` if a field is missing or its
            value is not supported.
        heads: The task heads to choose from, "none" among them; empty for language models.
    """

    from_hf: Callable[..., ModelConfig]
    heads: tuple[str, ...] = ()


FAMILIES = {
    "bert": Family(bert.from_hf, HEADS),
    "llama": Family(llama.from_hf),
    "llama4_text": Family(llama4.from_hf),
    "mistral": Family(llama.from_hf),
    "qwen2": Family(llama.from_hf),
    "qwen3": Family(llama.from_hf),
    "mixtral": Family(mixtral.from_hf),
    "qwen2_moe": Family(qwen_moe.from_hf),
    "qwen3_moe": Family(qwen_moe.from_hf),
    "roberta": Family(roberta.from_hf, HEADS),
    "xlm-roberta": Family(roberta.from_hf, HEADS),
    "distilbert": Family(distilbert.from_hf, HEADS),
    "modernbert": Family(modernbert.from_hf, HEADS),
    "deberta-v2": Family(deberta.from_hf, HEADS),
    "gpt2": Family(gpt2.from_hf),
    "phi3": Family(phi3.from_hf),
    "gemma2": Family(gemma.from_hf),
    "gemma3_text": Family(gemma.from_hf),
    "olmo2": Family(olmo.from_hf),
    "olmo3": Family(olmo.from_hf),
    "smollm3": Family(smollm3.from_hf),
    "granite": Family(granite.from_hf),
    "ministral3": Family(ministral.from_hf),
    "glm4": Family(glm4.from_hf),
    "gpt_oss": Family(gpt_oss.from_hf),
    "t5": Family(t5.from_hf),
    "mt5": Family(t5.from_hf),
    "vit": Family(vit.from_hf, vit.HEADS),
}


def family(config: dict[str, Any]) -> Family:
    """Return the family of a Hugging Face config.json; for a multimodal model, the family of its text model.

    Raises:
        UserError: The architecture is not supported.
    """
    if config.get("model_type") is None:
        raise UserError("config.json has no model_type, so it is not the config of a transformers model")
    kind = str(config["model_type"])
    if kind in multimodal.WHOLES:
        return family(multimodal.text_config(config))
    if kind not in FAMILIES:
        raise UserError(
            f"config.json: model_type {kind!r} is not supported.{suggest(kind, [*FAMILIES, *multimodal.WHOLES])} Supported: "
            f"{', '.join(sorted(FAMILIES))}; text model only: {', '.join(sorted(multimodal.WHOLES))}"
        )
    return FAMILIES[kind]


def from_hf_config(config: dict[str, Any], **options: Any) -> ModelConfig:
    """Read a Hugging Face config.json.

    Args:
        config: The fields of config.json.
        **options: `dtype`, `param_dtype` and `remat` as in `ModelConfig`, and for encoders the head options of
            `load_model`.

    Returns:
        The configuration; `config.make(rngs)` builds the model with random weights.

    Raises:
        UserError: The architecture, or the value of a field, is not supported.
    """
    if not family(config).heads:
        given = {name: value for name in HeadOptions.__annotations__ if (value := options.pop(name, None))}
        if given:
            said = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise UserError(
                f"{said}: a model of type {config['model_type']!r} has no task head to choose; only encoders do"
            )
    whole = config.get("model_type") in multimodal.WHOLES
    fields = Fields(multimodal.text_config(config) if whole else config)
    read = family(config).from_hf(fields, **options)
    fields.done()
    return dataclasses.replace(read, whole=json.dumps(config)) if whole else read
