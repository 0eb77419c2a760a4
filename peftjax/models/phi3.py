"""Phi-3: a Llama with q, k, v and gate, up fused into one layer each, partially rotated heads, longrope and a window.

Abdin et al. 2024 (arXiv:2404.14219), section 2. Phi-3.5 mini, Phi-4 and Phi-4 mini have the same architecture.
"""

import dataclasses
from typing import Unpack

import jax.numpy as jnp
from flax import nnx

from peftjax.core.errors import UserError
from peftjax.models.base import ComputeOptions
from peftjax.models.decoder import Block, Decoder, DecoderConfig
from peftjax.models.decoder_fields import read_shared, rope_fields
from peftjax.models.fields import Fields
from peftjax.nn.attention import FusedAttention
from peftjax.nn.feedforward import ACTIVATIONS, FusedGatedFeedForward
from peftjax.nn.rope import Rope
from peftjax.nn.rope import from_hf as rope_from_hf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phi3Config(DecoderConfig):
    """Sizes and options of a Phi-3 model."""

    def make(self, rngs: nnx.Rngs) -> "Phi3":
        return Phi3(self, rngs)


class Phi3(Decoder):
    """RMSNorm, rotary grouped-query attention and SwiGLU; layers that read the same input are fused."""

    config: Phi3Config

    def make_block(self, rngs: nnx.Rngs) -> Block:
        config, dtype = self.config, jnp.dtype(self.config.param_dtype)
        return Block(
            self.make_norm,
            attention=FusedAttention(
                config.embed,
                config.heads,
                config.kv_heads,
                config.head_dim,
                use_bias=False,
                stddev=config.init_stddev,
                dtype=dtype,
                rngs=rngs,
            ),
            feedforward=FusedGatedFeedForward(
                config.embed,
                config.mlp,
                activation=ACTIVATIONS[config.activation],
                stddev=config.init_stddev,
                dtype=dtype,
                rngs=rngs,
            ),
        )


# --- Hugging Face: names of our modules, and config.json ---

Phi3.hf_names = {
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
# Fields that Phi-4 mini's own code reads and transformers does not, with their neutral values.
_NEUTRAL = {
    "attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1, "interpolate_factor": 1,
}  # fmt: skip


def from_hf(fields: Fields, **options: Unpack[ComputeOptions]) -> Phi3Config:
    """Read a config.json of model_type phi3, in the format of transformers 4 or 5."""
    fields.assume(max_position_embeddings=4096)
    fields.skip("auto_map")
    shared = read_shared(fields, norm_eps=1e-5)
    fields.no_dropout("resid_pdrop", "embd_pdrop")
    for name, value in _NEUTRAL.items():
        fields.implied(name, value)
    return Phi3Config(
        rope=_rope(fields, shared["head_dim"], shared["max_positions"]),
        windows=(fields.maybe("sliding_window") or 0,) * shared["layers"],
        **shared,
        **options,
    )


def _rope(fields: Fields, head_dim: int, max_positions: int) -> Rope:
    """Read the rotary embedding of the first partial_rotary_factor of each head; "yarn" and "su" are old names of longrope."""
    # The original training length is a field outside rope_parameters, and takes precedence over one inside.
    original = fields.take("original_max_position_embeddings", 4096)
    parameters = rope_fields(fields) | {"original_max_position_embeddings": original}
    kind = parameters.pop("rope_type", parameters.pop("type", "default"))
    kind = {"su": "longrope", "yarn": "longrope"}.get(kind, kind)
    if kind not in ("default", "longrope"):
        raise UserError(f"config.json: rope_type {kind!r} is not supported for model_type 'phi3', only longrope")
    rotated = int(head_dim * parameters.pop("partial_rotary_factor", 1.0))
    return rope_from_hf(parameters | {"rope_type": kind}, head_dim=rotated, max_positions=max_positions)
