"""gpt-oss: attention sinks, a sliding window in every second layer, clamped experts with biases.

OpenAI 2025 (arXiv:2508.10925), section 2.
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar, Unpack

from flax import nnx

from peftjax.models.base import ComputeOptions
from peftjax.models.decoder import Block
from peftjax.models.decoder_fields import read_attention_bias, read_shared, read_windows, rope_fields
from peftjax.models.fields import Fields
from peftjax.models.moe import MoeConfig, MoeLlama, read_experts
from peftjax.nn.moe import ClampedExperts
from peftjax.nn.norm import Float32RMSNorm
from peftjax.nn.rope import from_hf as rope_from_hf


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptOssConfig(MoeConfig):
    """Adds the options of `nn.moe.ClampedExperts`."""

    swiglu_alpha: float
    swiglu_limit: float


class GptOss(MoeLlama):
    """RMSNorm, rotary grouped-query attention with sinks, and the weighted sum of the chosen experts."""

    config: GptOssConfig
    norm_type: ClassVar = Float32RMSNorm

    def make_block(self, rngs: nnx.Rngs) -> Block:
        config = self.config
        experts = partial(ClampedExperts, alpha=config.swiglu_alpha, limit=config.swiglu_limit)
        attention = self.make_attention(rngs, sinks=True)
        return Block(self.make_norm, attention, self.make_feedforward(rngs, router_bias=True, make_experts=experts))


# --- Hugging Face: names of our modules, and config.json ---

GptOss.hf_names = {**MoeLlama.hf_names, "blocks.feedforward.router": "model.layers.{}.mlp.router"}
GptOss.hf_experts = {"gate_up_proj": (), "down_proj": ()}
# Defaults of transformers for a config.json that does not scale the rotary embedding.
_ROPE: dict[str, Any] = {
    "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0,
    "truncate": False,
}  # fmt: skip


def from_hf(fields: Fields, **options: Unpack[ComputeOptions]) -> GptOssConfig:
    """Read a config.json of model_type gpt_oss."""
    fields.assume(max_position_embeddings=131072, num_key_value_heads=8, head_dim=64, rope_theta=150_000.0)
    fields.skip("experts_per_token", "initial_context_length")  # duplicates of fields that transformers reads
    fields.only("hidden_act", "silu")
    shared = read_shared(fields, norm_eps=1e-5)
    types = ["full_attention" if i % 2 else "sliding_attention" for i in range(shared["layers"])]
    scaled = fields.config.get("rope_parameters") or fields.config.get("rope_scaling")
    rope = ({} if scaled else _ROPE) | rope_fields(fields)
    return GptOssConfig(
        model=GptOss,
        rope=rope_from_hf(rope, head_dim=shared["head_dim"], max_positions=shared["max_positions"]),
        **read_attention_bias(fields, default=True),
        normalized=True,
        expert_mlp=shared["mlp"],
        swiglu_alpha=fields.take("swiglu_alpha", 1.702),
        swiglu_limit=fields.take("swiglu_limit", 7.0),
        windows=read_windows(fields, types, fields.nullable("sliding_window", 128) or 0),
        **read_experts(fields, experts=128, choices=4),
        **shared,
        **options,
    )
