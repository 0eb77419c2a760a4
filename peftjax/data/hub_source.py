"""Datasets of the Hugging Face hub as sources: the Parquet files of a split."""

import pathlib
import re
from collections.abc import Iterable

from peftjax.core.errors import UserError
from peftjax.core.paths import suggest

# The branch in which the hub keeps every public dataset as Parquet, regardless of its original format.
CONVERTED = "refs/convert/parquet"


def split_files(spec: str) -> list[pathlib.Path]:
    """The Parquet files of hf:NAME[/CONFIG]/SPLIT, sorted; huggingface_hub downloads them into its cache.

    Args:
        spec: The source string. NAME is OWNER/DATASET on the hub, or a local directory with the layout of such a dataset.

    Raises:
        UserError: There is no such dataset, configuration or split, or the hub cannot be reached.
    """
    name, _, split = spec.removeprefix("hf:").rpartition("/")
    if not name or not split:
        raise UserError(f"source {spec!r} must have the form hf:OWNER/NAME/SPLIT or hf:OWNER/NAME/CONFIG/SPLIT")
    folder = pathlib.Path(name).expanduser()
    if folder.is_dir():
        return [folder / file for file in _choose(_parquet_files(folder), "", split, spec)]
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) or ("/" in name and pathlib.Path(name.partition("/")[0]).is_dir()):
        raise UserError(f"source {spec!r}: there is no directory {name}")
    repository, config = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    return _download(repository, config, split, spec)


def _download(repository: str, config: str, split: str, spec: str) -> list[pathlib.Path]:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        for revision in (None, CONVERTED):
            there = huggingface_hub.list_repo_files(repository, repo_type="dataset", revision=revision)
            if there := [file for file in there if file.endswith(".parquet")]:
                break
        chosen = _choose(there, config, split, spec)
        root = huggingface_hub.snapshot_download(
            repository, repo_type="dataset", revision=revision, allow_patterns=chosen
        )
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(
            f"source {spec!r}: {repository} is gated: accept its terms on the hub, then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"source {spec!r}: {repository} is neither a local directory nor a dataset on the hub. If it is private, log in "
            "with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"source {spec!r}: {repository} has no Parquet files, and the hub has not converted it to Parquet"
        ) from error
    except Exception as error:  # offline; errors of the hub client's HTTP library also get here
        failed = (
            f"source {spec!r}: downloading {repository} from the Hugging Face hub failed ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]})"
        )
        if cached := _cached(repository, config, split, spec, failed):
            return cached
        raise UserError(
            f"{failed}. Download it on a machine with network access and give its directory: hf:DIR/SPLIT"
        ) from error
    return [pathlib.Path(root, file) for file in chosen]


def _cached(repository: str, config: str, split: str, spec: str, failed: str) -> list[pathlib.Path]:
    """The files of a split that are already in the cache; empty if it has no files of the dataset.

    Args:
        failed: The beginning of the message: that the download failed, and why.

    Raises:
        UserError: There is no such split in the cache, or some of its files are missing.
    """
    import huggingface_hub
    from huggingface_hub.errors import (
        CachedRepoTreeNotFoundError,
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
    )

    for revision in (None, CONVERTED):
        try:
            folder = huggingface_hub.snapshot_download(
                repository, repo_type="dataset", revision=revision, local_files_only=True
            )
        except IncompleteSnapshotError as error:  # usual: only one split was downloaded
            folder = error.snapshot_path
        except (LocalEntryNotFoundError, HFValidationError):
            continue
        there = _parquet_files(folder)
        try:
            tree = huggingface_hub.get_cached_repo_tree(repository, repo_type="dataset", revision=revision)
            known = [file.path for file in tree if file.path.endswith(".parquet")]
        except CachedRepoTreeNotFoundError:  # written by an older version of huggingface_hub
            known = there
        if not known:
            continue
        chosen = _choose(known, config, split, spec)
        count = max(len(chosen), *(int(found[1]) for file in chosen if (found := re.search(r"-of-(\d+)", file))), 0)
        if missing := count - len(set(chosen) & set(there)):
            raise UserError(
                f"{failed}, and {missing} of the {count} files of this split are missing in the cache, {folder}. Run the "
                "command again with network access to complete the download"
            )
        return [pathlib.Path(folder, file) for file in chosen]
    return []


def _parquet_files(folder: str | pathlib.Path) -> list[str]:
    root = pathlib.Path(folder)
    return [file.relative_to(root).as_posix() for file in root.rglob("*.parquet")]


def _choose(files: Iterable[str], config: str, split: str, spec: str) -> list[str]:
    """The files of one split, sorted."""
    placed: dict[str, dict[str, list[str]]] = {}
    for file in sorted(files):
        where, part = _place(file)
        placed.setdefault(where, {}).setdefault(part, []).append(file)
    if not placed:
        raise UserError(f"source {spec!r}: there are no Parquet files")
    if not config and "" not in placed and len(placed) == 1:
        (config,) = placed
    if config not in placed:
        known = sorted(filter(None, placed))
        raise UserError(
            f"source {spec!r}: {f'there is no configuration {config!r}' if config else 'name a configuration'}."
            f"{suggest(config, known)} Write hf:NAME/CONFIG/SPLIT with one of {', '.join(known) or 'none'}"
        )
    splits = placed[config]
    if split not in splits:
        raise UserError(f"source {spec!r}: no split {split!r}.{suggest(split, splits)} It has {', '.join(splits)}")
    return splits[split]


def _place(file: str) -> tuple[str, str]:
    """The configuration and the split of a file, by its path.

    data/train-00000-of-00002.parquet, CONFIG/train-00000-of-00001.parquet, train.parquet, and as the hub converts:
    CONFIG/train/0000.parquet. The configuration is empty in the folder "data" or "default", or without a folder.
    """
    *folders, name = file.split("/")
    stem = name.removesuffix(".parquet")
    if stem.isdigit() and folders:
        stem = folders.pop().removeprefix("partial-")
    split = re.sub(r"-\d+-of-\d+(-[0-9a-f]+)?$", "", stem)
    if folders and folders[0] in ("data", "default"):
        del folders[0]
    return "/".join(folders), split
