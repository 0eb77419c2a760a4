"""Ministral 3: a Mistral whose queries are scaled with the logarithm of their position, as in Llama 4."""

import dataclasses
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from peftjax.core.errors import UserError
from peftjax.models.base import ComputeOptions
from peftjax.models.decoder import LayerOptions
from peftjax.models.decoder_fields import read_shared, rope_fields
from peftjax.models.fields import Fields
from peftjax.models.llama import Llama, LlamaConfig
from peftjax.nn.rope import from_hf as rope_from_hf


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinistralConfig(LlamaConfig):
    """Adds the scaling of the queries.

    Attributes:
        growth: The query at position p is multiplied by 1 + growth * ln(1 + floor(p / interval)).
        interval: Number of positions with the same factor, the original training length.
    """

    growth: float
    interval: int


class Ministral(Llama):
    """RMSNorm, rotary grouped-query attention with scaled queries, SwiGLU."""

    config: MinistralConfig

    def query_factors(self, positions: jax.Array) -> Callable[[LayerOptions], jax.Array]:
        intervals = (positions // self.config.interval).astype(jnp.float32)
        factors = 1 + self.config.growth * jnp.log1p(intervals)
        return lambda layer: factors


# --- Hugging Face: config.json ---

# Defaults of transformers for a config.json that does not scale the rotary embedding.
_ROPE: dict[str, Any] = {
    "type": "yarn", "rope_theta": 1_000_000.0, "factor": 16.0, "original_max_position_embeddings": 16384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip


def from_hf(fields: Fields, **options: Unpack[ComputeOptions]) -> MinistralConfig:
    """Read a config.json of model_type ministral3."""
    fields.assume(max_position_embeddings=262144, num_key_value_heads=8, head_dim=128)
    shared = read_shared(fields, norm_eps=1e-5)
    fields.implied("layer_types", ["full_attention"] * shared["layers"])
    scaled = fields.config.get("rope_parameters") or fields.config.get("rope_scaling")
    rope = rope_fields(fields) | ({} if scaled else _ROPE)
    rope.pop("max_position_embeddings", None)  # duplicates the model's field
    growth, interval = rope.pop("llama_4_scaling_beta", None), rope.get("original_max_position_embeddings")
    if growth is None or interval is None:
        raise UserError(
            "config.json: model_type 'ministral3' needs llama_4_scaling_beta and original_max_position_embeddings in "
            f"rope_parameters; it has {sorted(rope)}"
        )
    return MinistralConfig(
        model=Ministral,
        rope=rope_from_hf(rope, head_dim=shared["head_dim"], max_positions=shared["max_positions"]),
        growth=growth,
        interval=interval,
        windows=(fields.maybe("sliding_window") or 0,) * shared["layers"],
        **shared,
        **options,
    )
