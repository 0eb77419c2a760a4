"""Phi-3: a Llama with q, k, v and gate, up fused into one layer each, partially rotated heads, longrope and a window.

Abdin et al. 2024 (arXiv:2404.14219), section 2. Phi-3.5 mini, Phi-4 and Phi-4 mini have the same architecture.
"""

from typing import ClassVar, Unpack

from peftjax.core.errors import UserError
from peftjax.models.base import ComputeOptions
from peftjax.models.decoder_fields import read_shared, rope_fields
from peftjax.models.fields import Fields
from peftjax.models.llama import Llama, LlamaConfig
from peftjax.nn.attention import FusedAttention
from peftjax.nn.feedforward import FusedGatedFeedForward
from peftjax.nn.rope import Rope
from peftjax.nn.rope import from_hf as rope_from_hf


class Phi3(Llama):
    """RMSNorm, rotary grouped-query attention and SwiGLU; layers that read the same input are fused."""

    attention_type: ClassVar = FusedAttention
    feedforward_type: ClassVar = FusedGatedFeedForward


# --- Hugging Face: names of our modules, and config.json ---

Phi3.hf_names = {
    **Llama.hf_names,
    "blocks.attention.qkv": "model.layers.{}.self_attn.qkv_proj",
    "blocks.feedforward.gate_up": "model.layers.{}.mlp.gate_up_proj",
}
# Fields that Phi-4 mini's own code reads and transformers does not, with their neutral values.
_NEUTRAL = {
    "attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1, "interpolate_factor": 1,
}  # fmt: skip


def from_hf(fields: Fields, **options: Unpack[ComputeOptions]) -> LlamaConfig:
    """Read a config.json of model_type phi3, in the format of transformers 4 or 5."""
    fields.assume(max_position_embeddings=4096)
    fields.skip("auto_map")
    shared = read_shared(fields, norm_eps=1e-5)
    fields.no_dropout("resid_pdrop", "embd_pdrop")
    for name, value in _NEUTRAL.items():
        fields.implied(name, value)
    return LlamaConfig(
        model=Phi3,
        rope=_rope(fields, shared["head_dim"], shared["max_positions"]),
        windows=(fields.maybe("sliding_window") or 0,) * shared["layers"],
        **shared,
        **options,
    )


def _rope(fields: Fields, head_dim: int, max_positions: int) -> Rope:
    """Read the rotary embedding of the first partial_rotary_factor of each head; "yarn" and "su" are old names of longrope."""
    # The original training length is a field outside rope_parameters, and takes precedence over one inside.
    original = fields.take("original_max_position_embeddings", 4096)
    parameters = rope_fields(fields) | {"original_max_position_embeddings": original}
    kind = parameters.pop("rope_type", parameters.pop("type", "default"))
    kind = {"su": "longrope", "yarn": "longrope"}.get(kind, kind)
    if kind not in ("default", "longrope"):
        raise UserError(f"config.json: rope_type {kind!r} is not supported for model_type 'phi3', only longrope")
    rotated = int(head_dim * parameters.pop("partial_rotary_factor", 1.0))
    return rope_from_hf(parameters | {"rope_type": kind}, head_dim=rotated, max_positions=max_positions)
