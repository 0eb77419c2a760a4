"""Partial reads of MXFP4 kernels. Equality with transformers is in tests/interop/test_moe.py."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from peftjax.io import mxfp4, safetensors_files


def test_a_part_of_a_kernel_equals_that_of_the_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    blocks, scales = rng.integers(0, 256, (3, 5, 2, 16), np.uint8), rng.integers(120, 130, (3, 5, 2), np.uint8)
    other = {"a_blocks": np.zeros((2, 2), np.uint8), "a_scales": np.zeros(2, np.uint8)}  # another format
    save_file({"kernel_blocks": blocks, "kernel_scales": scales} | other, tmp_path / "model.safetensors")
    stored = mxfp4.with_decoded_kernels(safetensors_files.read_tensors(tmp_path))
    assert stored.keys() == {"kernel"} | other.keys()
    view = stored["kernel"].open()
    whole = view[...]
    assert whole.shape == stored["kernel"].shape == (3, 64, 5)
    byte, power = int(blocks[1, 3, 1, 4]), 2.0 ** (int(scales[1, 3, 1]) - 127)
    magnitudes = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    for place, code in ((40, byte & 15), (41, byte >> 4)):
        assert float(whole[1, place, 3]) == (-1) ** (code >> 3) * magnitudes[code & 7] * power
    for index in ((slice(1, 3),), (slice(0, 1), slice(24, 40), slice(2, 5)), (slice(None), slice(33, 64))):
        np.testing.assert_array_equal(view[index], whole[index])
