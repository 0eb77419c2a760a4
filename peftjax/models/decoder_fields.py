"""Fields of config.json that decoders share."""

import json
import warnings
from collections.abc import Sequence
from typing import Any

from peftjax.core.errors import UserError
from peftjax.models.fields import Fields
from peftjax.nn.rope import Rope
from peftjax.nn.rope import from_hf as rope_from_hf


def read_shared(
    fields: Fields, *, norm_eps: float, activation: tuple[str, str] = ("hidden_act", "silu"), tied: bool = False
) -> dict[str, Any]:
    """Read the options of `DecoderConfig` that Llama and its relatives have in the same fields.

    Args:
        fields: The fields of config.json.
        norm_eps: Default of the norms' epsilon.
        activation: The field of the activation, and its default.
        tied: Default of tie_word_embeddings.

    Raises:
        UserError: A field is missing, or its value is not supported.
    """
    fields.no_dropout("attention_dropout")
    embed, heads = fields.take("hidden_size"), fields.take("num_attention_heads")
    kv_heads = fields.nullable("num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise UserError(f"config.json: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    return {
        "vocab": fields.take("vocab_size"),
        "embed": embed,
        "mlp": fields.take("intermediate_size"),
        "layers": fields.take("num_hidden_layers"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": fields.take("head_dim", embed // heads),
        "max_positions": fields.take("max_position_embeddings"),
        "norm_eps": fields.take("rms_norm_eps", norm_eps),
        "activation": fields.activation(*activation),
        "tied": fields.take("tie_word_embeddings", tied),
        "init_stddev": fields.take("initializer_range", 0.02),
        "hf": json.dumps(fields.config),
    }


def read_attention_bias(fields: Fields, default: bool = False) -> dict[str, Any]:
    """Read attention_bias, which is for all four layers of the attention."""
    bias = fields.take("attention_bias", default)
    return {"qkv_bias": bias, "out_bias": bias}


def rope_fields(fields: Fields) -> dict[str, Any]:
    """Collect the rotary embedding's fields, in the format of transformers 4 or 5."""
    scaling, parameters = fields.maybe("rope_scaling"), fields.maybe("rope_parameters")
    if scaling and parameters:
        message = "config.json: rope_scaling replaces rope_parameters, including its rope_theta, as in transformers"
        warnings.warn(message, stacklevel=2)
    parameters = dict(scaling or parameters or {})
    for name in ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor"):
        if (value := fields.maybe(name)) is not None:
            parameters.setdefault(name, value)
    return parameters


def read_rope(fields: Fields, head_dim: int, max_positions: int) -> Rope:
    """Read the rotary embedding of a model in which all layers share one."""
    return rope_from_hf(rope_fields(fields), head_dim=head_dim, max_positions=max_positions)


def read_ropes(
    fields: Fields, head_dim: int, max_positions: int, *, theta: float, local_theta: float, scale_local: bool = False
) -> tuple[Rope, Rope]:
    """Read the rotary embeddings of layers without and with a window: rope_parameters by layer type, or rope_scaling.

    Args:
        fields: The fields of config.json.
        head_dim: Width of a head.
        max_positions: max_position_embeddings.
        theta: Default rope_theta of layers without a window.
        local_theta: Default rope_theta of layers with a window.
        scale_local: Whether rope_scaling also applies to layers with a window.
    """
    by_type = dict(fields.maybe("rope_parameters") or {})
    scaling = dict(fields.maybe("rope_scaling") or {})
    whole = dict(by_type.pop("full_attention", None) or {}) | scaling
    local = dict(by_type.pop("sliding_attention", None) or {}) | (scaling if scale_local else {})
    if by_type:
        raise UserError(
            f"config.json: rope_parameters has {', '.join(sorted(by_type))}; for model_type {fields.kind!r} it holds "
            "full_attention and sliding_attention, each with its own parameters"
        )
    sizes = {"head_dim": head_dim, "max_positions": max_positions}
    return (
        rope_from_hf({"rope_theta": theta} | whole, **sizes),
        rope_from_hf({"rope_theta": local_theta} | local, **sizes),
    )


def read_windows(fields: Fields, default: Sequence[str], window: int) -> tuple[int, ...]:
    """Read layer_types: `window` for layers of type sliding_attention and 0 for the others.

    Args:
        fields: The fields of config.json.
        default: The types of all layers if the field is omitted.
        window: The window of the layers that have one; 0: none is in use.
    """
    types, layers = fields.maybe("layer_types"), len(default)
    if types is None:
        types = default
    if len(types) != layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise UserError(
            f"config.json: layer_types must name sliding_attention or full_attention for each of the {layers} layers, not {types}"
        )
    if "sliding_attention" in types and not window:
        raise UserError(
            "config.json: layer_types has sliding_attention, but no window is in use; set sliding_window (and "
            "use_sliding_window, if the family has it)"
        )
    return tuple(window if name == "sliding_attention" else 0 for name in types)
