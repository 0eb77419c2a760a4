"""GPT-2: learned positions, pre-norm LayerNorm, one fused layer for q, k and v, a head tied to the embedding.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
"""

import dataclasses
import json
from typing import ClassVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.core.errors import UserError
from peftjax.models.base import ComputeOptions
from peftjax.models.decoder import Block, Decoder, DecoderConfig
from peftjax.models.fields import Fields
from peftjax.nn.attention import FusedAttention
from peftjax.nn.cache import Cache
from peftjax.nn.linear import Conv1D
from peftjax.nn.norm import LayerNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpt2Config(DecoderConfig):
    """Adds `scaled`: whether scores are divided by sqrt(H)."""

    scaled: bool


class Gpt2(Decoder):
    """LayerNorm, attention without rotary embedding, a plain feed-forward layer."""

    config: Gpt2Config
    norm_type: ClassVar = LayerNorm
    hf_prefix: ClassVar[str] = "transformer."
    hf_tied: ClassVar = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: Gpt2Config, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs)
        self.positions = config.make_table(config.max_positions, rngs)

    def make_block(self, rngs: nnx.Rngs) -> Block:
        config = self.config
        attention = config.make_attention(
            rngs, FusedAttention, qkv_bias=True, out_bias=True, scale=None if config.scaled else 1.0, linear=Conv1D
        )
        return Block(self.make_norm, attention, config.make_feedforward(rngs, use_bias=True, linear=Conv1D))

    def hidden(
        self,
        tokens: jax.Array,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        if positions is None:
            self.check_length(tokens.shape[1])
        return super().hidden(tokens, mask=mask, positions=positions, segments=segments, cache=cache)

    def with_positions(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return x + jnp.broadcast_to(self.positions(positions), x.shape)


# --- Hugging Face: names of our modules, and config.json ---

Gpt2.hf_names = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "blocks.attention_norm": "transformer.h.{}.ln_1",
    "blocks.attention.qkv": "transformer.h.{}.attn.c_attn",
    "blocks.attention.out": "transformer.h.{}.attn.c_proj",
    "blocks.attention": "transformer.h.{}.attn",
    "blocks.feedforward_norm": "transformer.h.{}.ln_2",
    "blocks.feedforward.up": "transformer.h.{}.mlp.c_fc",
    "blocks.feedforward.down": "transformer.h.{}.mlp.c_proj",
    "blocks.attention_residual": "transformer.h.{}.attention_adapters",
    "blocks.feedforward_residual": "transformer.h.{}.output_adapters",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
Gpt2.hf_ignored = (r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",)  # the causal mask

# Fields of other heads and of half-precision attention, and n_ctx, the old name of n_positions.
_HARMLESS = frozenset({
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "task_specific_params", "reorder_and_upcast_attn", "n_ctx",
})  # fmt: skip
# Every GPT-2 checkpoint has 0.1 here, from pretraining. It changes no logits; when fine-tuning, the method decides on
# dropout.
_DROPOUT = frozenset({"resid_pdrop", "embd_pdrop", "attn_pdrop"})


def from_hf(fields: Fields, **options: Unpack[ComputeOptions]) -> Gpt2Config:
    """Read a config.json of model_type gpt2."""
    fields.skip(*_HARMLESS, *_DROPOUT)
    layers, embed, heads = (fields.take(name) for name in ("n_layer", "n_embd", "n_head"))
    if embed % heads:
        raise UserError(f"config.json: n_embd={embed} is not a multiple of n_head={heads}")
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("add_cross_attention", False)
    return Gpt2Config(
        model=Gpt2,
        vocab=fields.take("vocab_size"),
        embed=embed,
        mlp=fields.take("n_inner", 4 * embed),
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=embed // heads,
        max_positions=fields.take("n_positions"),
        norm_eps=fields.take("layer_norm_epsilon", 1e-5),
        activation=fields.activation("activation_function", "gelu_new"),
        tied=fields.take("tie_word_embeddings", True),
        windows=(0,) * layers,
        scaled=fields.take("scale_attn_weights", True),
        init_stddev=fields.take("initializer_range", 0.02),
        hf=json.dumps(fields.config),
        **options,
    )
