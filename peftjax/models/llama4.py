"""The text model of Llama 4: chunked attention, layers without rotary embedding, and experts with weighted inputs.

As released by Meta in April 2025. Queries are scaled with their position after Nakanishi 2025 (arXiv:2501.19399).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.core.errors import UserError
from peftjax.models.base import ComputeOptions
from peftjax.models.decoder import LayerOptions
from peftjax.models.decoder_fields import read_attention_bias, read_rope, read_shared
from peftjax.models.fields import Fields
from peftjax.models.moe import MoeConfig, MoeLlama, read_experts
from peftjax.models.smollm3 import read_rotated
from peftjax.nn.attention import Attention
from peftjax.nn.moe import InputWeightedExperts, MixtureOfExperts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama4Config(MoeConfig):
    """Adds what differs between layers with and without rotary embedding.

    Attributes:
        l2_norm: Whether rotated queries and keys are normalized.
        growth: In layers without rotation, the query at position p is multiplied by
            1 + growth * ln(1 + floor((p + 1) / interval)); 0: it is not.
        interval: Number of positions with the same factor.
    """

    l2_norm: bool
    growth: float
    interval: int


class Llama4(MoeLlama):
    """RMSNorm, grouped-query attention with and without rotation, and a shared SwiGLU expert beside the chosen ones."""

    config: Llama4Config
    balanced: ClassVar[bool] = False

    def make_attention(self, rngs: nnx.Rngs, **options: Any) -> Attention:
        eps = self.config.norm_eps if self.config.l2_norm else None
        return super().make_attention(rngs, interleaved=True, l2_norm_eps=eps, **options)

    def make_feedforward(self, rngs: nnx.Rngs, **options: Any) -> MixtureOfExperts:
        weighted = {"sigmoid": True, "shared_gated": False, "make_experts": InputWeightedExperts}
        return super().make_feedforward(rngs, **weighted, **options)

    def query_factors(self, positions: jax.Array) -> Callable[[LayerOptions], jax.Array | None]:
        if not self.config.growth:
            return super().query_factors(positions)
        intervals = ((positions + 1) // self.config.interval).astype(jnp.float32)
        factors = 1 + self.config.growth * jnp.log1p(intervals)

        def of_layer(layer: LayerOptions) -> jax.Array:
            assert layer.rotated is not None
            return jnp.where(layer.rotated, 1.0, factors)

        return of_layer


# --- Hugging Face: names of our modules, and config.json ---

Llama4.hf_names = {
    **{path: name.replace(".mlp.", ".feed_forward.") for path, name in MoeLlama.hf_names.items()},
    "blocks.feedforward.router": "model.layers.{}.feed_forward.router",
    "sparse.router": "model.layers.{}.feed_forward.router",
}
Llama4.hf_experts = {"gate_up_proj": (), "down_proj": ()}


def from_hf(fields: Fields, **options: Unpack[ComputeOptions]) -> Llama4Config:
    """Read a config.json of model_type llama4_text."""
    fields.assume(max_position_embeddings=131072, num_key_value_heads=8, head_dim=128)
    fields.assume(intermediate_size=8192, rope_theta=500_000.0)
    shared = read_shared(fields, norm_eps=1e-5)
    fields.no_dropout("router_jitter_noise")
    expert_mlp, layers = shared.pop("mlp"), shared.pop("layers")
    growth, tuned = fields.take("attn_scale", 0.1), fields.take("attn_temperature_tuning", True)
    rotated = read_rotated(fields, layers)
    windows = _chunks(fields, rotated)
    return Llama4Config(
        model=Llama4,
        rope=read_rope(fields, shared["head_dim"], shared["max_positions"]),
        rotated=rotated,
        layers=layers,
        **read_attention_bias(fields),
        l2_norm=fields.take("use_qk_norm", True),
        growth=growth if tuned else 0.0,
        interval=fields.take("floor_scale", 8192),
        normalized=False,
        mlp=fields.take("intermediate_size_mlp", 16384),
        expert_mlp=expert_mlp,
        shared_mlp=expert_mlp,
        dense_layers=_dense_layers(fields, layers),
        windows=windows,
        chunked=any(windows),
        **read_experts(fields, experts=16, choices=1),
        **shared,
        **options,
    )


def _dense_layers(fields: Fields, layers: int) -> tuple[int, ...]:
    """Read moe_layers, the layers with experts; by default every s-th one, where s is interleave_moe_layer_step."""
    step, sparse = fields.take("interleave_moe_layer_step", 1), fields.maybe("moe_layers")
    sparse = range(step - 1, layers, step) if sparse is None else sparse
    dense = tuple(layer for layer in range(layers) if layer not in sparse)
    if len(dense) == layers:
        raise UserError(f"config.json: interleave_moe_layer_step={step} and moe_layers leave no layer with experts")
    return dense


def _chunks(fields: Fields, rotated: tuple[bool, ...]) -> tuple[int, ...]:
    """Read layer_types; by default the layers with rotary embedding have chunks, unless attention_chunk_size is null."""
    chunk, types = fields.nullable("attention_chunk_size", 8192) or 0, fields.maybe("layer_types")
    if types is None:
        types = ["chunked_attention" if rotates and chunk else "full_attention" for rotates in rotated]
    if len(types) != len(rotated) or not set(types) <= {"chunked_attention", "full_attention"}:
        raise UserError(
            f"config.json: layer_types must name chunked_attention or full_attention for each of the {len(rotated)} layers, not {types}"
        )
    if "chunked_attention" in types and not chunk:
        raise UserError("config.json: layer_types contains chunked_attention, which requires attention_chunk_size")
    return tuple(chunk if name == "chunked_attention" else 0 for name in types)
