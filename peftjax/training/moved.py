"""Records in the workdir of a run, which the run finds again after its workdir was moved or copied.

`peftjax.train` writes the records that it is given into the workdir, and the config has the absolute paths of these files. A
checkpoint records their checksums. In another workdir, a file of the same name and checksum counts as the same source.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftjax.training.config import Config

NAMES = ("train", "eval")  # of the fields of data, and of the files


def checksums(config: Config, workdir: Path) -> dict[str, str]:
    """The SHA-256 of each source of the data that is a file in the workdir, by its path in the config."""
    here = workdir.absolute()
    sources = [source for name in NAMES for source in getattr(config.data, name)]
    return {
        source: _checksum(Path(source)) for source in sources if Path(source).parent == here and Path(source).is_file()
    }


def relocations(identity: Mapping[str, Any], workdir: Path) -> dict[str, str]:
    """The present paths of the files of records that have moved, by the paths that a checkpoint recorded."""
    found = {}
    for source, checksum in identity.get("records", {}).items():
        now = workdir.absolute() / Path(source).name
        if str(now) != source and now.is_file() and _checksum(now) == checksum:
            found[source] = str(now)
    return found


def relocated(identity: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """The config that a checkpoint recorded, with the present paths of its records."""
    moved, config = relocations(identity, workdir), dict(identity["config"])
    stored = config["data"]
    data = {name: [moved.get(source, source) for source in stored[name]] for name in NAMES if name in stored}
    return config | {"data": {**stored, **data}}


def changed_records(identity: Mapping[str, Any], config: Config, workdir: Path) -> list[str]:
    """A line for each file of records in the workdir that has its recorded path but another checksum."""
    recorded = identity.get("records", {})
    return [
        f"the records in {source} have changed"
        for source, checksum in checksums(config, workdir).items()
        if recorded.get(source, checksum) != checksum
    ]


def data_state(state: Mapping[str, Any], identity: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """The position in the data that a checkpoint recorded, with the present paths of its records."""
    moved = relocations(identity, workdir)
    return {**state, "sources": [[moved.get(source, source), length] for source, length in state["sources"]]}


def with_own_records(config: Config, workdir: Path) -> Config:
    """The config with files in the workdir in place of records of the same name that are missing, as after a move."""

    def present(source: str, name: str) -> str:
        own = workdir.absolute() / f"{name}.jsonl"
        missing = Path(source).is_absolute() and Path(source).name == own.name and not Path(source).exists()
        return str(own) if missing and own.is_file() else source

    train, held_out = (tuple(present(source, name) for source in getattr(config.data, name)) for name in NAMES)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train=train, eval=held_out))


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
