"""GLM-4: norms before and after each sublayer, rotary embedding of half of each head, fused gate and up layers.

GLM-4 (arXiv:2406.12793); the norms are those of GLM-4-0414.
"""

import dataclasses
from typing import Unpack

import jax.numpy as jnp
from flax import nnx

from peftjax.models.base import ComputeOptions
from peftjax.models.decoder import Block
from peftjax.models.decoder_fields import read_shared, rope_fields
from peftjax.models.fields import Fields
from peftjax.models.llama import Llama, LlamaConfig
from peftjax.nn.feedforward import ACTIVATIONS, FusedGatedFeedForward
from peftjax.nn.rope import from_hf as rope_from_hf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glm4Config(LlamaConfig):
    """Sizes and options of a GLM-4."""

    def make(self, rngs: nnx.Rngs) -> "Glm4":
        return Glm4(self, rngs)


class Glm4(Llama):
    """RMSNorm around the sublayers, rotary grouped-query attention, SwiGLU."""

    config: Glm4Config

    def make_block(self, rngs: nnx.Rngs) -> Block:
        config = self.config
        return Block(
            self.make_norm,
            self.make_attention(rngs, interleaved=True),
            FusedGatedFeedForward(
                config.embed,
                config.mlp,
                activation=ACTIVATIONS[config.activation],
                stddev=config.init_stddev,
                dtype=jnp.dtype(config.param_dtype),
                rngs=rngs,
            ),
            norm_out=True,
        )


# --- Hugging Face: names of our modules, and config.json ---

Glm4.hf_names = {path: name for path, name in Llama.hf_names.items() if not path.startswith("blocks.feedforward.")} | {
    "blocks.attention_out_norm": "model.layers.{}.post_self_attn_layernorm",
    "blocks.feedforward.gate_up": "model.layers.{}.mlp.gate_up_proj",
    "blocks.feedforward.down": "model.layers.{}.mlp.down_proj",
    "blocks.feedforward_out_norm": "model.layers.{}.post_mlp_layernorm",
}


def from_hf(fields: Fields, **options: Unpack[ComputeOptions]) -> Glm4Config:
    """Read a config.json of model_type glm4, in the format of transformers 4 or 5."""
    fields.assume(max_position_embeddings=131072, num_key_value_heads=2, head_dim=128, partial_rotary_factor=0.5)
    shared = read_shared(fields, norm_eps=1.5625e-07)
    fields.implied("layer_types", ["full_attention"] * shared["layers"])
    rope = rope_fields(fields)
    rotated = int(shared["head_dim"] * rope.pop("partial_rotary_factor"))
    return Glm4Config(
        rope=rope_from_hf(rope, head_dim=rotated, max_positions=shared["max_positions"]),
        qkv_bias=fields.take("attention_bias", True),
        windows=(0,) * shared["layers"],
        **shared,
        **options,
    )
