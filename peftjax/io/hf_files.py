"""Hugging Face model directories: find or download them, and read their JSON and safetensors files."""

import dataclasses
import fnmatch
import functools
import json
import math
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from peftjax.core.errors import UserError
from peftjax.core.home import expand
from peftjax.core.paths import suggest
from peftjax.core.workdir import is_run
from peftjax.io.json_types import check_types

EMBEDDED = Path(__file__).resolve().parents[1] / "assets" / "base"

# Every tokenizer has one of these: tokenizers, SentencePiece, BPE and WordPiece, Mistral, tiktoken.
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")
TEMPLATES = "additional_chat_templates"  # where transformers writes named chat templates, such as the one for tools
# The files besides config.json and the weights: tokenizer, image and video preprocessing, and generation settings.
SIDE_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.json",
    "*.jinja",
    f"{TEMPLATES}/*.jinja",
)
WEIGHTS = "model.safetensors"
PROMPT_FORMAT = "peftjax.json"  # beside an adapter or a model that was trained on prompts; data/prompt_format.py
INDEX = "model.safetensors.index.json"
# No pickles (*.bin, *.pt, *.pkl): reading one can run arbitrary code.
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
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # what safetensors calls the dtypes of parameters


# --- Model directories ---


def resolve(path: str | Path, revision: str | None = None, files: Sequence[str] = DOWNLOADED) -> Path:
    """Return the local directory of a model, downloading it if necessary.

    Args:
        path: A directory, a hub id, or "embedded", the bundled model. huggingface_hub downloads a hub id into its cache.
        revision: Branch, tag or commit of a hub id.
        files: Patterns of the files to download.

    Raises:
        UserError: The directory does not exist or has no config.json, or the download fails.
    """
    name = str(path)
    directory = EMBEDDED if name == "embedded" else expand(path)
    if directory.is_dir():
        if revision:
            raise UserError(f"{name} is a directory and has no revision {revision!r}; revisions belong to hub ids")
        return _with_config(directory)
    if directory.exists():
        raise UserError(f"{name} is a file; give the directory that holds config.json and the weights")
    if name == "embedded" or not is_hub_id(name):
        raise UserError(f"{name}: no such directory.{_near(directory)}")
    if "/" not in name and (near := suggest(name, ["embedded"])):
        raise UserError(f"{name}: no such directory.{near} For a model of this name on the hub, give OWNER/{name}")
    return _with_config(_download(name, revision, files))


def is_hub_id(name: str) -> bool:
    """Whether a name is `model` or `owner/model`; if a local folder `owner` exists, it is a misspelled local path."""
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
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {revision!r} on the hub") from error
    except Exception as error:  # offline; errors of the hub client's HTTP library also get here
        raise UserError(
            hub_refusal(error, name, "model")
            or f"{name} is not a local directory, and downloading it from the Hugging Face hub failed "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}). Download it on a machine with network access "
            "and give its directory, or set HF_HOME to a cache that has it"
        ) from error


def hub_refusal(error: Exception, name: str, kind: str) -> str:
    """Why the hub refuses to give a repository ("model" or "dataset"); empty if the error has another cause."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return f"{name} is gated: accept its terms on the hub, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        known = suggest(name, (entry.name for entry in Path.cwd().iterdir() if entry.is_dir()))
        return f"{name} is neither a local directory nor a {kind} on the hub.{known} If it is private, log in with `hf auth login`"
    return ""


def _with_config(directory: Path) -> Path:
    check_files(directory)
    if is_run(directory):
        model = directory / "model"
        hint = f"give {model}" if model.is_dir() else f"give its base model, and {directory / 'adapter'} as the adapter"
        raise UserError(f"{directory} is the workdir of a training run, not a model directory; {hint}")
    if (directory / "config.json").is_file():
        return directory
    if (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory} holds an adapter, not a model; load its base model, then pass this to load_adapter"
        )
    raise UserError(f"{directory} is not a model directory: config.json is missing; it holds {listing(directory)}")


def check_files(directory: Path, patterns: Iterable[str] = DOWNLOADED) -> None:
    """Raises a UserError if a file of a directory whose name matches one of the patterns is a pipe or a broken link."""
    for path in sorted(directory.iterdir()):  # glob leaves out a link to itself
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns):
            check_regular(path)


def listing(directory: Path) -> str:
    """Name the first entries of a directory, for messages."""
    return enumerate_some(sorted(entry.name for entry in directory.iterdir()), 10) or "no files"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object and check the types of the fields that `json_types` lists.

    Raises:
        UserError: The file is not valid JSON, holds another kind of value, or a field has another type.
    """
    value = load_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    check_types(value, str(path), path.name)
    return value


def load_json(path: Path) -> Any:
    """Read a JSON file that holds any kind of value.

    Raises:
        UserError: It is no regular file, or not valid JSON.
    """
    check_regular(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    return parse_json(text, str(path))


def parse_json(text: str, where: str) -> Any:
    """Parse JSON from a file.

    Raises:
        UserError: It is not valid, is nested too deeply, or has a lone surrogate, which is not a character.
    """
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} has a lone surrogate ({error.object[error.start]!r}), which is not a character; replace it"
        ) from None
    except RecursionError:
        raise UserError(f"{where} is not valid JSON: its values are nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    return value


def check_regular(path: Path) -> None:
    """Raises a UserError for a name that is neither a regular file nor a directory: reading a pipe would wait forever."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.is_symlink():
            return
        raise UserError(
            f"{path} is a link to {path.readlink()}, which does not exist; replace it with the file"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; replace it with a regular file") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path} is a pipe, a socket or a device; replace it with a regular file")


def read_json_if_any(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no such file."""
    return read_json(path) if path.is_file() else {}


# --- safetensors files ---


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


def enumerate_some(names: Sequence[str], limit: int = 20) -> str:
    """Join the first `limit` names with commas, and say how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
