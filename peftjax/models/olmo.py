"""OLMo 2 and 3: a Llama with norms after its sublayers, and norms of queries and keys over all heads.

OLMo 2 (arXiv:2501.00656). OLMo 3 adds sliding windows to three of four layers; their rotary embedding is not scaled.
"""

from typing import ClassVar, Unpack

from flax import nnx

from peftjax.models.base import ComputeOptions
from peftjax.models.decoder import Block
from peftjax.models.decoder_fields import read_attention_bias, read_rope, read_ropes, read_shared, read_windows
from peftjax.models.fields import Fields
from peftjax.models.llama import Llama, LlamaConfig
from peftjax.nn.norm import Float32RMSNorm
from peftjax.nn.rope import Rope


class Olmo(Llama):
    """Rotary grouped-query attention and SwiGLU, each followed by RMSNorm."""

    norm_type: ClassVar = Float32RMSNorm

    def make_block(self, rngs: nnx.Rngs) -> Block:
        attention = self.make_attention(rngs, qk_norm_whole=True)
        return Block(self.make_norm, attention, self.make_feedforward(rngs), norm_in=False, norm_out=True)


# --- Hugging Face: names of our modules, and config.json ---

Olmo.hf_names = {
    **Llama.hf_names,
    "blocks.attention_out_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.feedforward_out_norm": "model.layers.{}.post_feedforward_layernorm",
}
_THETA = 500_000.0  # default of OLMo 3


def from_hf(fields: Fields, **options: Unpack[ComputeOptions]) -> LlamaConfig:
    """Read a config.json of model_type olmo2 or olmo3, in the format of transformers 4 or 5."""
    fields.assume(max_position_embeddings=2048)
    shared = read_shared(fields, norm_eps=1e-5)
    layers, sizes = shared["layers"], (shared["head_dim"], shared["max_positions"])
    local_rope: Rope | None = None
    if fields.kind == "olmo2":
        rope = read_rope(fields, *sizes)
        windows: tuple[int, ...] = (0,) * layers
        fields.implied("layer_types", ["full_attention"] * layers)
    else:
        theta = fields.take("rope_theta", _THETA)  # transformers applies it only to layers without a window
        rope, local_rope = read_ropes(fields, *sizes, theta=theta, local_theta=_THETA)
        # By default every fourth layer has no window.
        types = ["full_attention" if (i + 1) % 4 == 0 else "sliding_attention" for i in range(layers)]
        windows = read_windows(fields, types, fields.nullable("sliding_window", 4096) or 0)
    return LlamaConfig(
        model=Olmo,
        rope=rope,
        local_rope=local_rope,
        **read_attention_bias(fields),
        qk_norm=True,
        windows=windows,
        **shared,
        **options,
    )
