"""Qwen2-MoE and Qwen3-MoE: Qwen2 with many small experts and a shared one, and Qwen3 with many small experts.

Qwen2 (arXiv:2407.10671), section 2.2.2; Qwen3 (arXiv:2505.09388), section 2.
"""

from typing import Any, Unpack

from peftjax.core.errors import UserError
from peftjax.models.base import ComputeOptions
from peftjax.models.decoder_fields import read_rope, read_shared, read_windows
from peftjax.models.fields import Fields
from peftjax.models.moe import MoeConfig, MoeLlama, read_experts


class QwenMoe(MoeLlama):
    """RMSNorm, rotary grouped-query attention, and the weighted sum of the chosen SwiGLU experts and a shared one."""


# --- Hugging Face: names of our modules, and config.json ---

QwenMoe.hf_experts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

# Defaults of transformers for fields that config.json omits, by model_type.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "num_key_value_heads": 16,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "qkv_bias": True,
    },
    "qwen3_moe": {"num_key_value_heads": 4, "moe_intermediate_size": 768},
}
_EXPERTS = {"qwen2_moe": (60, 4), "qwen3_moe": (128, 8)}


def from_hf(fields: Fields, **options: Unpack[ComputeOptions]) -> MoeConfig:
    """Read a config.json of model_type qwen2_moe or qwen3_moe, in the format of transformers 4 or 5."""
    kind = fields.kind
    fields.assume(max_position_embeddings=32768, **_DEFAULTS[kind])
    shared = read_shared(fields, norm_eps=1e-6)
    attention_bias = fields.take("attention_bias", False) if kind == "qwen3_moe" else False
    experts, choices = _EXPERTS[kind]
    return MoeConfig(
        model=QwenMoe,
        rope=read_rope(fields, shared["head_dim"], shared["max_positions"]),
        qkv_bias=attention_bias if kind == "qwen3_moe" else fields.take("qkv_bias"),
        out_bias=attention_bias,
        qk_norm=kind == "qwen3_moe",
        normalized=fields.take("norm_topk_prob", False),
        expert_mlp=fields.take("moe_intermediate_size"),
        shared_mlp=fields.take("shared_expert_intermediate_size") if kind == "qwen2_moe" else 0,
        dense_layers=_dense_layers(fields, shared["layers"]),
        windows=_windows(fields, shared["layers"]),
        **read_experts(fields, experts, choices),
        **shared,
        **options,
    )


def _dense_layers(fields: Fields, layers: int) -> tuple[int, ...]:
    """Read decoder_sparse_step s, with which only the layers s - 1, 2s - 1, ... have experts, and mlp_only_layers."""
    step, listed = fields.take("decoder_sparse_step", 1), fields.maybe("mlp_only_layers") or ()
    dense = tuple(layer for layer in range(layers) if layer in listed or (layer + 1) % step)
    if len(dense) == layers:
        raise UserError(
            f"config.json: decoder_sparse_step={step} and mlp_only_layers={list(listed)} leave none of the {layers} layers "
            f"with experts; use model_type {fields.kind.removesuffix('_moe')!r}"
        )
    return dense


def _windows(fields: Fields, layers: int) -> tuple[int, ...]:
    """Qwen3-MoE: all layers. Qwen2-MoE: as layer_types says, else every second layer before max_window_layers."""
    window, used = fields.nullable("sliding_window", 4096) or 0, fields.take("use_sliding_window", False)
    if fields.kind == "qwen3_moe":
        return (window if used else 0,) * layers
    last = fields.take("max_window_layers", 28)
    default = ["sliding_attention" if used and i < last and i % 2 == 0 else "full_attention" for i in range(layers)]
    return read_windows(fields, default, window if used else 0)
