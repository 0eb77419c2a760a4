"""GLM-4: norms before and after each sublayer, rotary embedding of half of each head, fused gate and up layers.

GLM-4 (arXiv:2406.12793); the norms are as in GLM-4-0414.
"""

from typing import ClassVar, Unpack

from flax import nnx

from peftjax.models.base import ComputeOptions
from peftjax.models.decoder import Block
from peftjax.models.decoder_fields import read_shared, rope_fields
from peftjax.models.fields import Fields
from peftjax.models.llama import Llama, LlamaConfig
from peftjax.nn.feedforward import FusedGatedFeedForward
from peftjax.nn.rope import from_hf as rope_from_hf


class Glm4(Llama):
    """RMSNorm around the sublayers, rotary grouped-query attention, SwiGLU."""

    feedforward_type: ClassVar = FusedGatedFeedForward

    def make_block(self, rngs: nnx.Rngs) -> Block:
        attention = self.make_attention(rngs, interleaved=True)
        return Block(self.make_norm, attention, self.make_feedforward(rngs), norm_out=True)


# --- Hugging Face: names of our modules, and config.json ---

Glm4.hf_names = {
    **Llama.hf_names,
    "blocks.attention_out_norm": "model.layers.{}.post_self_attn_layernorm",
    "blocks.feedforward.gate_up": "model.layers.{}.mlp.gate_up_proj",
    "blocks.feedforward_out_norm": "model.layers.{}.post_mlp_layernorm",
}


def from_hf(fields: Fields, **options: Unpack[ComputeOptions]) -> LlamaConfig:
    """Read a config.json of model_type glm4, in the format of transformers 4 or 5."""
    fields.assume(max_position_embeddings=131072, num_key_value_heads=2, head_dim=128, partial_rotary_factor=0.5)
    shared = read_shared(fields, norm_eps=1.5625e-07)
    fields.implied("layer_types", ["full_attention"] * shared["layers"])
    rope = rope_fields(fields)
    rotated = int(shared["head_dim"] * rope.pop("partial_rotary_factor"))
    return LlamaConfig(
        model=Glm4,
        rope=rope_from_hf(rope, head_dim=rotated, max_positions=shared["max_positions"]),
        qkv_bias=fields.take("attention_bias", True),
        windows=(0,) * shared["layers"],
        **shared,
        **options,
    )
