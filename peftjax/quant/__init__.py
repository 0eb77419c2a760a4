"""Quantization formats of frozen kernels, one per file.

In a forward pass, only matmul.py distinguishes a quantized kernel from an array, and grouped.py for the products of
experts. Methods, models and sharding do not know the format.
"""

from collections.abc import Callable
from functools import partial

import jax

from peftjax.quant import int8, nf4
from peftjax.quant.base import Quantized

# The values of `quantize=`, and the functions that quantize a kernel [in, out].
FORMATS: dict[str, Callable[[jax.Array], Quantized]] = {
    "nf4": nf4.quantize,
    # Without double quantization: 4.5 bits per weight instead of 4.127.
    "nf4_single": partial(nf4.quantize, nested=False),
    "int8": int8.quantize,
}


def quantize(kernel: jax.Array, format_: str) -> Quantized:
    """Quantize a kernel [in, out], or the kernels of a stack [*stack, in, out] one after another.

    Args:
        kernel: float32, bfloat16 or float16.
        format_: A key of `FORMATS`.
    """
    if kernel.ndim > 2:
        return jax.lax.map(partial(quantize, format_=format_), kernel)
    return FORMATS[format_](kernel)
