"""Sources of records: datasets, files and image folders, each a random-access sequence of dicts.

A string names a source:

    tfds:NAME[/CONFIG]/SPLIT    a TensorFlow dataset, with TFDS's split syntax: tfds:rewrite_dates/train[:90%]
    hf:NAME[/CONFIG]/SPLIT      a dataset from the Hugging Face hub (OWNER/DATASET), or a directory with its files
    PATH.jsonl                  one JSON object per line, read from disk on access by its byte offset
    PATH.jsonl.gz, .jsonl.zst   the same, compressed; kept decompressed in memory, because there is no random access
    PATH.json                   a list of JSON objects, or JSON Lines; kept in memory, as is a list in PATH.jsonl
    PATH.csv, PATH.tsv          rows below a header, separated by commas or tabs; kept in memory
    PATH.parquet                kept in memory as Arrow columns
    images:DIR                  the images below DIR/CLASS, read from disk on access

A path may be a glob pattern or a directory; its files, sorted by path, form one source. A suffix such as "@0.5" is the
source's weight in a mixture.
"""

import bisect
import gzip
import itertools
import mmap
import pathlib
import re
import zlib
from collections.abc import Sequence
from typing import Any, Protocol

from peftjax.core.errors import UserError
from peftjax.core.home import expand
from peftjax.data.hub_source import split_files
from peftjax.data.image_folder import ImageFolder
from peftjax.data.json_lines import JsonLines, without_lone_surrogates
from peftjax.data.source_strings import not_found
from peftjax.data.tables import Csv, Listed, Parquet, json_problem, json_records
from peftjax.data.tfds_source import open_tfds

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".csv", ".tsv", ".parquet")
SPLITS = ("train", "training", "test", "validation", "valid", "val", "dev", "eval")


