"""Hugging Face model directories on disk: where they are, and what their safetensors files hold.

A safetensors file is an 8-byte little-endian length, a JSON header {name: {dtype, shape, data_offsets}} of that length,
and the tensors' bytes. It is read and written here directly: one tensor at a time, of which only the pages that are
asked for are touched, in every dtype (the safetensors package wants a whole file in memory to write it, and its NumPy
side does not know the 8-bit floats).
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from peftjax.core.paths import suggest

EMBEDDED = Path(__file__).resolve().parents[1] / "assets" / "base"

# What stands beside config.json and the weights: the tokenizer's files and the generation defaults.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "preprocessor_config.json",
    "chat_template.json",
    "*.jinja",
)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Never a pickle (*.bin, *.pt, *.pkl): reading one runs whatever code is in it.
DOWNLOADED = ("config.json", "model*.safetensors", INDEX, *SIDE_FILES)

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# --- Where a model is ---


def resolve(path: str | Path, revision: str | None = None) -> Path:
    """The directory meant by `path`: a local one, "embedded" (the small base inside the package), or a hub id.

    A hub id is downloaded by huggingface_hub into its cache, at `revision` (branch, tag or commit), pickles left out.

    Raises:
        ValueError: there is no such directory, it has no config.json, or the hub does not give it.
    """
    name = str(path)
    directory = EMBEDDED if name == "embedded" else Path(path).expanduser()
    if directory.is_dir():
        if revision:
            raise ValueError(f"{name} is a directory and has no revision {revision!r}; revisions belong to hub ids")
        return _with_config(directory)
    if directory.exists():
        raise ValueError(f"{name} is a file; give the directory that holds config.json and the weights")
    if name == "embedded" or not _is_hub_id(name):
        raise ValueError(f"{name}: no such directory.{_near(directory)}")
    return _with_config(_download(name, revision))


def _is_hub_id(name: str) -> bool:
    """`name` or `owner/name`; where a folder `owner` is here, a misspelt local path is meant."""
    word = r"[A-Za-z0-9_][\w.-]*"
    return re.fullmatch(rf"{word}(/{word})?", name) is not None and not ("/" in name and Path(name).parent.is_dir())


def _near(directory: Path) -> str:
    parent = directory.parent
    if not parent.is_dir():
        return f" Its parent {parent} does not exist either."
    there = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return suggest(directory.name, there) or f" In {parent} there are: {', '.join(there[:10]) or 'no directories'}."


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(DOWNLOADED)))
    except GatedRepoError as error:
        raise ValueError(f"{name} is gated: accept its terms on the hub, then log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        known = suggest(name, (entry.name for entry in Path.cwd().iterdir() if entry.is_dir()))
        raise ValueError(
            f"{name} is neither a directory here nor a model on the hub.{known} A private one needs `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{name} has no revision {revision!r} on the hub") from error
    except Exception as error:  # offline; the hub client also lets errors of its HTTP library through
        raise ValueError(
            f"{name}: no such directory here, and the Hugging Face hub cannot be reached "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}). Download it on a machine that is online "
            "and give the directory, or set HF_HOME to a cache that has it"
        ) from error


def _with_config(directory: Path) -> Path:
    if (directory / "config.json").is_file():
        return directory
    if (directory / "adapter_config.json").is_file():
        raise ValueError(f"{directory} holds an adapter, not a model: load its base and give this to load_adapter")
    raise ValueError(f"{directory} has no config.json, so it is no model directory; it holds {_listing(directory)}")


def _listing(directory: Path) -> str:
    names = sorted(entry.name for entry in directory.iterdir())
    return (", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")) or "nothing"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file is not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


# --- What its files hold ---


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file, not yet read. dtype: as in its header ("F32", "BF16", ...)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def open(self) -> np.ndarray:
        """A read-only view of the bytes on disk; what is not indexed is not read, and nothing stays mapped after it."""
        return np.memmap(self.file, DTYPES[self.dtype], mode="r", offset=self.offset, shape=self.shape)


def read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of model.safetensors, or of the files that model.safetensors.index.json names.

    Raises:
        ValueError: there are no safetensors, or they are cut short, malformed, or not what the index says.
    """
    if (directory / WEIGHTS).is_file():
        return read_header(directory / WEIGHTS)
    if (directory / INDEX).is_file():
        return _read_sharded(directory)
    if list(directory.glob("pytorch_model*.bin")):
        raise ValueError(
            f"{directory} has only pytorch_model.bin, a pickle, which can run any code and is never read here; "
            'convert it: load it with transformers and call model.save_pretrained("DIR"), which writes safetensors'
        )
    raise ValueError(f"{directory} has neither {WEIGHTS} nor {INDEX}; it holds {_listing(directory)}")


