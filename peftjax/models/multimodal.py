"""Multimodal checkpoints whose text model is supported: its configuration and its tensors. The rest is not loaded.

The transformers class holds the text model as `model.language_model` and its head as `lm_head`; Llama 4's class holds both as
`language_model`. Checkpoint files use one of several older names for the same tensors, which end in the names of the text
model alone.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from peftjax.core.errors import UserError

# The names of the text model's tensors and of its head in checkpoint files: bare, in one or two containers, and with the
# container named twice, as some versions of transformers 5 wrote them.
_TEXT = re.compile(r"((?:model\.|language_model\.)+)((?:embed_tokens|layers|norm)\..*)")
_HEAD = re.compile(r"(?:model\.|language_model\.)*(lm_head\..*)")
# The other parts of the transformers classes.
OTHERS = frozenset({"vision_tower", "vision_model", "visual", "multi_modal_projector", "image_newline"})


@dataclasses.dataclass(frozen=True)
class Whole:
    """A multimodal model_type.

    Attributes:
        text: The family of its text model, if text_config has no model_type or one that belongs to the multimodal model.
        defaults: Defaults of transformers for text fields that differ from the defaults of `text`.
        flat: Fields that describe the other parts, in a config.json that has no text_config.
        in_class: The names of the text model and of its head in the transformers class.
    """

    text: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    flat: frozenset[str] = frozenset()
    in_class: tuple[str, str] = ("model.language_model", "lm_head")


_QWEN = Whole(
    "qwen2",
    {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "max_window_layers": 80},
    frozenset({
        "vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
        "vision_token_id",
    }),
)  # fmt: skip
WHOLES = {
    "gemma3": Whole("gemma3_text"),
    "internvl": Whole("qwen2"),
    "llama4": Whole("llama4_text", in_class=("language_model.model", "language_model.lm_head")),
    "llava": Whole("llama"),
    "llava_next": Whole("llama"),
    "mistral3": Whole("mistral", {"tie_word_embeddings": True}),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
}
_SIZE_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Sizes that a text_config may omit, because transformers' defaults describe a model in common use.
_SIZES = {
    kind: dict(zip(_SIZE_FIELDS, sizes, strict=True))
    for kind, sizes in {
        "gemma3_text": (262208, 2304, 9216, 26, 8),
        "llama": (32000, 4096, 11008, 32, 32),
        "llama4_text": (202048, 5120, 8192, 48, 40),
        "mistral": (32000, 4096, 14336, 32, 32),
        "qwen2": (151936, 4096, 22016, 32, 32),
    }.items()
}


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the text model of a multimodal config.json.

    Raises:
        UserError: It has none.
    """
    kind = config["model_type"]
    whole = WHOLES[kind]
    text = config.get("text_config")
    if text is None and whole.flat & config.keys():
        others = whole.flat | {"architectures", "model_type"}
        text = {name: value for name, value in config.items() if name not in others}
    if not isinstance(text, dict):
        raise UserError(f"config.json: model_type {kind!r} needs text_config, the fields of its text model")
    model_type = str(text.get("model_type", whole.text))
    model_type = whole.text if model_type.startswith(kind) and model_type != whole.text else model_type
    fields = _SIZES.get(model_type, {}) | dict(whole.defaults) | text | {"model_type": model_type}
    fields.pop("quantization_config", None)  # what is quantized is read from the tensors
    if config.get("tie_word_embeddings") is not None:
        fields["tie_word_embeddings"] = config["tie_word_embeddings"] or bool(text.get("tie_word_embeddings"))
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := fields.get(name), dict) and "mrope_section" in rope:
            # For text, the three coordinates of a position, which differ for images only, are equal.
            kept = {key: value for key, value in rope.items() if key != "mrope_section"}
            fields[name] = {key: "default" if value == "mrope" else value for key, value in kept.items()}
    return fields


def with_text(whole: str, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a multimodal config.json, given as JSON, with `changed` fields of its text model."""
    fields = json.loads(whole)
    fields.pop("torch_dtype", None)
    text = fields.get("text_config")
    if text is None:
        return fields | dict(changed)
    text.pop("torch_dtype", None)
    top = {name: value for name, value in changed.items() if name != "vocab_size"}
    return fields | top | {"text_config": text | dict(changed)}


def class_name(whole: str, name: str) -> str:
    """Return the name that a module of the text model has in the transformers class.

    Args:
        whole: The multimodal config.json, as JSON.
        name: Its name in the class of the text model alone.
    """
    model, head = WHOLES[json.loads(whole)["model_type"]].in_class
    return head if name == "lm_head" else f"{model}.{name.removeprefix('model.')}"


def text_name(name: str) -> str | None:
    """Return the name that a tensor of a multimodal checkpoint has in one of its text model alone; None if it has no such name."""
    if head := _HEAD.fullmatch(name):
        return head[1]
    text = _TEXT.fullmatch(name)
    return f"model.{text[2]}" if text else None


def other_part(name: str) -> str:
    """Return the part of the multimodal model that a tensor outside its text model belongs to."""
    return name.removeprefix("model.").split(".")[0]
