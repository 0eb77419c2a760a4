"""Where records come from: TFDS, JSON Lines and Parquet, each as a random-access sequence of dicts.

A source is named by a string:

    tfds:NAME[/CONFIG]/SPLIT    a TensorFlow dataset, TFDS split syntax included: tfds:rewrite_dates/train[:90%]
    PATH.jsonl                  one JSON object a line; read from disk when asked for, found by byte offset
    PATH.jsonl.gz               the same, compressed; held decompressed in memory, because gzip has no random access
    PATH.parquet                held in memory as Arrow columns
    images:DIR                  the images below DIR/CLASS, read from disk when asked for

A path of JSON Lines or Parquet may be a glob pattern: its files, sorted, make one source. "@0.5" after a source is a weight
in a mixture.
"""

import array
import bisect
import contextlib
import gzip
import importlib
import io
import itertools
import json
import math
import mmap
import os
import pathlib
import re
import warnings
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from peftjax.core.paths import suggest

# TFDS builders of ours, by dataset name: importing the module registers the builder.
OWN_BUILDERS = {"rewrite_dates": "peftjax.data.rewrite_dates"}
IMAGE_ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Source(Protocol):
    """Records by index, and what to call them in a message."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def name(self, index: int) -> str:
        """Where the record stands, counted from 1: "train.jsonl:17"."""
        ...


def split_weight(spec: str) -> tuple[str, float | None]:
    """The source string without its weight, and the weight: "a.jsonl@0.5" is ("a.jsonl", 0.5), "a.jsonl" has None.

    Raises:
      ValueError: the weight is not above zero.
    """
    match = re.fullmatch(r"(.+)@(-?[0-9.]+(?:[eE][-+]?[0-9]+)?)", spec)
    if not match:
        return spec, None
    weight = float(match[2])
    if not 0 < weight < math.inf:
        raise ValueError(f"the source {spec!r} has the weight {match[2]}: a weight is a number above 0")
    return match[1], weight


def open_source(spec: str, *, tfds_data_dir: str = "") -> Source:
    """The records that a source string (without a weight) names.

    `tfds_data_dir` is where prepared TensorFlow datasets lie; "" means TFDS's own default. A TFDS dataset that is not
    there yet is generated, or downloaded, into it.

    Raises:
      ValueError: no such file, dataset or split (with what was near), an ending that is none of ours, a file that
        cannot be read, or a source without a single record. A line that is no JSON object is found when it is read.
    """
    if spec.startswith("tfds:"):
        return _open_tfds(spec, tfds_data_dir)
    if spec.startswith("images:"):
        return ImageFolder(spec)
    files = _files(spec)
    # Two files of the same name in different folders must not share the names of their records.
    short = len({file.name for file in files}) == len(files)
    opened = [_open_file(file, file.name if short else str(file)) for file in files]
    return opened[0] if len(opened) == 1 else Concatenated(opened)


class Concatenated:
    """Several sources one after the other, as one."""

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
    """JSON objects, one a line, in `data` (a memory-mapped file, or bytes). Blank lines are no records."""

    def __init__(self, data: bytes | mmap.mmap, label: str):
        self._data, self._label = data, label
        self._starts, self._lines = array.array("q"), array.array("q")
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
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.name(index)}: not JSON: {error.msg}, at column {error.colno}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.name(index)}: not UTF-8: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{self.name(index)}: expected a JSON object {{...}}, found {type(record).__name__}")
        return record

    def name(self, index: int) -> str:
        return f"{self._label}:{self._lines[index]}"


class Parquet:
    """The rows of a Parquet file, held in memory as Arrow columns."""

    def __init__(self, path: pathlib.Path, label: str):
        import pyarrow.parquet

        self._table, self._label = pyarrow.parquet.read_table(path), label
        self._columns = dict(zip(self._table.column_names, self._table.columns, strict=True))

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index].as_py() for name, column in self._columns.items()}

    def name(self, index: int) -> str:
        return f"{self._label}:{index + 1}"


class ImageFolder:
    """The images below DIR/CLASS, however deep, as {"image": the file's bytes, "label": CLASS}, sorted by path.

    Files that are no images by their endings are told of; hidden ones are nothing.
    """

    def __init__(self, spec: str):
        self._root = pathlib.Path(spec.removeprefix("images:")).expanduser()
        if not self._root.is_dir():
            raise _nothing_there(spec, self._root, "no folder")
        self._paths, others = list[str](), list[str]()
        for path in sorted(_walk(self._root)):
            image = "/" in path and path.lower().endswith(IMAGE_ENDINGS)
            (self._paths if image else others).append(path)
        classes = class_folders([spec])
        empty = set(classes) - {path.partition("/")[0] for path in self._paths}
        if empty or not classes:
            why = f"the folder {min(empty)!r} in it holds no image" if empty else "it has no folder for each class"
            raise ValueError(
                f"the source {spec!r}: {why}. Images are looked for in DIR/CLASS, by their endings: "
                f"{', '.join(IMAGE_ENDINGS)}"
            )
        if others:
            some = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
            warnings.warn(f"{spec}: files that are no images of a class are left out: {some}", stacklevel=2)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._paths[index]
        return {"image": (self._root / path).read_bytes(), "label": path.partition("/")[0]}

    def name(self, index: int) -> str:
        return self._paths[index]


def class_folders(specs: Iterable[str]) -> tuple[str, ...]:
    """The names of the classes that folders of images have, sorted; of other sources nothing is known."""
    names = [split_weight(spec)[0].removeprefix("images:") for spec in specs if spec.startswith("images:")]
    roots = [root for name in names if (root := pathlib.Path(name).expanduser()).is_dir()]
    folders = (entry for root in roots for entry in root.iterdir())
    return tuple(sorted({entry.name for entry in folders if entry.is_dir() and not entry.name.startswith(".")}))


def _walk(root: pathlib.Path) -> Iterator[str]:
    """The files below a folder that are not hidden, as paths below it with "/" between their parts."""
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield (pathlib.Path(folder) / name).relative_to(root).as_posix()


class Tfds:
    """A split of a prepared TensorFlow dataset. Text features come as str, numbers as Python numbers, images as the bytes
    of their files, uint8 arrays as they are."""

    def __init__(self, data: Sequence[Any], label: str, images: Collection[str] = ()):
        self._data, self._label, self._images = data, label, images

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: value if key in self._images else _plain(value) for key, value in self._data[index].items()}

    def name(self, index: int) -> str:
        return f"{self._label}:{index + 1}"


def _plain(value: Any) -> Any:
    """A TFDS value without NumPy scalars, and with its bytes decoded where they are UTF-8 text."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value  # not text
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim > 1:
        return value  # an image
    if hasattr(value, "tolist"):  # a NumPy scalar or array
        return value.tolist() if value.dtype != object else _plain(value.tolist())
    return value


def _files(spec: str) -> list[pathlib.Path]:
    """The files that a path or a glob pattern names, sorted. A file whose own name looks like a pattern is itself."""
    path = pathlib.Path(spec).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        raise ValueError(
            f"the source {spec!r} is a directory: name its files, for example {spec.rstrip('/')}/*.jsonl, or for images in "
            f"folders, one for each class, images:{spec}"
        )
    root = pathlib.Path(path.anchor)  # glob takes relative patterns only
    if files := sorted(file for file in root.glob(str(path.relative_to(root))) if file.is_file()):
        return files
    raise _nothing_there(spec, path, "no file")


def _nothing_there(spec: str, path: pathlib.Path, what: str) -> ValueError:
    """What to say of a path where there is nothing: what is near."""
    folder, missing = path.parent, path.name
    while not folder.is_dir():
        folder, missing = folder.parent, folder.name
    names = sorted(entry.name for entry in folder.iterdir())
    holds = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "nothing"
    return ValueError(f"the source {spec!r} names {what}.{suggest(missing, names)} {folder.resolve()} holds {holds}")


def _open_file(path: pathlib.Path, label: str) -> Source:
    source: Source
    try:
        if path.name.endswith(".jsonl"):
            source = JsonLines(_mapped(path), label)
        elif path.name.endswith(".jsonl.gz"):
            source = JsonLines(gzip.decompress(path.read_bytes()), label)
        elif path.name.endswith(".parquet"):
            source = Parquet(path, label)
        else:
            raise ValueError(
                "its name must end in .jsonl, .jsonl.gz or .parquet (or write tfds:NAME/SPLIT or images:DIR)"
            )
    except (ValueError, OSError, EOFError, zlib.error) as error:  # pyarrow's errors are among these
        raise ValueError(f"cannot read the source {str(path)!r}: {error}") from error
    if not len(source):
        raise ValueError(f"the source {str(path)!r} is empty: there is no record in it")
    return source


def _mapped(path: pathlib.Path) -> bytes | mmap.mmap:
    with path.open("rb") as file:
        empty = not file.read(1)
        return b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _open_tfds(spec: str, data_dir: str) -> Tfds:
    name, _, split = spec.removeprefix("tfds:").rpartition("/")
    if not name or not split:
        raise ValueError(f"the source {spec!r} must read tfds:NAME/SPLIT or tfds:NAME/CONFIG/SPLIT")
    builder = _tfds_builder(name, data_dir, spec)
    if not builder.data_path.exists():
        _prepare(builder, spec)
        builder = _tfds_builder(name, data_dir, spec)
    known, images = list(builder.info.splits), _image_features(builder)
    try:
        data = builder.as_data_source(split, decoders=images or None) if builder.info.splits[split].num_examples else ()
    except NotImplementedError as error:  # prepared as TFRecord
        raise ValueError(
            f"the source {spec!r}: {builder.data_path} was prepared as {builder.info.file_format.value}, which has no "
            "random access. Prepare it again with file_format='array_record', in another config.data.tfds_data_dir"
        ) from error
    except (ValueError, KeyError) as error:
        near = suggest(re.split(r"[\[+]", split)[0], known)
        raise ValueError(
            f"the source {spec!r}: {name} has no split {split!r}.{near} It has {', '.join(known)}, and slices of "
            "them such as train[:90%]"
        ) from error
    if not len(data):
        raise ValueError(f"the source {spec!r} is empty: the split {split!r} of {name} has no record")
    return Tfds(data, f"{name}/{split}", images)


def _image_features(builder: Any) -> dict[str, Any]:
    """The names of the images in a record, each with the wish to have its file's bytes: TFDS would decode them by OpenCV
    where that is installed and by Pillow elsewhere, which are not equal."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features or {})
    return {
        name: tfds.decode.SkipDecoding()
        for name, feature in features.items()
        if isinstance(feature, tfds.features.Image) and feature.np_dtype == np.uint8
    }


def _tfds_builder(name: str, data_dir: str, spec: str) -> Any:
    """The builder of a TFDS dataset, ours registered first."""
    import tensorflow_datasets as tfds

    dataset = re.split(r"[/:]", name)[0]
    if dataset in OWN_BUILDERS:
        importlib.import_module(OWN_BUILDERS[dataset])
    try:
        return tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        folder = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
        known = {*tfds.list_builders(with_community_datasets=False), *(entry.name for entry in folder.glob("*"))}
        near = suggest(dataset, known.union(OWN_BUILDERS))
        where = f"{data_dir!r}" if data_dir else "TFDS's default folder (config.data.tfds_data_dir names another)"
        raise ValueError(f"the source {spec!r}: TFDS has no dataset {dataset!r}, nor has {where}.{near}") from error
    except (ValueError, AssertionError) as error:  # an unknown config or version
        raise ValueError(f"the source {spec!r}: {error}") from error


def _prepare(builder: Any, spec: str) -> None:
    """Generates or downloads the dataset."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    print(f"preparing {spec} in {builder.data_path.parent}", flush=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS says the same as the line above, in more words
            builder.download_and_prepare()
    except Exception as error:  # whatever a dataset's own code may raise
        if builder.data_path.exists():
            return  # another process that prepared the same dataset was faster
        raise ValueError(
            f"the source {spec!r} is not prepared in {builder.data_path.parent}, and preparing it failed with "
            f"{type(error).__name__}: {error}. Most TFDS datasets are downloaded: where there is no network, prepare "
            "it on a machine that has one (tfds.builder(NAME, file_format='array_record').download_and_prepare()) and "
            "name the folder it went to in config.data.tfds_data_dir"
        ) from error
