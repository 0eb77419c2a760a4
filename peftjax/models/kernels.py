"""Which kernel computes a model's causal attention."""

from flax import nnx

from peftjax.core.errors import UserError
from peftjax.models.decoder import Decoder
from peftjax.nn.attention import Attention


def use_kernel(model: nnx.Module, kernel: str) -> None:
    """Select the implementation of a model's causal attention.

    A fused kernel does not hold the scores, float32 [B, N, T, S], in memory. Attention with a mask is always computed by
    XLA.

    Args:
        model: A model; its layers are changed.
        kernel: "xla", or a fused kernel: "cudnn" (NVIDIA GPUs) or "splash" (TPUs).

    Raises:
        UserError: The model never has causal attention without a mask, or it has a soft cap or dropout.
    """
    layers = [module for _, module in nnx.iter_modules(model) if isinstance(module, Attention)]
    if kernel != "xla":
        reasons = {
            "sliding windows": isinstance(model, Decoder) and any(model.config.windows),
            "a soft cap": any(layer.softcap is not None for layer in layers),
            "dropout": any(layer.dropout.rate for layer in layers),
            "prefix tuning": any(layer.adapters.virtual for layer in layers),
            "no causal attention": not layers,
        }
        if found := [reason for reason, holds in reasons.items() if holds]:
            raise UserError(
                f"attention={kernel!r} supports causal attention only, and this {type(model).__name__} has "
                f"{' and '.join(found)}; choose 'xla'"
            )
    for layer in layers:
        layer.implementation = kernel
