"""Which files of a dataset repository belong to which configuration and split.

The `configs` in the metadata of README.md decide. Without them, the names of the files do.
"""

import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from peftjax.core.errors import UserError

Layout = dict[str, dict[str, list[str]]]  # {configuration: {split: files}}; the default configuration is ""

CARD = "README.md"
_HARMLESS = {"config_name", "data_files", "data_dir", "default", "description", "version", "drop_labels"}
# Files about a dataset that are not its records.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def read_configs(card: pathlib.Path) -> Any:
    """Return `configs` in the metadata of a README.md; None if there is no such file or entry.

    Raises:
        UserError: The metadata is not valid YAML.
    """
    if not card.is_file():
        return None
    from huggingface_hub.repocard import metadata_load

    try:
        return (metadata_load(card) or {}).get("configs")
    except Exception as error:  # of any kind: PyYAML raises what Python does for a malformed value, such as KeyError
        raise UserError(f"{CARD}: the metadata is not valid YAML: {' '.join(str(error).split())}") from error


def declared(files: Iterable[str], configs: Any, suffixes: tuple[str, ...], config: str) -> Layout:
    """Return the layout that README.md declares, with the files of one configuration.

    Args:
        files: All files of the repository.
        configs: The list `configs` of its metadata.
        suffixes: What the names of readable files end in.
        config: The configuration whose files are looked up; empty: the default one.

    Raises:
        UserError: The list is malformed, or the configuration has options of a reader.
    """
    if not isinstance(configs, list) or not all(isinstance(entry, Mapping) for entry in configs):
        raise UserError(f"{CARD}: configs must be a list of entries with config_name and data_files")
    named = {str(entry.get("config_name", "default")): entry for entry in configs}
    layout: Layout = {name: {} for name in named}
    first = [name for name, entry in named.items() if entry.get("default")]
    default = first[0] if first else "default" if "default" in named or len(named) > 1 else next(iter(named))
    name = config or default
    if name in named:
        layout[config] = _splits_of(named[name], name, sorted(files), suffixes)
    return layout


def _splits_of(
    entry: Mapping[str, Any], name: str, files: list[str], suffixes: tuple[str, ...]
) -> dict[str, list[str]]:
    """The files of each split of a configuration; empty for a split without a readable matching file."""
    if others := sorted(entry.keys() - _HARMLESS):
        raise UserError(f"{CARD}: configuration {name!r} sets {', '.join(others)}, which is not supported")
    below = str(entry.get("data_dir") or "").removeprefix("./").strip("/")
    below = f"{below}/" if below and below != "." else ""
    readable = [file for file in files if file.endswith(suffixes)]
    if entry.get("data_files") is None:
        inside = inferred((file.removeprefix(below) for file in readable if file.startswith(below)), flat=True)
        return {split: [below + file for file in found] for split, found in inside[""].items()}
    return {
        split: _matching([below + pattern.removeprefix("./") for pattern in patterns], readable)
        for split, patterns in _by_split(entry["data_files"], name).items()
    }


def _by_split(data_files: Any, name: str) -> dict[str, list[str]]:
    """The patterns of each split. A pattern or a list of patterns alone is the split "train"."""
    if isinstance(data_files, str):
        data_files = [data_files]
    if isinstance(data_files, Mapping):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    if isinstance(data_files, list) and all(isinstance(pattern, str) for pattern in data_files):
        data_files = [{"split": "train", "path": data_files}]
    found: dict[str, list[str]] = {}
    for part in data_files if isinstance(data_files, list) else [None]:
        if not isinstance(part, Mapping) or not part.get("path"):
            raise UserError(f"{CARD}: data_files of configuration {name!r} must name the files of each split")
        paths = part["path"] if isinstance(part["path"], list) else [part["path"]]
        found.setdefault(str(part.get("split", "train")), []).extend(map(str, paths))
    return found


def _matching(patterns: list[str], files: list[str]) -> list[str]:
    """The files that match glob patterns, in the order of the patterns."""
    expressions = []
    for pattern in patterns:
        try:
            expressions.append(re.compile(_expression(pattern)))
        except re.error as error:
            raise UserError(f"{CARD}: {pattern!r} is not a valid file pattern: {error}") from None
    return list(dict.fromkeys(file for wanted in expressions for file in files if wanted.fullmatch(file)))


def _expression(pattern: str) -> str:
    """The regular expression of a glob pattern: ** crosses folders, * and ? do not."""
    parts = re.split(r"(\*\*/?|\*|\?|\[[^\]]+\])", pattern)
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        special.get(part) or (part.replace("[!", "[^") if part.startswith("[") else re.escape(part)) for part in parts
    )


def inferred(files: Iterable[str], *, flat: bool = False) -> Layout:
    """Return the layout that the names of files have.

    data/SPLIT-00000-of-00002.parquet, CONFIG/SPLIT-00000-of-00001.parquet, and, as converted by the hub,
    CONFIG/SPLIT/0000.parquet. Another file belongs to the split that is a word of its name or of its folder's, as in
    squad_train.parquet and train/part.parquet. If no name has such a word, all files are "train". The configuration is empty in
    the folder "data" or "default", or without a folder.

    Args:
        files: The readable files.
        flat: Ignore the folders: all files belong to one configuration.
    """
    placed: dict[str, list[tuple[str, str, str]]] = {}
    for file in sorted(file for file in files if file.rpartition("/")[2] not in _METADATA):
        config, split, stem = _place(file)
        placed.setdefault("" if flat else config, []).append((split, stem, file))
    layout: Layout = {"": {}} if flat else {}
    for config, entries in placed.items():
        named = any(split for split, _, _ in entries)
        for split, stem, file in entries:
            layout.setdefault(config, {}).setdefault(split or (stem if named else "train"), []).append(file)
    return layout


def canonical(split: str) -> str:
    """Return the name that the datasets library gives a split: "validation" for "dev", "valid" and "val"."""
    return next((name for name, others in _SPLITS.items() if split in others), split)


def _place(file: str) -> tuple[str, str, str]:
    """The configuration of a file, its split and its name without endings; the split is empty if no name has one."""
    *folders, name = file.split("/")
    stem = re.sub(r"\.(jsonl?|csv|tsv|parquet)(\.gz|\.zst)?$", "", name)
    if folders and re.fullmatch(r"\d{4,}", stem):
        split = folders.pop().removeprefix("partial-")
    elif sharded := re.fullmatch(r"(.+?)-\d+-of-\d+(-[0-9a-f]+)?", stem):
        split = sharded[1]
    else:
        split = _word_in(stem)
        if not split and folders and (split := _word_in(folders[-1])):
            folders.pop()
    if folders and folders[0] in ("data", "default"):
        del folders[0]
    return "/".join(folders), split, stem


def _word_in(name: str) -> str:
    """The first word of a name that names a split; empty if there is none."""
    known = {word for words in _SPLITS.values() for word in words}
    return next((word for word in re.split(r"[-._ \d]+", name.lower()) if word in known), "")
