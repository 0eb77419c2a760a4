"""Random numbers, as torch draws them on CPUs."""

import math

import numpy as np
import numpy.typing as npt


class TorchGenerator:
    """torch.Generator().manual_seed(seed): MT19937, with one number of 32 bits for each number that is drawn."""

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed % 2**32)

    def bits(self, count: int) -> np.ndarray:
        """Return the next numbers of 32 bits, uint32 [count]."""
        return self._state.randint(0, 2**32, count, np.uint32)

    def uniform(self, shape: tuple[int, ...], low: float, high: float, dtype: npt.DTypeLike = np.float32) -> np.ndarray:
        """Return torch.empty(shape).uniform_(low, high) of dtype float32 or bfloat16."""
        share = (self.bits(math.prod(shape)) & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2.0**-24)
        start, end = np.float32(low), np.float32(high)
        fused = share.astype(np.float64) * (end - start) + start  # rounded once, as by a fused multiply-add
        drawn = fused.astype(np.float32).astype(dtype)
        return np.where(drawn < end.astype(dtype), drawn, start.astype(dtype)).reshape(shape)
