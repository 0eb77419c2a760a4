"""SmolLM3: a Llama without rotary embedding in every fourth layer (Yang et al. 2025, arXiv:2501.18795)."""

from typing import Unpack

from peftjax.core.errors import UserError
from peftjax.models.base import ComputeOptions
from peftjax.models.decoder_fields import read_attention_bias, read_rope, read_shared, read_windows
from peftjax.models.fields import Fields
from peftjax.models.llama import Llama, LlamaConfig


def from_hf(fields: Fields, **options: Unpack[ComputeOptions]) -> LlamaConfig:
    """Read a config.json of model_type smollm3."""
    fields.assume(max_position_embeddings=32768, num_key_value_heads=4, rope_theta=2_000_000.0)
    shared = read_shared(fields, norm_eps=1e-6, tied=True)
    rotated = read_rotated(fields, shared["layers"])
    window, used = fields.maybe("sliding_window") or 0, fields.take("use_sliding_window", False)
    # By default the layers without rotary embedding have a window.
    types = ["sliding_attention" if used and window and not rotates else "full_attention" for rotates in rotated]
    return LlamaConfig(
        model=Llama,
        rope=read_rope(fields, shared["head_dim"], shared["max_positions"]),
        rotated=rotated,
        **read_attention_bias(fields),
        mlp_bias=fields.take("mlp_bias", False),
        windows=read_windows(fields, types, window),
        **shared,
        **options,
    )


def read_rotated(fields: Fields, layers: int) -> tuple[bool, ...]:
    """Read no_rope_layers, in which 1 stands for a layer with rotary embedding; by default every fourth has none."""
    every, rotated = fields.take("no_rope_layer_interval", 4), fields.maybe("no_rope_layers")
    if not rotated:
        return tuple((i + 1) % every != 0 for i in range(layers))
    if len(rotated) < layers:
        raise UserError(f"config.json: no_rope_layers has {len(rotated)} entries for {layers} layers: {rotated}")
    return tuple(map(bool, rotated[:layers]))