def _read_sharded(directory: Path) -> dict[str, StoredTensor]:
    index = directory / INDEX
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to files")
    files = sorted(set(where.values()))
    if absent := [file for file in files if not (directory / file).is_file()]:
        raise ValueError(f"{index} lists files that are not there: {enumerate_some(absent)}; download them again")
    headers = {file: read_header(directory / file) for file in files}
    if absent := [f"{name} (in {file})" for name, file in where.items() if name not in headers[file]]:
        raise ValueError(f"{index} lists tensors that are not in their files: {enumerate_some(absent)}")
    unlisted = {name: tensor for header in headers.values() for name, tensor in header.items()}
    return unlisted | {name: headers[file][name] for name, file in where.items()}


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        ValueError: the file is a git-lfs pointer, malformed, cut short, or of a dtype that is not known.
    """
    header, start = _read_raw_header(file)
    tensors = {}
    size = file.stat().st_size
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = entry["dtype"], tuple(map(int, entry["shape"]))
            begin, end = map(int, entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: the header's entry for {name} is malformed: {entry!r}") from error
        if dtype not in DTYPES:
            raise ValueError(f"{file}: {name} has dtype {dtype}, which is not read here; known: {', '.join(DTYPES)}")
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"{file} is damaged: {name} is {dtype} {list(shape)} but takes {end - begin} bytes")
        if start + end > size:
            raise ValueError(f"{file} is cut short: {name} ends at byte {start + end} of {size}; get it again")
        tensors[name] = StoredTensor(file, dtype, shape, start + begin)
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """The file's own metadata, such as {"format": "pt"}."""
    return _read_raw_header(file)[0].get("__metadata__", {})


def _read_raw_header(file: Path) -> tuple[dict[str, Any], int]:
    with file.open("rb") as stream:
        first = stream.read(8)
        if first == b"version ":
            raise ValueError(f"{file} is a git-lfs pointer, not the weights; run `git lfs pull` in its repository")
        length = int.from_bytes(first, "little")
        if len(first) < 8 or not 2 <= length <= file.stat().st_size - 8:
            raise ValueError(f"{file} is no safetensors file, or it is cut short; get it again")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file} is no safetensors file: its header is not JSON") from error
        if not isinstance(header, dict):
            raise ValueError(f"{file} is no safetensors file: its header is not a JSON object")
        return header, 8 + length


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor that is going to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    file: Path, specs: Sequence[TensorSpec], arrays: Iterable[np.ndarray], metadata: dict[str, str]
) -> None:
    """Write a safetensors file, taking the arrays of `specs` from an iterator one at a time.

    The specs must come by falling width of dtype: readers want every tensor aligned to its own width.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for spec in specs:
        assert end % spec.dtype.itemsize == 0, spec
        begin, end = end, end + spec.nbytes
        header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for spec, array in zip(specs, arrays, strict=True):
            assert (array.shape, array.dtype) == (spec.shape, spec.dtype), (spec, array.shape, array.dtype)
            stream.write(np.ascontiguousarray(array).view(np.uint8).data)


def enumerate_some(names: Sequence[str], limit: int = 20) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
