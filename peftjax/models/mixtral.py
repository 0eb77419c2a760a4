"""Mixtral: a Mistral with a mixture of experts in every layer. Jiang et al. 2024 (arXiv:2401.04088), section 2.1."""

from collections.abc import Mapping
from typing import Unpack

from peftjax.models.base import ComputeOptions
from peftjax.models.decoder_fields import read_rope, read_shared
from peftjax.models.fields import Fields
from peftjax.models.moe import MoeConfig, MoeLlama, read_experts


class Mixtral(MoeLlama):
    """RMSNorm, rotary grouped-query attention, and the weighted sum of the chosen SwiGLU experts."""

    @property
    def hf_renamed(self) -> Mapping[str, str]:
        return {path: self.hf_stored(name) for path, name in self.hf_names.items() if ".mlp." in name}

    def hf_stored(self, name: str) -> str:
        return super().hf_stored(name).replace(".mlp.", ".block_sparse_moe.")


# --- Hugging Face: names of our modules, and config.json ---

Mixtral.hf_experts = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}


def from_hf(fields: Fields, **options: Unpack[ComputeOptions]) -> MoeConfig:
    """Read a config.json of model_type mixtral, in the format of transformers 4 or 5."""
    fields.assume(max_position_embeddings=131072, num_key_value_heads=8, rope_theta=1_000_000.0)
    shared = read_shared(fields, norm_eps=1e-5)
    fields.no_dropout("router_jitter_noise")
    return MoeConfig(
        model=Mixtral,
        rope=read_rope(fields, shared["head_dim"], shared["max_positions"]),
        normalized=True,
        expert_mlp=shared["mlp"],
        windows=(fields.maybe("sliding_window") or 0,) * shared["layers"],
        **read_experts(fields, experts=8, choices=2),
        **shared,
        **options,
    )