class Source(Protocol):
    """A sequence of records, which messages can name."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def name(self, index: int) -> str:
        """Return the file or split and the number of a record, counted from 1: "train.jsonl:17"."""
        ...


def open_source(spec: str, *, tfds_data_dir: str = "") -> Source:
    """Open the source that a string, without a weight, names.

    Args:
        spec: The source string, as in the description of this module.
        tfds_data_dir: Directory of prepared TensorFlow datasets; empty: the default of TFDS. A dataset that is not there
            yet is generated or downloaded into it.

    Raises:
        UserError: There is no such file, dataset or split (the message has suggestions), the file type is not supported,
            the file cannot be read, or the source has no records. A line that is not a JSON object is reported when it
            is read.
    """
    if spec.startswith("tfds:"):
        return open_tfds(spec, tfds_data_dir)
    if spec.startswith("images:"):
        return ImageFolder(spec)
    files = split_files(spec, SUFFIXES) if spec.startswith("hf:") else _files(spec)
    # Records of files with the same name in different folders need different names.
    short = len({file.name for file in files}) == len(files)
    opened = [_open_file(file, file.name if short else str(file)) for file in files]
    return opened[0] if len(opened) == 1 else Concatenated(opened)


class Named:
    """A source whose records have its source string in their names."""

    def __init__(self, source: Source, spec: str):
        self._source, self._spec = source, spec

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[index]

    def name(self, index: int) -> str:
        return f"{self._spec}: {self._source.name(index)}"


def with_distinct_names(specs: Sequence[str], sources: Sequence[Source]) -> list[Source]:
    """Return the sources, as `Named` ones where files with the same name, or several image folders, would name records alike."""
    labels = [source.name(0).rpartition(":")[0] for source in sources]
    specs_of = {label: {spec for spec, other in zip(specs, labels, strict=True) if other == label} for label in labels}
    return [
        Named(source, spec) if len(specs_of[label]) > 1 else source
        for spec, source, label in zip(specs, sources, labels, strict=True)
    ]


class Concatenated:
    """The concatenation of several sources."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = sources
        self._ends = list(itertools.accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, i = self._locate(index)
        return source[i]

    def name(self, index: int) -> str:
        source, i = self._locate(index)
        return source.name(i)

    def _locate(self, index: int) -> tuple[Source, int]:
        which = bisect.bisect_right(self._ends, index)
        return self._sources[which], index - (self._ends[which - 1] if which else 0)


class Sample:
    """At most `most` records of a source, evenly spread over it."""

    def __init__(self, source: Source, most: int):
        self._source, self._count = source, min(most, len(source))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[self._index(index)]

    def name(self, index: int) -> str:
        return self._source.name(self._index(index))

    def _index(self, index: int) -> int:
        return index * len(self._source) // self._count


def _files(spec: str) -> list[pathlib.Path]:
    """The files that a path or glob pattern names, sorted. An existing file is never taken for a pattern."""
    path = expand(spec)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_in(path, spec)
    root = pathlib.Path(path.anchor)  # glob accepts only relative patterns
    try:
        files = sorted(file for file in root.glob(str(path.relative_to(root))) if file.is_file())
    except ValueError as error:  # "**" with other characters, before Python 3.13
        raise UserError(f"source {spec!r}: {error}. Write ** between slashes, as in data/**/*.jsonl") from error
    if files:
        return files
    raise not_found(spec, path, "file")


def _files_in(folder: pathlib.Path, spec: str) -> list[pathlib.Path]:
    """The record files in a directory, which must belong to one split."""
    there = [file for file in folder.iterdir() if not file.name.startswith(".")]
    files = sorted(file for file in there if file.name.lower().endswith(SUFFIXES))
    if not files:
        raise UserError(
            f"source {spec!r} is a directory; none of its files ends in {', '.join(SUFFIXES)}. Use images:{spec} if it has a "
            f"folder of images for each class, or hf:{spec}/SPLIT if it has the layout of a hub dataset"
        )
    splits = {word: file.name for file in files if (word := re.split(r"[-_.]", file.name)[0]) in SPLITS}
    if len(splits) > 1:
        raise UserError(
            f"source {spec!r} is a directory with several splits ({', '.join(splits.values())}); give the files of one, such as "
            f"{spec.rstrip('/')}/{min(splits)}*"
        )
    return files


def _open_file(path: pathlib.Path, label: str) -> Source:
    if not path.name.lower().endswith(SUFFIXES):
        raise UserError(
            f"source {str(path)!r}: the name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}; for other sources use "
            "tfds:NAME/SPLIT, hf:NAME/SPLIT or images:DIR"
        )
    try:
        source = _read_file(path, label)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"source {str(path)!r} is not valid UTF-8: {error}; convert the file to UTF-8") from error
    except (ValueError, RecursionError, OSError, EOFError, zlib.error) as error:  # pyarrow's are ValueError or OSError
        raise UserError(f"source {str(path)!r} cannot be read: {json_problem(error)}") from error
    if not len(source):
        raise UserError(f"source {str(path)!r} is empty: it has no records")
    return source


def _read_file(path: pathlib.Path, label: str) -> Source:
    name = path.name.lower()
    if name.endswith(".parquet"):
        return Parquet(path, label)
    if name.endswith(".jsonl") and (lines := mapped(path))[:1] != b"[":  # some files of this name hold a JSON list
        return JsonLines(lines, label)
    data = path.read_bytes()
    if name.endswith(".gz"):
        return JsonLines(gzip.decompress(data), label)
    if name.endswith(".zst"):
        import pyarrow

        with pyarrow.input_stream(pyarrow.BufferReader(data), compression="zstd") as stream:
            return JsonLines(stream.read(), label)
    if name.endswith((".csv", ".tsv")):
        return Csv(data, label, "\t" if name.endswith(".tsv") else ",")
    records = json_records(data, label) if data.strip() else []
    return JsonLines(data, label) if records is None else Listed(without_lone_surrogates(records), label)


def mapped(path: pathlib.Path) -> bytes | mmap.mmap:
    """The bytes of a file, read when they are needed."""
    with path.open("rb") as file:
        empty = not file.read(1)
        return b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
