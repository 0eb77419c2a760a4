"""Experts in MXFP4, as gpt-oss checkpoints store them, decoded when they are read.

The kernels [E, in, out] of one layer are stored as

    NAME_blocks    two 4-bit floats (2 exponent bits, 1 mantissa bit) per byte, the first in the low half, in blocks of 32
                   along the inputs: uint8 [E, out, in / 32, 16]
    NAME_scales    the power of two that multiplies a block, plus 127: uint8 [E, out, in / 32]

Every value is a bfloat16 (OCP Microscaling Formats 1.0, sections 5 and 6).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from peftjax.io.safetensors_files import StoredTensor

METHOD = "mxfp4"  # quant_method in config.json
_BLOCK, _BYTES = 32, 16
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_POSITIVE, *(-value for value in _POSITIVE)], np.float32)
_PAIRS = np.stack([np.tile(_VALUES, 16), np.repeat(_VALUES, 16)], axis=1)  # of each byte, [256, 2]


@dataclasses.dataclass(frozen=True)
class StoredMxfp4(StoredTensor):
    """Kernels [E, in, out] that are decoded as they are read, one expert at a time.

    Attributes:
        blocks: The stored values.
        scales: The stored scales.
    """

    blocks: StoredTensor
    scales: StoredTensor

    def open(self) -> "StoredMxfp4":
        return self

    def __getitem__(self, index: Any) -> np.ndarray:
        """Read and decode the requested slices, and nothing else."""
        blocks, scales = self.blocks.open(), self.scales.open()
        full = (slice(None),) * 3
        experts, inputs, outputs = full if index is Ellipsis else (*index, *full)[:3]
        start, stop, _ = inputs.indices(self.shape[1])
        groups = slice(start // _BLOCK, -(-stop // _BLOCK))
        cut = slice(start - groups.start * _BLOCK, stop - groups.start * _BLOCK)
        chosen = range(*experts.indices(self.shape[0]))
        width = len(range(*outputs.indices(self.shape[2])))
        result = np.empty((len(chosen), stop - start, width), ml_dtypes.bfloat16)
        for own, expert in zip(result, chosen, strict=True):
            where = (slice(expert, expert + 1), outputs, groups)
            own[...] = decode(blocks[where][0], scales[where][0])[:, cut].T
        return result


def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Decode MXFP4: uint8 [..., G, 16] and scales uint8 [..., G] -> float32 [..., 32 G]."""
    powers = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
    return (_PAIRS[blocks] * powers[..., None, None]).reshape(*scales.shape[:-1], -1)


def with_decoded_kernels(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Replace the blocks and scales of each kernel by one tensor with the kernel's name, which decodes them when read."""
    result = dict(stored)
    for name, blocks in stored.items():
        kernel = name.removesuffix("_blocks")
        scales = stored.get(f"{kernel}_scales")
        if kernel == name or scales is None or {blocks.dtype, scales.dtype} != {"U8"}:
            continue
        if len(scales.shape) == 3 and blocks.shape == (*scales.shape, _BYTES):
            del result[name], result[scales.name]
            experts, outputs, groups = scales.shape
            shape = (experts, groups * _BLOCK, outputs)
            result[kernel] = StoredMxfp4(blocks.file, kernel, "BF16", shape, blocks, scales)
    return result
