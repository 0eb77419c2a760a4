"""Hugging Face model directories: their files, and where they are, downloaded if necessary."""

import fnmatch
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from peftjax.core.errors import UserError
from peftjax.core.home import expand
from peftjax.core.listing import listing
from peftjax.core.paths import suggest
from peftjax.core.workdir import is_run

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
INDEX = "model.safetensors.index.json"
CHAT_TEMPLATE = "chat_template.jinja"
PROMPT_FORMAT = "peftjax.json"  # beside an adapter or a model that was trained on prompts; tasks/prompt_format.py
# No pickles (*.bin, *.pt, *.pkl): reading one can run arbitrary code.
DOWNLOADED = ("config.json", "model*.safetensors", INDEX, *SIDE_FILES, "modules.json", "*_Pooling/config.json")


def find_model(path: str | Path, revision: str | None = None, files: Sequence[str] = DOWNLOADED) -> Path:
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
