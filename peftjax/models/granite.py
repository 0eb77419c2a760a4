"""Granite 3: a Llama with scaling factors for embeddings, attention scores, sublayers and logits.

The factors are from Yang et al. 2022 (arXiv:2203.03466).
"""

import dataclasses
import warnings
from functools import partial
from typing import Unpack

import jax
from flax import nnx

from peftjax.models.base import ComputeOptions
from peftjax.models.decoder import Block
from peftjax.models.decoder_fields import read_attention_bias, read_rope, read_shared
from peftjax.models.fields import Fields
from peftjax.models.llama import Llama, LlamaConfig
from peftjax.nn.residual import ScaledResidual, scaled


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraniteConfig(LlamaConfig):
    """Adds the scaling factors.

    Attributes:
        embed_factor: Factor of the first layer's input.
        score_factor: Factor of the scores q k^T.
        residual_factor: Factor of the sublayers' outputs.
        logits_divisor: Divisor of the logits.
    """

    embed_factor: float
    score_factor: float
    residual_factor: float
    logits_divisor: float


class Granite(Llama):
    """RMSNorm, rotary grouped-query attention and SwiGLU, with scaling factors."""

    config: GraniteConfig

    def make_block(self, rngs: nnx.Rngs) -> Block:
        return Block(
            self.make_norm,
            self.make_attention(rngs, scale=self.config.score_factor),
            self.make_feedforward(rngs),
            make_residual=partial(ScaledResidual, self.config.residual_factor),
        )

    def with_positions(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Scale the first layer's input. A soft prompt is also scaled, as in transformers."""
        del positions
        return scaled(x, self.config.embed_factor)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return scaled(super().logits(hidden), 1 / self.config.logits_divisor)


# --- Hugging Face: config.json ---


def from_hf(fields: Fields, **options: Unpack[ComputeOptions]) -> GraniteConfig:
    """Read a config.json of model_type granite, in the format of transformers 4 or 5."""
    # The dropout of the pretraining, as in GPT-2
    if dropout := fields.maybe("attention_dropout"):
        warnings.warn(f"config.json: attention_dropout={dropout} is not applied in training", stacklevel=2)
    fields.assume(max_position_embeddings=2048)
    shared = read_shared(fields, norm_eps=1e-6)
    fields.implied("layer_types", ["full_attention"] * shared["layers"])
    return GraniteConfig(
        model=Granite,
        rope=read_rope(fields, shared["head_dim"], shared["max_positions"]),
        **read_attention_bias(fields),
        mlp_bias=fields.take("mlp_bias", False),
        embed_factor=fields.take("embedding_multiplier", 1.0),
        score_factor=fields.take("attention_multiplier", 1.0),
        residual_factor=fields.take("residual_multiplier", 1.0),
        logits_divisor=fields.take("logits_scaling", 1.0),
        windows=(0,) * shared["layers"],
        **shared,
        **options,
    )
