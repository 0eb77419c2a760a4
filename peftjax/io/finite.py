"""Convert the tensors of a checkpoint, and find the tensors of files that hold NaN or Inf."""

from pathlib import Path

import ml_dtypes
import numpy as np

from peftjax.core.errors import UserError

_CHUNK = 2**18  # elements, few enough to stay in the processor's cache


def converted(value: np.ndarray, dtype: np.dtype, name: str, file: Path) -> np.ndarray:
    """Convert a part of tensor `name` in `file` to float32, bfloat16 or float16, in C order.

    The check takes 0.1 to 0.3 s per GB on 2 CPU cores (`benchmarks/load_time.py`).

    Raises:
        UserError: The part holds NaN or Inf, or a value that `dtype` cannot hold.
    """
    with np.errstate(over="ignore"):  # reported below
        result = np.asarray(value, dtype, order="C")
    if is_finite(result):
        return result
    if result.dtype != value.dtype and np.isfinite(value).all():
        raise UserError(
            f"{file}: {name} holds values up to {np.abs(value).max():.3g}, which {dtype} cannot hold (at most "
            f'{float(ml_dtypes.finfo(dtype).max):.3g}); load it with dtype="bfloat16" or "float32"'
        )
    raise UserError(
        f"{file}: {name} holds NaN or Inf: its training diverged or the file is damaged; use another checkpoint"
    )


def check_finite(tensor: np.ndarray, what: str) -> None:
    """Check that a tensor holds floating-point numbers, neither NaN nor Inf in float32.

    Raises:
        UserError: It does not.
    """
    if tensor.dtype.kind in "biu":
        raise UserError(f"{what} has the dtype {tensor.dtype}; an adapter's parameters are floating-point numbers")
    with np.errstate(over="ignore"):  # reported below
        values = np.asarray(tensor, np.float32, order="C")
    if not is_finite(values):
        raise UserError(
            f"{what}: {(~np.isfinite(values)).sum()} of {values.size} values are NaN or infinite; the training diverged or "
            "the file is damaged"
        )


def is_finite(value: np.ndarray) -> bool:
    """Whether a float32, bfloat16 or float16 array holds neither NaN nor Inf.

    The exponent bits decide: NumPy's isfinite takes six times as long for 16-bit floats.
    """
    bits = np.dtype(f"uint{8 * value.itemsize}")
    infinity = np.asarray(np.inf, value.dtype).view(bits)
    unsigned = np.asarray(np.iinfo(bits).max >> 1, bits)  # without the sign
    flat = value.reshape(-1).view(bits)
    return all((flat[i : i + _CHUNK] & unsigned).max() < infinity for i in range(0, flat.size, _CHUNK))
