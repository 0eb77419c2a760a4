"""Datasets of the Hugging Face hub as sources: the files of a split."""

import contextlib
import pathlib
import re
from collections.abc import Iterable, Mapping

from peftjax.core.errors import UserError
from peftjax.core.home import expand
from peftjax.core.paths import suggest
from peftjax.data.hub_layout import CARD, Layout, canonical, declared, inferred, read_configs
from peftjax.io.hf_files import hub_refusal

# The branch in which the hub keeps every public dataset as Parquet, regardless of its original format.
CONVERTED = "refs/convert/parquet"
PARQUET = (".parquet",)


def split_files(spec: str, suffixes: tuple[str, ...]) -> list[pathlib.Path]:
    """The files of hf:NAME[/CONFIG]/SPLIT; huggingface_hub downloads them into its cache.

    If README.md does not say which files make a split, Parquet files are preferred to other formats.

    Args:
        spec: The source string. NAME is OWNER/DATASET on the hub, or a local directory with the layout of such a dataset.
        suffixes: What the names of readable files end in.

    Raises:
        UserError: There is no such dataset, configuration or split, or the hub cannot be reached.
    """
    name, _, split = spec.removeprefix("hf:").rpartition("/")
    if not name or not split:
        raise UserError(f"source {spec!r} must have the form hf:OWNER/NAME/SPLIT or hf:OWNER/NAME/CONFIG/SPLIT")
    folder, config = expand(name), ""
    if _declares(folder.parent, folder.name):
        folder, config = folder.parent, folder.name
    if folder.is_dir():
        files = _files_below(folder)
        formats = PARQUET if any(file.endswith(PARQUET) for file in files) else suffixes
        layout = _layout(files, folder, config, spec, formats, suffixes)
        return [folder / file for file in _choose(layout, config, split, spec)]
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) or ("/" in name and pathlib.Path(name.partition("/")[0]).is_dir()):
        raise UserError(f"source {spec!r}: there is no directory {name}")
    repository, config = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    return _download(repository, config, split, spec, suffixes)


def _declares(folder: pathlib.Path, config: str) -> bool:
    """Whether the README.md of a directory declares a configuration."""
    with contextlib.suppress(UserError):  # it need not be the README.md of a dataset
        configs = read_configs(folder / CARD)
        return isinstance(configs, list) and any(
            isinstance(entry, Mapping) and entry.get("config_name") == config for entry in configs
        )
    return False


def _layout(
    files: list[str],
    folder: pathlib.Path | None,
    config: str,
    spec: str,
    inferable: tuple[str, ...],
    suffixes: tuple[str, ...],
) -> Layout:
    """The layout that README.md in the folder declares, else inferred from the files that end in `inferable`."""
    try:
        if folder is not None and (configs := read_configs(folder / CARD)):
            return declared(files, configs, suffixes, config)
    except UserError as error:
        raise UserError(f"source {spec!r}: {error}") from error
    return inferred(file for file in files if file.endswith(inferable))


def _stages(suffixes: tuple[str, ...]) -> Iterable[tuple[str | None, tuple[str, ...]]]:
    """Where to look for a dataset, in this order: the branch, and the endings of files whose names tell their split."""
    return (None, PARQUET), (CONVERTED, PARQUET), (None, suffixes)


def _download(repository: str, config: str, split: str, spec: str, suffixes: tuple[str, ...]) -> list[pathlib.Path]:
    import huggingface_hub
    from huggingface_hub.errors import RevisionNotFoundError

    problem: UserError | None = None
    try:
        for revision, inferable in _stages(suffixes):
            try:
                there = huggingface_hub.list_repo_files(repository, repo_type="dataset", revision=revision)
            except RevisionNotFoundError:
                continue
            folder = None
            if revision is None and CARD in there:
                card = huggingface_hub.hf_hub_download(repository, CARD, repo_type="dataset")
                folder = pathlib.Path(card).parent
            try:
                if layout := _layout(there, folder, config, spec, inferable, suffixes):
                    chosen = _choose(layout, config, split, spec)
                    break
            except UserError as error:  # another branch may have the split
                problem = problem or error
        else:
            raise problem or UserError(
                f"source {spec!r}: {repository} has no files that end in {', '.join(suffixes)}, and the hub has not "
                "converted it to Parquet"
            )
        root = huggingface_hub.snapshot_download(
            repository, repo_type="dataset", revision=revision, allow_patterns=chosen
        )
    except UserError:
        raise
    except Exception as error:  # offline; errors of the hub client's HTTP library also get here
        if refusal := hub_refusal(error, repository, "dataset"):
            raise UserError(f"source {spec!r}: {refusal}") from error
        failed = (
            f"source {spec!r}: downloading {repository} from the Hugging Face hub failed ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]})"
        )
        if cached := _cached(repository, config, split, spec, suffixes, failed):
            return cached
        raise UserError(
            f"{failed}. Download it on a machine with network access and give its directory: hf:DIR/SPLIT"
        ) from error
    return [pathlib.Path(root, file) for file in chosen]


def _cached(
    repository: str, config: str, split: str, spec: str, suffixes: tuple[str, ...], failed: str
) -> list[pathlib.Path]:
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

    problem: UserError | None = None
    for revision, inferable in _stages(suffixes):
        try:
            folder = huggingface_hub.snapshot_download(
                repository, repo_type="dataset", revision=revision, local_files_only=True
            )
        except IncompleteSnapshotError as error:  # usual: only one split was downloaded
            folder = error.snapshot_path
        except (LocalEntryNotFoundError, HFValidationError):
            continue
        there = _files_below(pathlib.Path(folder))
        try:
            tree = huggingface_hub.get_cached_repo_tree(repository, repo_type="dataset", revision=revision)
            known = [file.path for file in tree]
        except CachedRepoTreeNotFoundError:  # written by an older version of huggingface_hub
            known = there
        try:
            layout = _layout(known, None if revision else pathlib.Path(folder), config, spec, inferable, suffixes)
            if not layout:
                continue
            chosen = _choose(layout, config, split, spec)
        except UserError as error:
            problem = problem or error
            continue
        count = max(len(chosen), *(int(found[1]) for file in chosen if (found := re.search(r"-of-(\d+)", file))), 0)
        if missing := count - len(set(chosen) & set(there)):
            raise UserError(
                f"{failed}, and {missing} of the {count} files of this split are missing in the cache, {folder}. Run the "
                "command again with network access to complete the download"
            )
        return [pathlib.Path(folder, file) for file in chosen]
    if problem:
        raise problem
    return []


def _files_below(folder: pathlib.Path) -> list[str]:
    paths = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]


def _choose(layout: Layout, config: str, split: str, spec: str) -> list[str]:
    """The files of one split."""
    if not layout:
        raise UserError(f"source {spec!r}: there are no Parquet files, and no files in another format that can be read")
    if not config and "" not in layout and len(layout) == 1:
        (config,) = layout
    if config not in layout:
        known = sorted(filter(None, layout))
        raise UserError(
            f"source {spec!r}: {f'there is no configuration {config!r}' if config else 'name a configuration'}."
            f"{suggest(config, known)} Write hf:NAME/CONFIG/SPLIT with one of {', '.join(known) or 'none'}"
        )
    splits = layout[config]
    same = [name for name in splits if canonical(name) == canonical(split)]
    if split not in splits and not same:
        raise UserError(f"source {spec!r}: no split {split!r}.{suggest(split, splits)} It has {', '.join(splits)}")
    chosen = splits[split if split in splits else same[0]]
    if not chosen:
        raise UserError(f"source {spec!r}: {CARD} gives split {split!r} no files that exist and can be read")
    return chosen
