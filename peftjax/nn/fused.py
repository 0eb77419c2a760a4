"""Attention without an array of scores: the choice of an implementation for a batch, and what each of them supports."""

import jax
import jax.numpy as jnp

from peftjax import sharding
from peftjax.core.errors import UserError
from peftjax.nn.attention_kernels import SPLASH_BLOCK, cudnn, splash, triton
from peftjax.nn.attention_mask import AttentionMask
from peftjax.nn.blockwise import blockwise

IMPLEMENTATIONS = ("blockwise", "splash", "cudnn", "triton")

# If no kernel applies, "auto" computes the scores of fewer positions as one array. For decoders with 15M to 8B parameters,
# one layer's scores (4 N T bytes per position) become larger than its other activations (about 24 (D + F) bytes per
# position) at 1,000 to 3,500 positions.
LONG = 2048

# The kernels that "auto" prefers, by platform. Other platforms have none.
KERNELS = {"tpu": ("splash",), "gpu": ("cudnn", "triton"), "cuda": ("cudnn", "triton")}

WIDEST = 128  # the widest heads that cuDNN supports on every GPU


def fused(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: AttentionMask,
    *,
    scale: float | None,
    cap: float | None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attention by the mask's implementation: q [B, T, N, H], k and v [B, P + T, K, H], sinks [N] -> [B, T, N, H]."""
    if mask.implementation == "splash":
        return splash(q, k, v, mask, scale=scale, cap=cap)
    if mask.implementation == "cudnn":
        return cudnn(q, k, v, mask, scale=scale)
    if mask.implementation == "triton":
        return triton(q, k, v, mask, scale=scale)
    return blockwise(q, k, v, mask, scale=scale, cap=cap, sinks=sinks)


def choose_implementation(
    wanted: str,
    platform: str,
    mask: AttentionMask,
    dtype: jnp.dtype,
    *,
    cap: float | None,
    head_dim: int,
    sinks: bool = False,
) -> str:
    """Return which implementation computes a batch: "xla", with an array of scores, or one of `IMPLEMENTATIONS`.

    Args:
        wanted: One of these, or "auto", which takes the platform's kernel if it supports the batch, and otherwise "xla" for
            fewer than `LONG` positions and "blockwise" from there on.
        platform: "cpu", "gpu" or "tpu".
        mask: The mask of the batch.
        dtype: Compute dtype.
        cap: Soft cap of the scores.
        head_dim: Width of one head.
        sinks: Whether the layer has attention sinks.

    Raises:
        UserError: The implementation does not support the batch.
    """
    if wanted == "auto":
        preferred = KERNELS.get(platform, ()) if platform == "tpu" or head_dim <= WIDEST else ()
        kernels = [name for name in preferred if not obstacles(name, mask, dtype, cap=cap, sinks=sinks)]
        return (kernels or ["xla" if mask.length < LONG else "blockwise"])[0]
    if found := obstacles(wanted, mask, dtype, cap=cap, sinks=sinks):
        raise UserError(
            f"attention={wanted!r} does not support {' and '.join(found)}; choose 'xla', 'blockwise' or 'auto'"
        )
    return wanted


def obstacles(name: str, mask: AttentionMask, dtype: jnp.dtype, *, cap: float | None, sinks: bool = False) -> list[str]:
    """Return what an implementation does not support in a batch, as noun phrases; empty if it supports everything."""
    if name in ("xla", "blockwise"):
        return []
    virtual = mask.prefix + mask.shared > 0
    parts = sharding.shard_count("length", mask.length)
    if name == "splash":
        multiple = SPLASH_BLOCK * parts
        found = {
            f"{mask.length} positions, which are not a multiple of {multiple}": mask.length % multiple,
            "packed sequences with virtual tokens": virtual and mask.segments is not None,
            "sliding windows with virtual tokens": virtual and mask.windows,
        }
    else:
        found = {
            "a soft cap": cap is not None,
            "padding masks": mask.valid is not None,
            "prefix tuning": mask.prefix,
            f"{dtype.name}": dtype.name not in ("bfloat16", "float16"),
        }
        if name == "cudnn":
            found |= {
                "packed sequences": mask.segments is not None,
                "sliding windows with virtual tokens": virtual and mask.windows,
                "a machine without cuDNN": jax.default_backend() != "gpu",  # jax on NVIDIA GPUs requires cuDNN
            }
        else:
            found |= {
                "packed sequences with virtual tokens": virtual and mask.segments is not None,
                "sliding windows": mask.windows,
                f"{mask.length} positions, which are not a multiple of {SPLASH_BLOCK}": mask.length % SPLASH_BLOCK,
                "a sharded length": parts > 1,
            }
    found["chunked attention"] = mask.chunked
    found["attention sinks"] = sinks
    return [reason for reason, holds in found.items() if holds]
