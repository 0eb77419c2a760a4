"""Sources of records: datasets, files and image folders, each a random-access sequence of dicts.

A string names a source:

    tfds:NAME[/CONFIG]/SPLIT    a TensorFlow dataset, with TFDS's split syntax: tfds:rewrite_dates/train[:90%]
    hf:NAME[/CONFIG]/SPLIT      a dataset from the Hugging Face hub (OWNER/DATASET), or a directory with its files
    PATH.jsonl                  one JSON object per line, read from disk on access by its byte offset
    PATH.jsonl.gz, .jsonl.zst   the same, compressed; kept decompressed in memory, because there is no random access
    PATH.json                   a list of JSON objects, or JSON Lines; kept in memory, as is a list in PATH.jsonl
    PATH.csv                    rows below a header; kept in memory
    PATH.parquet                kept in memory as Arrow columns
    images:DIR                  the images below DIR/CLASS, read from disk on access

A path may be a glob pattern or a directory; its files, sorted by path, form one source. A suffix such as "@0.5" is the
source's weight in a mixture.
"""

import array
import bisect
import codecs
import gzip
import itertools
import json
import math
import mmap
import os
import pathlib
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from peftjax.core.errors import UserError
from peftjax.core.home import expand
from peftjax.core.paths import suggest
from peftjax.data.hub_source import split_files
from peftjax.data.tables import Csv, Listed, json_problem, json_records
from peftjax.data.tfds_source import open_tfds

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".csv", ".parquet")
SPLITS = ("train", "training", "test", "validation", "valid", "val", "dev", "eval")
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Source(Protocol):
    """A sequence of records, which messages can name."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def name(self, index: int) -> str:
        """Return the file or split and the number of a record, counted from 1: "train.jsonl:17"."""
        ...


def split_weight(spec: str) -> tuple[str, float | None]:
    """Split a source string into the source and its weight: "a.jsonl@0.5" gives ("a.jsonl", 0.5).

    Returns:
        The source without its weight, and the weight; None if it has none.

    Raises:
        UserError: The weight is not positive.
    """
    match = re.fullmatch(r"(.+)@(-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)", spec)
    if not match:
        return spec, None
    weight = float(match[2])
    if not 0 < weight < math.inf:
        raise UserError(f"source {spec!r}: the weight {match[2]} is not positive; use a finite number above 0")
    return match[1], weight


def absolute(spec: str) -> str:
    """Return a source string with an absolute path, if it has a path: "images:a@2" gives "images:/home/me/a@2"."""
    if spec.startswith(("tfds:", "hf:")):
        return spec
    kind, path = ("images:", spec[7:]) if spec.startswith("images:") else ("", spec)
    return f"{kind}{expand(path).absolute()}"


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


class JsonLines:
    """JSON objects, one per line. Blank lines are skipped.

    Args:
        data: The lines: bytes, or a memory-mapped file.
        label: The file's name in the names of records.
    """

    def __init__(self, data: bytes | mmap.mmap, label: str):
        self._data, self._label, self._warned = data, label, False
        self._starts, self._lines = array.array("q"), array.array("q")
        if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(
                f"{label}: the file is UTF-16; convert it to UTF-8, for example with `iconv -f utf-16 -t utf-8`"
            )
        start, line = 0, 1
        while start < len(data):
            end = data.find(b"\n", start) + 1 or len(data)
            if not data[start:end].isspace():
                self._starts.append(start)
                self._lines.append(line)
            start, line = end, line + 1

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = self._starts[index]
        end = self._data.find(b"\n", start)
        text = self._data[start:] if end < 0 else self._data[start:end]
        try:
            record = json.loads(text)
            repaired = _without_lone_surrogates(record) if _SURROGATE.search(text) else record
        except json.JSONDecodeError as error:
            raise UserError(f"{self.name(index)}: not valid JSON: {error.msg}, at column {error.colno}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{self.name(index)}: not valid UTF-8: {error}; convert the file to UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.name(index)}: the JSON cannot be read: {json_problem(error)}") from error
        if not isinstance(record, dict):
            raise UserError(f"{self.name(index)}: expected a JSON object {{...}}, found {type(record).__name__}")
        if repaired is not record and repaired != record and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.name(index)}: a lone surrogate (\\ud800 to \\udfff) is not a character; it is replaced by U+FFFD, here and "
                "in later records",
                stacklevel=2,
            )
        return repaired

    def name(self, index: int) -> str:
        return f"{self._label}:{self._lines[index]}"


# In JSON, escaped (two of them in a row may be one character) or as the bytes that json.loads decodes to one.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")


def _without_lone_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", value)
    if isinstance(value, dict):
        return {_without_lone_surrogates(key): _without_lone_surrogates(entry) for key, entry in value.items()}
    return [_without_lone_surrogates(entry) for entry in value] if isinstance(value, list) else value


class Parquet:
    """The rows of a Parquet file, kept in memory as Arrow columns. Times in nanoseconds are cut to microseconds."""

    def __init__(self, path: pathlib.Path, label: str):
        import pyarrow.parquet

        self._table, self._label = pyarrow.parquet.read_table(path), label
        self._columns = dict(zip(self._table.column_names, self._table.columns, strict=True))
        for name, column in self._columns.items():  # Python's datetime has microseconds
            if pyarrow.types.is_timestamp(column.type) and column.type.unit == "ns":
                self._columns[name] = column.cast(pyarrow.timestamp("us", column.type.tz), safe=False)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = dict[str, Any]()
        for name, column in self._columns.items():
            try:
                record[name] = column[index].as_py()
            except (ValueError, OverflowError) as error:  # a time that Python cannot represent
                raise UserError(f"{self.name(index)}: field {name!r} cannot be read: {error}; remove it") from error
        return record

    def name(self, index: int) -> str:
        return f"{self._label}:{index + 1}"


class ImageFolder:
    """The images at any depth below DIR/CLASS as {"image": the file's bytes, "label": CLASS}, sorted by path.

    A warning lists files without an image suffix. Hidden files and folders are ignored.
    """

    def __init__(self, spec: str):
        self._root = expand(spec.removeprefix("images:"))
        if not self._root.is_dir():
            raise _not_found(spec, self._root, "folder")
        self._paths, others = list[str](), list[str]()
        for path in sorted(_walk(self._root)):
            image = "/" in path and path.lower().endswith(IMAGE_SUFFIXES)
            (self._paths if image else others).append(path)
        classes = class_folders([spec])
        empty = set(classes) - {path.partition("/")[0] for path in self._paths}
        if empty or not classes:
            why = f"its folder {min(empty)!r} contains no images" if empty else "it has no folder for each class"
            raise UserError(
                f"source {spec!r}: {why}. Images belong in DIR/CLASS, and have one of the suffixes {', '.join(IMAGE_SUFFIXES)}"
            )
        if others:
            some = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
            warnings.warn(f"source {spec!r}: ignoring files that are not images of a class: {some}", stacklevel=2)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._paths[index]
        return {"image": (self._root / path).read_bytes(), "label": path.partition("/")[0]}

    def name(self, index: int) -> str:
        return self._paths[index]


def class_folders(specs: Iterable[str]) -> tuple[str, ...]:
    """Return the class names of all image folders among some source strings, sorted."""
    names = [split_weight(spec)[0].removeprefix("images:") for spec in specs if spec.startswith("images:")]
    roots = [root for name in names if (root := expand(name)).is_dir()]
    folders = (entry for root in roots for entry in root.iterdir())
    return tuple(sorted({entry.name for entry in folders if entry.is_dir() and not entry.name.startswith(".")}))


def _walk(root: pathlib.Path) -> Iterator[str]:
    """The paths of all files below a folder that are not hidden, relative to it, with "/" as the separator."""
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield (pathlib.Path(folder) / name).relative_to(root).as_posix()


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
    raise _not_found(spec, path, "file")


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


def _not_found(spec: str, path: pathlib.Path, kind: str) -> UserError:
    """The error for a path that does not exist; it suggests similar names in the nearest existing folder."""
    folder, missing = path.parent, path.name
    while not folder.is_dir():
        folder, missing = folder.parent, folder.name
    names = sorted(entry.name for entry in folder.iterdir())
    holds = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "nothing"
    return UserError(f"source {spec!r}: no such {kind}.{suggest(missing, names)} {folder.resolve()} holds {holds}")


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
    if name.endswith(".jsonl") and (lines := _mapped(path))[:1] != b"[":  # some files of this name hold a JSON list
        return JsonLines(lines, label)
    data = path.read_bytes()
    if name.endswith(".gz"):
        return JsonLines(gzip.decompress(data), label)
    if name.endswith(".zst"):
        import pyarrow

        with pyarrow.input_stream(pyarrow.BufferReader(data), compression="zstd") as stream:
            return JsonLines(stream.read(), label)
    if name.endswith(".csv"):
        return Csv(data, label)
    records = json_records(data, label) if data.strip() else []
    return JsonLines(data, label) if records is None else Listed(_without_lone_surrogates(records), label)


def _mapped(path: pathlib.Path) -> bytes | mmap.mmap:
    with path.open("rb") as file:
        empty = not file.read(1)
        return b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
