"""Hugging Face model directories on disk: where they are, and what their safetensors files hold."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from peftjax.core.paths import suggest

EMBEDDED = Path(__file__).resolve().parents[1] / "assets" / "base"

# What stands beside config.json and the weights: the tokenizer's files, how images are prepared, how text is generated.
SIDE_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
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
DOWNLOADED = ("config.json", "model*.safetensors", INDEX, *SIDE_FILES, "modules.json", "*_Pooling/config.json")

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


# --- Where a model is ---


def resolve(path: str | Path, revision: str | None = None, files: Sequence[str] = DOWNLOADED) -> Path:
    """The directory meant by `path`: a local one, "embedded" (the small base inside the package), or a hub id.

    A hub id is downloaded by huggingface_hub into its cache, at `revision` (branch, tag or commit), pickles left out;
    files: patterns of what is needed of it.

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
    return _with_config(_download(name, revision, files))


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


def _download(name: str, revision: str | None, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
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


def read_json_if_any(path: Path) -> dict[str, Any]:
    """`read_json` of a file that may be missing: empty then."""
    return read_json(path) if path.is_file() else {}


# --- What its files hold ---


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file, not yet read. dtype: as in its header ("F32", "BF16", ...)."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def open(self) -> Any:
        """What gives an array when it is indexed, by [...] or slices; no more is read, and the file closes with it."""
        if 0 in self.shape:
            return _open(self.file).get_tensor(self.name)  # safetensors cannot slice what has no elements
        if self.dtype not in FLOATS:
            return _open(self.file).get_slice(self.name)
        # safetensors would copy what is looked at, and knows no 8-bit floats in NumPy.
        return self.mapped().view(FLOATS[self.dtype]).reshape(self.shape)

    @property
    def nbytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)  # "BF16", "F8_E4M3"; "BOOL" has none
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8

    def mapped(self) -> np.ndarray:
        """Its bytes, uint8 [nbytes], of which only those are read that are looked at."""
        with self.file.open("rb") as stream:  # safetensors, which has checked the header, gives no offsets
            length = int.from_bytes(stream.read(8), "little")
            begin, end = json.loads(stream.read(length))[self.name]["data_offsets"]
        return np.memmap(self.file, np.uint8, mode="r", offset=8 + length + begin, shape=(end - begin,))


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
        ValueError: the file is a git-lfs pointer, damaged or cut short.
    """
    with _open(file) as stored:
        views = {name: stored.get_slice(name) for name in stored.offset_keys()}
    return {name: StoredTensor(file, name, view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}


def read_arrays(tensors: Iterable[StoredTensor]) -> dict[str, np.ndarray]:
    """Small tensors by name, each file opened once."""
    of_files: dict[Path, list[str]] = {}
    for tensor in tensors:
        of_files.setdefault(tensor.file, []).append(tensor.name)
    arrays: dict[str, np.ndarray] = {}
    for file, names in of_files.items():
        with _open(file) as stored:
            arrays |= {name: stored.get_tensor(name) for name in names}
    return arrays


def read_metadata(file: Path) -> dict[str, str]:
    """The file's own metadata, such as {"format": "pt"}."""
    with _open(file) as stored:
        return stored.metadata() or {}


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="numpy", backend="mmap")  # "pread" reads a whole tensor to slice it
    except SafetensorError as error:
        with file.open("rb") as stream:
            if stream.read(8) == b"version ":
                raise ValueError(
                    f"{file} is a git-lfs pointer, not the weights; run `git lfs pull` in its repository"
                ) from error
        raise ValueError(f"{file} is no safetensors file, damaged or cut short; get it again ({error})") from error


def enumerate_some(names: Sequence[str], limit: int = 20) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
