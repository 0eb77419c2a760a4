"""Number formats of frozen kernels, and the one product that knows them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from peftjax.quant import int8, nf4
from peftjax.quant.base import Quantized

# What `quantize=` can be, and what it makes of a kernel [in, out].
FORMATS: dict[str, Callable[[Any], Quantized]] = {
    "nf4": nf4.quantize,
    "nf4_single": partial(nf4.quantize, nested=False),  # without double quantization: 4.5 bits instead of 4.127
    "int8": int8.quantize,
}


def quantize(kernel: jax.Array, format_: str) -> Quantized:
    """A kernel [in, out], or a stack of them one after the other, in a format."""
    encode = FORMATS[format_]
    return jax.lax.map(encode, kernel) if kernel.ndim > 2 else encode(kernel)
