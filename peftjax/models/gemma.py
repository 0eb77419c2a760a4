"""Gemma 2 and the text model of Gemma 3: norms before and after each sublayer, GeGLU, soft caps, sliding windows.

Gemma 2 (arXiv:2408.00118), section 2. Gemma 3 (arXiv:2503.19786), section 2: queries and keys are normalized instead of
capped, and layers with a window have their own rotary embedding.
"""

import dataclasses
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.models.base import ComputeOptions
from peftjax.models.decoder import Block
from peftjax.models.decoder_fields import read_attention_bias, read_rope, read_ropes, read_shared, read_windows
from peftjax.models.fields import Fields
from peftjax.models.llama import Llama, LlamaConfig
from peftjax.nn.norm import ZeroCenteredRMSNorm
from peftjax.nn.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(LlamaConfig):
    """Adds what distinguishes the Gemmas.

    Attributes:
        query_scale: Scores q k^T are divided by its square root.
        attention_cap: Soft cap c of the scores, c tanh(x / c); None: no cap.
        logits_cap: Soft cap of the logits; None: no cap.
    """

    query_scale: float
    attention_cap: float | None
    logits_cap: float | None


class Gemma(Llama):
    """RMSNorm around the sublayers, rotary grouped-query attention with windows, GeGLU."""

    config: GemmaConfig
    norm_type: ClassVar = ZeroCenteredRMSNorm

    def make_block(self, rngs: nnx.Rngs) -> Block:
        config = self.config
        attention = self.make_attention(rngs, scale=config.query_scale**-0.5, softcap=config.attention_cap)
        return Block(self.make_norm, attention, self.make_feedforward(rngs), norm_out=True)

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """Scale the embedded tokens by sqrt(D), rounded to their dtype first: in bfloat16 sqrt(3072) is 55.5."""
        x = super().embedded(tokens)
        return x * jnp.asarray(self.config.embed**0.5, x.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        logits, cap = super().logits(hidden), self.config.logits_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


# --- Hugging Face: names of our modules, and config.json ---

Gemma.hf_names = {
    **Llama.hf_names,
    "blocks.attention_out_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.feedforward_norm": "model.layers.{}.pre_feedforward_layernorm",
    "blocks.feedforward_out_norm": "model.layers.{}.post_feedforward_layernorm",
}
# Defaults of transformers for fields that config.json omits, by model_type.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {"num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192},
    "gemma3_text": {"num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072},
}


def from_hf(fields: Fields, **options: Unpack[ComputeOptions]) -> GemmaConfig:
    """Read a config.json of model_type gemma2 or gemma3_text, in the format of transformers 4 or 5."""
    kind = fields.kind
    fields.assume(**_DEFAULTS[kind])
    fields.skip("cache_implementation")
    shared = read_shared(fields, norm_eps=1e-6, activation=("hidden_activation", "gelu_pytorch_tanh"), tied=True)
    head_dim, max_positions = shared["head_dim"], shared["max_positions"]
    fields.only("use_bidirectional_attention", False)
    fields.implied("hidden_act", shared["activation"])  # an old name
    local_rope: Rope | None = None
    if kind == "gemma2":
        rope = read_rope(fields, head_dim, max_positions)
        attention_cap = fields.nullable("attn_logit_softcapping", 50.0)  # null: no cap
        logits_cap = fields.nullable("final_logit_softcapping", 30.0)
    else:
        theta, local_theta = fields.take("rope_theta", 1_000_000.0), fields.take("rope_local_base_freq", 10_000.0)
        rope, local_rope = read_ropes(fields, head_dim, max_positions, theta=theta, local_theta=local_theta)
        fields.only("attn_logit_softcapping", None)  # a field of Gemma 3 that transformers does not use
        attention_cap, logits_cap = None, fields.maybe("final_logit_softcapping")
    return GemmaConfig(
        model=Gemma,
        rope=rope,
        local_rope=local_rope,
        **read_attention_bias(fields),
        qk_norm=kind == "gemma3_text",
        query_scale=fields.take("query_pre_attn_scalar", 256),
        attention_cap=attention_cap,
        logits_cap=logits_cap,
        windows=_windows(fields, shared["layers"]),
        **shared,
        **options,
    )


def _windows(fields: Fields, layers: int) -> tuple[int, ...]:
    """Read layer_types; by default every second layer of Gemma 2 and every sixth of Gemma 3 has no window."""
    window = fields.nullable("sliding_window", 4096) or 0
    fields.implied("sliding_window_size", window)  # an old name
    every = 2
    if fields.kind == "gemma3_text":
        every = fields.maybe("sliding_window_pattern") or 6
        if fields.config.get("layer_types"):
            fields.skip("_sliding_window_pattern")  # transformers writes it and never reads it
    default = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    return read_windows(fields, default, window)
