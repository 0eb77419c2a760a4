"""Phi-3: a Llama with one layer for q, k and v and one for gate and up, part of each head rotated, longrope, a window.

Abdin et al. 2024 (arXiv:2404.14219), section 2. Phi-3.5 mini, Phi-4 and Phi-4 mini are of this kind too.
"""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
from flax import nnx

from peftjax.models.decoder import Block, Decoder, DecoderConfig, read_heads, rope_fields
from peftjax.models.fields import HARMLESS, Fields
from peftjax.nn.attention import FusedAttention
from peftjax.nn.feedforward import ACTIVATIONS, FusedGatedFeedForward
from peftjax.nn.norm import RMSNorm
from peftjax.nn.rope import Rope
from peftjax.nn.rope import from_hf as rope_from_hf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phi3Config(DecoderConfig):
    """Sizes and options of one model."""

    rope: Rope

    def make(self, rngs: nnx.Rngs) -> "Phi3":
        return Phi3(self, rngs)


class Phi3(Decoder):
    """RMSNorm, rotary attention with grouped queries, SwiGLU, the layers that read the same input fused."""

    @staticmethod
    def make_block(config: Phi3Config, rngs: nnx.Rngs) -> Block:
        common: dict[str, Any] = {
            "stddev": config.init_stddev,
            "dtype": jnp.dtype(config.param_dtype),
            "rngs": rngs,
        }
        return Block(
            attention_norm=Phi3.make_norm(config),
            attention=FusedAttention(
                config.embed, config.heads, config.kv_heads, config.head_dim, use_bias=False, **common
            ),
            feedforward_norm=Phi3.make_norm(config),
            feedforward=FusedGatedFeedForward(
                config.embed, config.mlp, activation=ACTIVATIONS[config.activation], **common
            ),
        )

    @staticmethod
    def make_norm(config: Phi3Config) -> RMSNorm:
        return RMSNorm(config.embed, eps=config.norm_eps, dtype=jnp.dtype(config.param_dtype))


# --- Hugging Face: what its config.json says, and what it calls our modules ---

Phi3.hf_modules = {
    "embed": "model.embed_tokens",
    "blocks.attention_norm": "model.layers.{}.input_layernorm",
    "blocks.attention.qkv": "model.layers.{}.self_attn.qkv_proj",
    "blocks.attention.out": "model.layers.{}.self_attn.o_proj",
    "blocks.attention": "model.layers.{}.self_attn",
    "blocks.feedforward_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.feedforward.gate_up": "model.layers.{}.mlp.gate_up_proj",
    "blocks.feedforward.down": "model.layers.{}.mlp.down_proj",
    "blocks.attention_residual": "model.layers.{}.attention_adapters",
    "blocks.feedforward_residual": "model.layers.{}.output_adapters",
    "norm": "model.norm",
    "head": "lm_head",
}
# Fields of Phi-4 mini that its own code reads and transformers does not, with the values that mean nothing.
_NEUTRAL = {
    "attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1, "interpolate_factor": 1,
}  # fmt: skip


def from_hf(config: dict[str, Any], **options: Any) -> Phi3Config:
    """Read a config.json of model_type phi3, in the spelling of transformers 4 or 5.

    Raises:
        ValueError: a field is missing, unknown, or has a value that this family cannot honour.
    """
    fields = Fields(config, harmless=HARMLESS | {"auto_map"})
    layers, embed, max_positions = (
        fields.take(name) for name in ("num_hidden_layers", "hidden_size", "max_position_embeddings")
    )
    heads, kv_heads = read_heads(fields)
    head_dim = fields.take("head_dim", embed // heads)
    fields.no_dropout("attention_dropout", "resid_pdrop", "embd_pdrop")
    for name, value in _NEUTRAL.items():
        fields.only(name, value)
    result = Phi3Config(
        vocab=fields.take("vocab_size"),
        embed=embed,
        mlp=fields.take("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=max_positions,
        rope=_rope(fields, head_dim, max_positions),
        norm_eps=fields.take("rms_norm_eps", 1e-5),
        activation=fields.activation("hidden_act", "silu"),
        tied=fields.take("tie_word_embeddings", False),
        windows=(fields.maybe("sliding_window") or 0,) * layers,
        init_stddev=fields.take("initializer_range", 0.02),
        hf=json.dumps(config),
        **options,
    )
    fields.done()
    return result


def _rope(fields: Fields, head_dim: int, max_positions: int) -> Rope:
    """Of the first partial_rotary_factor of each head; "yarn" and "su" are what longrope was called here at first."""
    # The length that the model was first trained at stands outside of rope_parameters, and counts before one in there.
    original = fields.take("original_max_position_embeddings", 4096)
    parameters = rope_fields(fields) | {"original_max_position_embeddings": original}
    kind = parameters.pop("rope_type", parameters.pop("type", "default"))
    kind = {"su": "longrope", "yarn": "longrope"}.get(kind, kind)
    if kind not in ("default", "longrope"):
        raise ValueError(f"config.json: rope_type {kind!r} is not supported for model_type 'phi3', only longrope")
    rotated = int(head_dim * parameters.pop("partial_rotary_factor", 1.0))
    return rope_from_hf(parameters | {"rope_type": kind}, head_dim=rotated, max_positions=max_positions)
