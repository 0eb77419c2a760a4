"""GPT-2: learned positions, LayerNorm before each sublayer, one layer for q, k and v, a head tied to the embedding.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
"""

import dataclasses
import json
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.models.decoder import Block, Decoder, DecoderConfig
from peftjax.models.fields import HARMLESS, Fields
from peftjax.nn.attention import Cache, FusedAttention
from peftjax.nn.embedding import Embedding
from peftjax.nn.feedforward import ACTIVATIONS, FeedForward
from peftjax.nn.linear import Conv1D
from peftjax.nn.norm import LayerNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpt2Config(DecoderConfig):
    """Sizes and options of one model. scaled: scores are divided by sqrt(H)."""

    scaled: bool

    def make(self, rngs: nnx.Rngs) -> "Gpt2":
        return Gpt2(self, rngs)


class Gpt2(Decoder):
    """LayerNorm, attention without rotation, a plain feed-forward layer."""

    hf_prefix: ClassVar = "transformer."
    hf_tied: ClassVar = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: Gpt2Config, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs)
        self.positions = Embedding(
            config.max_positions,
            config.embed,
            stddev=config.init_stddev,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )

    @staticmethod
    def make_block(config: Gpt2Config, rngs: nnx.Rngs) -> Block:
        common: dict[str, Any] = {
            "use_bias": True,
            "linear": Conv1D,
            "stddev": config.init_stddev,
            "dtype": jnp.dtype(config.param_dtype),
            "rngs": rngs,
        }
        scale = None if config.scaled else 1.0
        return Block(
            attention_norm=Gpt2.make_norm(config),
            attention=FusedAttention(
                config.embed, config.heads, config.kv_heads, config.head_dim, scale=scale, **common
            ),
            feedforward_norm=Gpt2.make_norm(config),
            feedforward=FeedForward(config.embed, config.mlp, activation=ACTIVATIONS[config.activation], **common),
        )

    @staticmethod
    def make_norm(config: Gpt2Config) -> LayerNorm:
        return LayerNorm(config.embed, eps=config.norm_eps, dtype=jnp.dtype(config.param_dtype))

    def hidden(
        self, tokens: jax.Array, *, positions: jax.Array | None = None, **inputs: Any
    ) -> tuple[jax.Array, Cache | None]:
        length, limit = tokens.shape[1], self.config.max_positions - self.virtual
        if positions is None and length > limit:
            virtual = f" less the {self.virtual} of its virtual tokens" if self.virtual else ""
            raise ValueError(
                f"{length} tokens exceed the model's {self.config.max_positions} positions{virtual}; give it fewer"
            )
        return super().hidden(tokens, positions=positions, **inputs)

    def placed(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return x + jnp.broadcast_to(self.positions(positions), x.shape)

    def rotations(self, positions: jax.Array) -> None:
        return None


# --- Hugging Face: what its config.json says, and what it calls our modules ---

Gpt2.hf_modules = {
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

# About other heads, about the precision of half floats alone, and n_ctx, the older name of n_positions.
_HARMLESS = frozenset({
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "task_specific_params", "reorder_and_upcast_attn", "n_ctx",
})  # fmt: skip
# Every GPT-2 has 0.1 here, of its pretraining. It changes no logits, and here it is the method that drops out or not.
_DROPOUT = frozenset({"resid_pdrop", "embd_pdrop", "attn_pdrop"})


def from_hf(config: dict[str, Any], **options: Any) -> Gpt2Config:
    """Read a config.json of model_type gpt2.

    Raises:
        ValueError: a field is missing, unknown, or has a value that this family cannot honour.
    """
    fields = Fields(config, harmless=HARMLESS | _HARMLESS | _DROPOUT)
    layers, embed, heads = (fields.take(name) for name in ("n_layer", "n_embd", "n_head"))
    if embed % heads:
        raise ValueError(f"config.json: n_embd={embed} is no multiple of n_head={heads}")
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("add_cross_attention", False)
    result = Gpt2Config(
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
        hf=json.dumps(config),
        **options,
    )
    fields.done()
    return result
