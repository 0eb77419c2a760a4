"""Llama 1 to 3 and their variants: Mistral (sliding window), Qwen2 (q, k, v biases) and Qwen3 (q and k norms).

Touvron et al. 2023 (arXiv:2302.13971), section 2.2; Jiang et al. 2023 (arXiv:2310.06825); Qwen2 (arXiv:2407.10671);
Qwen3 (arXiv:2505.09388).
"""

import dataclasses
from typing import Any, ClassVar, Unpack

from flax import nnx

from peftjax.core.errors import UserError
from peftjax.models.base import ComputeOptions
from peftjax.models.decoder import Block, Decoder, DecoderConfig
from peftjax.models.decoder_fields import read_rope, read_shared, read_windows
from peftjax.models.fields import Fields
from peftjax.nn.attention import Attention
from peftjax.nn.feedforward import FeedForward, GatedFeedForward
from peftjax.nn.moe import MixtureOfExperts
from peftjax.nn.norm import RMSNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """Adds which layers have biases, and whether queries and keys are normalized."""

    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


class Llama(Decoder):
    """RMSNorm, rotary grouped-query attention, SwiGLU.

    Attributes:
        norm_type, attention_type, feedforward_type: Classes of the layers.
    """

    config: LlamaConfig
    norm_type: ClassVar[type[RMSNorm]] = RMSNorm
    attention_type: ClassVar[type[Attention]] = Attention
    feedforward_type: ClassVar[type[FeedForward]] = GatedFeedForward

    def make_block(self, rngs: nnx.Rngs) -> Block:
        return Block(self.make_norm, self.make_attention(rngs), self.make_feedforward(rngs))

    def make_attention(self, rngs: nnx.Rngs, **options: Any) -> Attention:
        """Build the attention layer of one block, with further options of `Attention`."""
        config = self.config
        return config.make_attention(
            rngs,
            self.attention_type,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
            norm=self.norm_type,
            **options,
        )

    def make_feedforward(self, rngs: nnx.Rngs) -> FeedForward | MixtureOfExperts:
        """Build the feed-forward layer of one block."""
        return self.config.make_feedforward(rngs, self.feedforward_type, use_bias=self.config.mlp_bias)


# --- Hugging Face: names of our modules, and config.json ---

Llama.hf_names = {
    "embed": "model.embed_tokens",
    "blocks.attention_norm": "model.layers.{}.input_layernorm",
    "blocks.attention.query": "model.layers.{}.self_attn.q_proj",
    "blocks.attention.key": "model.layers.{}.self_attn.k_proj",
    "blocks.attention.value": "model.layers.{}.self_attn.v_proj",
    "blocks.attention.out": "model.layers.{}.self_attn.o_proj",
    "blocks.attention.query_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.attention.key_norm": "model.layers.{}.self_attn.k_norm",
    "blocks.attention": "model.layers.{}.self_attn",
    "blocks.feedforward_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.feedforward.gate": "model.layers.{}.mlp.gate_proj",
    "blocks.feedforward.up": "model.layers.{}.mlp.up_proj",
    "blocks.feedforward.down": "model.layers.{}.mlp.down_proj",
    "blocks.attention_residual": "model.layers.{}.attention_adapters",  # where AdapterHub puts its adapters
    "blocks.feedforward_residual": "model.layers.{}.output_adapters",
    "norm": "model.norm",
    "head": "lm_head",
}
Llama.hf_ignored = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")

# Defaults of transformers for fields that config.json omits, by model_type.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}


def from_hf(fields: Fields, **options: Unpack[ComputeOptions]) -> LlamaConfig:
    """Read a config.json of model_type llama, mistral, qwen2 or qwen3, in the format of transformers 4 or 5."""
    kind = fields.kind
    fields.assume(**_DEFAULTS[kind])
    shared = read_shared(fields, norm_eps=1e-6)
    attention_bias = fields.take("attention_bias", False) if kind in ("llama", "qwen3") else False
    return LlamaConfig(
        model=Llama,
        rope=read_rope(fields, shared["head_dim"], shared["max_positions"]),
        qkv_bias=attention_bias or kind == "qwen2",
        out_bias=attention_bias,
        mlp_bias=fields.take("mlp_bias", False) if kind == "llama" else False,
        qk_norm=kind == "qwen3",
        windows=_windows(fields, shared["layers"]),
        **shared,
        **options,
    )


def _windows(fields: Fields, layers: int) -> tuple[int, ...]:
    """Mistral: all layers. Qwen: as layer_types says, else the layers from max_window_layers on if use_sliding_window."""
    if fields.kind == "mistral":  # null: a Mistral without a window
        return (fields.nullable("sliding_window", 4096) or 0,) * layers
    if fields.kind == "llama":
        if window := fields.maybe("sliding_window"):
            raise UserError(
                f"config.json: sliding_window={window} is not a field of model_type 'llama'; mistral has it"
            )
        fields.implied("layer_types", ["full_attention"] * layers)
        return (0,) * layers
    window = fields.nullable("sliding_window", 4096) or 0  # null: no window
    first, used = fields.take("max_window_layers", 28), fields.take("use_sliding_window", False) and window > 0
    default = ["sliding_attention" if used and i >= first else "full_attention" for i in range(layers)]
    return read_windows(fields, default, window if used else 0)
