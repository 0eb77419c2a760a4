"""safetensors files: their tensors, which are read when they are needed, and their metadata."""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from peftjax.core.errors import UserError
from peftjax.core.listing import enumerate_some, listing
from peftjax.io.hf_files import INDEX, WEIGHTS
from peftjax.io.json_files import read_json

FLOATS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # what safetensors calls the dtypes of parameters


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file that has not been read.

    Attributes:
        file: The file.
        name: Its name.
        dtype: As in the file's header: "F32", "BF16", ...
        shape: Its shape.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def open(self) -> Any:
        """Return a view that reads the requested part when it is indexed with [...] or slices.

        The file is closed when the view is deleted.
        """
        if 0 in self.shape:
            return _open(self.file).get_tensor(self.name)  # safetensors cannot slice an empty tensor
        if self.dtype not in FLOATS:
            return _open(self.file).get_slice(self.name)
        # get_slice would copy, and does not support 8-bit floats in NumPy.
        return self.mapped().view(FLOATS[self.dtype]).reshape(self.shape)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        bits = re.search(r"\d+", self.dtype)  # "BF16", "F8_E4M3"; "BOOL" has none
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8

    def mapped(self) -> np.ndarray:
        """Map its bytes into memory, uint8 [nbytes]."""
        status = self.file.stat()
        begin, end = _offsets(self.file, status.st_ino, status.st_mtime_ns)[self.name]
        return np.memmap(self.file, np.uint8, mode="r", offset=begin, shape=(end - begin,))


@functools.lru_cache(maxsize=4)
def _offsets(file: Path, inode: int, changed: int) -> dict[str, tuple[int, int]]:
    """Where the tensors of a file begin and end, in bytes. The safetensors library checks this, but does not expose it.

    A file may have tens of thousands of tensors, one or several for every expert, so its header is parsed once and not for
    each of them. `inode` and `changed` (its last change in ns) tell another file at the same path.
    """
    del inode, changed
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    spans = {name: fields["data_offsets"] for name, fields in header.items() if name != "__metadata__"}
    return {name: (8 + length + begin, 8 + length + end) for name, (begin, end) in spans.items()}


def read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return the tensors of model.safetensors, or of the files in model.safetensors.index.json, by name.

    Raises:
        UserError: There is no safetensors file, or one is truncated, malformed or does not match the index.
    """
    if (directory / WEIGHTS).is_file():
        return read_header(directory / WEIGHTS)
    if (directory / INDEX).is_file():
        return _read_sharded(directory)
    if list(directory.glob("pytorch_model*.bin")):
        raise UserError(
            f"{directory} has only pytorch_model.bin, a pickle. Reading a pickle can run arbitrary code, so it is not "
            'supported; convert it to safetensors: load it with transformers and call model.save_pretrained("DIR")'
        )
    raise UserError(
        f"{directory} has neither {WEIGHTS} nor {INDEX}; it holds {listing(directory)}. Other formats, such as "
        'pytorch_model.bin, are neither downloaded nor read; load the model with transformers and call model.save_pretrained("DIR")'
    )


def _read_sharded(directory: Path) -> dict[str, StoredTensor]:
    index = directory / INDEX
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise UserError(f"{index} has no weight_map from tensor names to files")
    files = sorted(set(where.values()))
    if outside := [file for file in files if Path(file).name != file]:
        raise UserError(
            f"{index} names files outside of its directory: {enumerate_some(outside, 3)}; use plain file names"
        )
    if absent := [file for file in files if not (directory / file).is_file()]:
        raise UserError(f"{index} lists files that do not exist: {enumerate_some(absent)}; download them again")
    headers = {file: read_header(directory / file) for file in files}
    if absent := [f"{name} (in {file})" for name, file in where.items() if name not in headers[file]]:
        raise UserError(f"{index} lists tensors that are not in their files: {enumerate_some(absent)}")
    unlisted = {name: tensor for header in headers.values() for name, tensor in header.items()}
    return unlisted | {name: headers[file][name] for name, file in where.items()}


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file, by name.

    Raises:
        UserError: The file is damaged or truncated, or is a git-lfs pointer.
    """
    with _open(file) as stored:
        views = {name: stored.get_slice(name) for name in stored.offset_keys()}
    return {name: StoredTensor(file, name, view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}


def read_file(file: Path) -> dict[str, np.ndarray]:
    """Read all tensors of one safetensors file, by name. Raises as `read_header`."""
    return {name: np.array(tensor.open()[...]) for name, tensor in read_header(file).items()}


def read_arrays(tensors: Iterable[StoredTensor]) -> dict[str, np.ndarray]:
    """Read small tensors, by name; each file is opened once."""
    by_file: dict[Path, list[str]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.file, []).append(tensor.name)
    arrays: dict[str, np.ndarray] = {}
    for file, names in by_file.items():
        with _open(file) as stored:
            arrays |= {name: stored.get_tensor(name) for name in names}
    return arrays


def read_metadata(file: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file, such as {"format": "pt"}."""
    with _open(file) as stored:
        return stored.metadata() or {}


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="numpy", backend="mmap")  # "pread" reads a whole tensor to slice it
    except SafetensorError as error:
        with file.open("rb") as stream:
            if stream.read(8) == b"version ":
                raise UserError(
                    f"{file} is a git-lfs pointer, not the weights; run `git lfs pull` in its repository"
                ) from error
        raise UserError(
            f"{file} is not a safetensors file, or it is damaged or truncated ({error}); download or save it again"
        ) from error
