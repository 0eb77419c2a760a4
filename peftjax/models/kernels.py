"""Which implementation computes a model's causal attention."""

from typing import Any

import numpy as np
from flax import nnx

from peftjax.core.errors import UserError
from peftjax.models.decoder import Decoder
from peftjax.nn.attention import Attention


def use_kernel(model: nnx.Module, kernel: str, platform: str = "cpu") -> None:
    """Select the implementation of a model's causal attention without a cache.

    Only "xla" stores an array of scores, float32 [B, N, T, S]. Attention that is not causal and decoding with a cache always
    use "xla".

    Args:
        model: A model; its layers are changed.
        kernel: "xla", "auto", or one of `nn.fused.IMPLEMENTATIONS`.
        platform: The platform for which "auto" chooses: "cpu", "gpu" or "tpu".

    Raises:
        UserError: The model has no causal attention, and `kernel` is neither "xla" nor "auto".
    """
    if not isinstance(model, Decoder):
        if kernel not in ("xla", "auto"):
            raise UserError(
                f"attention={kernel!r} supports causal attention only, and this {type(model).__name__} has no causal "
                "attention; choose 'auto' or 'xla'"
            )
        return  # other models compute with "xla" only
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, Attention):
            layer.implementation, layer.platform = kernel, platform


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
    array: Any = np.zeros((1, 1), np.int32)  # a placeholder, in NumPy because the devices may not be attached
    valid, segments = (array if given else None for given in (padded, packed))
    mask = model.attention_mask(length, positions=array, valid=valid, segments=segments)
    return model.blocks.attention.chosen(mask, np.dtype(model.config.dtype))
