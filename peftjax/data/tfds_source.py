"""TensorFlow datasets as sources of records."""

import contextlib
import importlib
import io
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from peftjax.core.errors import UserError
from peftjax.core.home import expand
from peftjax.core.output import say
from peftjax.core.paths import suggest

# Our own TFDS builders: {dataset: module}. Importing the module registers the builder.
OWN_BUILDERS = {"rewrite_dates": "peftjax.data.rewrite_dates"}


class Tfds:
    """A split of a prepared TensorFlow dataset.

    Text features are str, numbers are Python numbers, images are the bytes of their files, and uint8 arrays with two or
    more axes are NumPy arrays.

    Args:
        data: The split.
        label: Its name in the names of records.
        images: The features that are not converted.
    """

    def __init__(self, data: Sequence[Any], label: str, images: Collection[str] = ()):
        self._data, self._label, self._images = data, label, images

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: value if key in self._images else _plain(value) for key, value in self._data[index].items()}

    def name(self, index: int) -> str:
        return f"{self._label}:{index + 1}"


def open_tfds(spec: str, data_dir: str) -> Tfds:
    """Open the split tfds:NAME[/CONFIG]/SPLIT; a dataset that is not prepared yet is generated or downloaded.

    Args:
        spec: The source string.
        data_dir: Directory of prepared datasets; empty: the default of TFDS.

    Raises:
        UserError: There is no such dataset or split, it has no random access or no records, or preparing it failed.
    """
    name, _, split = spec.removeprefix("tfds:").rpartition("/")
    if not name or not split:
        raise UserError(f"source {spec!r} must have the form tfds:NAME/SPLIT or tfds:NAME/CONFIG/SPLIT")
    builder = _tfds_builder(name, data_dir, spec)
    if not builder.data_path.exists():
        _prepare(builder, spec)
        builder = _tfds_builder(name, data_dir, spec)
    known, images = list(builder.info.splits), _image_features(builder)
    try:
        empty = builder.info.splits[split].num_examples <= 0  # negative for [5:2]
        data = () if empty else builder.as_data_source(split, decoders=images or None)
    except NotImplementedError as error:  # prepared as TFRecord
        raise UserError(
            f"source {spec!r}: {builder.data_path} was prepared as {builder.info.file_format.value}, which has no random "
            "access. Prepare it again with file_format='array_record' in another data.tfds_data_dir"
        ) from error
    except (ValueError, KeyError) as error:
        near = suggest(re.split(r"[\[+]", split)[0], known)
        raise UserError(
            f"source {spec!r}: {name} has no split {split!r}.{near} It has {', '.join(known)}, and slices of them such as train[:90%]"
        ) from error
    if not len(data):
        raise UserError(f"source {spec!r} is empty: the split {split!r} of {name} has no records")
    return Tfds(data, f"{name}/{split}", images)


def _plain(value: Any) -> Any:
    """Convert a TFDS value to plain Python values; bytes that are valid UTF-8 become str."""
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
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist() if value.dtype != object else _plain(value.tolist())
    return value


def _image_features(builder: Any) -> dict[str, Any]:
    """{image feature: a decoder that keeps the file's bytes}.

    TFDS would decode images with OpenCV where that is installed and with Pillow elsewhere, with different results.
    """
    import tensorflow_datasets as tfds

    features = dict(builder.info.features or {})
    return {
        name: tfds.decode.SkipDecoding()
        for name, feature in features.items()
        if isinstance(feature, tfds.features.Image) and feature.np_dtype == np.uint8
    }


def _tfds_builder(name: str, data_dir: str, spec: str) -> Any:
    """The builder of a TFDS dataset; one of ours is registered first."""
    import tensorflow_datasets as tfds

    dataset = re.split(r"[/:]", name)[0]
    if dataset in OWN_BUILDERS:
        importlib.import_module(OWN_BUILDERS[dataset])
    try:
        return tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        folder = expand(data_dir or tfds.core.constants.DATA_DIR)
        known = {*tfds.list_builders(with_community_datasets=False), *(entry.name for entry in folder.glob("*"))}
        near = suggest(dataset, known.union(OWN_BUILDERS))
        where = f"in {data_dir!r}" if data_dir else "in its default directory (data.tfds_data_dir sets another)"
        raise UserError(
            f"source {spec!r}: TFDS has no dataset {dataset!r}, and there is none {where}.{near}"
        ) from error
    except (ValueError, AssertionError) as error:  # an unknown config or version
        raise UserError(f"source {spec!r}: {' '.join(str(error).split())}") from error


def _prepare(builder: Any, spec: str) -> None:
    """Generate or download a dataset."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    say(f"preparing {spec} in {builder.data_path.parent}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS repeats the line above in more words
            builder.download_and_prepare()
    except Exception as error:  # a dataset's own code may raise anything
        if builder.data_path.exists():
            return  # another process has prepared the same dataset
        raise UserError(
            f"source {spec!r} is not prepared in {builder.data_path.parent}, and preparing it failed with "
            f"{type(error).__name__}: {' '.join(str(error).split())}. Most TFDS datasets are downloaded. Without network "
            "access, prepare it on another machine (tfds.builder(NAME, file_format='array_record').download_and_prepare()) "
            "and set data.tfds_data_dir to its directory"
        ) from error
