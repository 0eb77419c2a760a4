"""Which implementation computes a model's causal attention."""

from typing import Any

import numpy as np
from flax import nnx

from peftjax.core.errors import UserError
from peftjax.models.decoder import Decoder
from peftjax.nn.attention import Attention


def use_kernel(model: nnx.Module, kernel: str, platform: str = "cpu") -> None:
    """Select the implementation of a model's causal attention without a cache.

    Only "xla" stores an array of scores, float32 [B, N, T, S]. Attention that is not causal, attention with dropout, and
    decoding with a cache always use "xla".

    Args:
        model: A model; its layers are changed.
        kernel: "xla", "auto", or one of `nn.fused.IMPLEMENTATIONS`.
        platform: The platform for which "auto" chooses: "cpu", "gpu" or "tpu".

    Raises:
        UserError: The model has no causal attention, or has attention dropout, and `kernel` is neither "xla" nor "auto".
    """
    layers = [module for _, module in nnx.iter_modules(model) if isinstance(module, Attention)]
    reasons = {
        "no causal attention": not isinstance(model, Decoder),
        "attention dropout": isinstance(model, Decoder) and any(layer.dropout.rate for layer in layers),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found and kernel not in ("xla", "auto"):
        raise UserError(
            f"attention={kernel!r} supports causal attention without dropout only, and this {type(model).__name__} has "
            f"{' and '.join(found)}; choose 'auto' or 'xla'"
        )
    for layer in layers:
        layer.implementation, layer.platform = "xla" if found else kernel, platform


def kernel_of(model: nnx.Module, length: int, *, packed: bool, padded: bool) -> str:
    """Return the implementation of attention for batches of `length` positions, virtual ones included.

    Args:
        model: The model.
        length: Number of positions.
        packed: Whether the batches have segments.
        padded: Whether they have a mask of what is padding.

    Raises:
        UserError: The implementation that the model was set to does not support such a batch.
    """
    if not isinstance(model, Decoder):
        return "xla"
    some: Any = np.zeros((1, 1), np.int32)  # a placeholder, in NumPy because the devices may not be attached
    valid, segments = (some if given else None for given in (padded, packed))
    mask = model.attention_mask(length, positions=some, valid=valid, segments=segments)
    return model.blocks.attention.chosen(mask, np.dtype(model.config.dtype))
