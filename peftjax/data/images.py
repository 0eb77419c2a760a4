"""Images with a class, prepared as the model's preprocessor_config.json says.

Equal to transformers' ViTImageProcessor and DeiTImageProcessor with backend="pil", given the path of an image. The
torchvision backend, which is their default where torchvision is installed, resizes by other code, which rounds otherwise,
and makes one step of the rescaling and the normalisation: it differs by rounding.
"""

import dataclasses
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from peftjax.core.paths import suggest
from peftjax.data.fields import field_of
from peftjax.data.labelled import Labels
from peftjax.data.packing import Row
from peftjax.data.rows import Document, Rows, empty_row
from peftjax.data.sources import class_folders
from peftjax.io.hf_files import read_json_if_any

if TYPE_CHECKING:
    from PIL.Image import Image

FILE = "preprocessor_config.json"
CHANNELS = 3
_ALL = {
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": 0.5,
    "image_std": 0.5,
    "default_to_square": True,
}
# What transformers fills in for a field that is left out or null, by the kind of processor.
DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": _ALL | {"size": 224, "resample": 2},
    "DeiT": _ALL | {"size": 256, "resample": 3, "do_center_crop": True, "crop_size": 224},
}
# Fields that change no pixel here: the processor's name, and do_convert_rgb and the layouts, since an image is always
# made RGB when it is opened, and rows are [H, W, C].
HARMLESS = frozenset({
    "image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb", "data_format",
    "input_data_format", "_valid_processor_keys",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How an image becomes pixels: (image * rescale - mean) / std, of the image resized and cropped. None: not done.

    resize: height and width, or the length of the shortest side; resample: PIL's number of the filter; crop: height and
    width around the middle, black where the image is smaller; normalize: mean and std, each [C].
    """

    resize: tuple[int, int] | int | None
    resample: int
    crop: tuple[int, int] | None
    rescale: float | None
    normalize: tuple[np.ndarray, np.ndarray] | None

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width of all pixels; None where they depend on the image."""
        return self.crop or (self.resize if isinstance(self.resize, tuple) else None)

    def __call__(self, image: "Image") -> np.ndarray:
        """The pixels of an RGB image, float32 [H, W, C]."""
        if self.resize is not None:
            height, width = self.resize if isinstance(self.resize, tuple) else _shortest(image, self.resize)
            image = image.resize((width, height), self.resample)
        if self.crop is not None:
            height, width = self.crop
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(image)
        if self.rescale is not None:
            pixels = (pixels.astype(np.float64) * self.rescale).astype(np.float32)
        pixels = pixels.astype(np.float32)
        if self.normalize is not None:
            mean, std = self.normalize
            pixels = (pixels - mean[None, None]) / std[None, None]
        return pixels


def _shortest(image: "Image", side: int) -> tuple[int, int]:
    """Height and width once the shortest side has that length."""
    longest = int(side * max(image.size) / min(image.size))
    return (longest, side) if image.width <= image.height else (side, longest)


def load_preparation(directory: Path) -> Preparation:
    """What a model's directory says about its images.

    Raises:
      ValueError: there is no preprocessor_config.json, or it has a field or a value that is not honoured here.
    """
    if not (directory / FILE).is_file():
        kind = read_json_if_any(directory / "config.json").get("model_type")
        raise ValueError(
            f"{directory} (model_type {kind!r}) has no {FILE}, which says how images are prepared for a model: take it "
            "from where the checkpoint is from, or for a model of your own write one (docs/images.md)"
        )
    said = read_json_if_any(directory / FILE)
    kind = said.get("image_processor_type") or said.get("feature_extractor_type") or "ViTImageProcessor"
    match = re.fullmatch(r"(\w+?)(ImageProcessor(Fast|Pil)?|FeatureExtractor)", str(kind))
    if not match or match[1] not in DEFAULTS:
        supported = ", ".join(f"{name}ImageProcessor" for name in DEFAULTS)
        raise ValueError(f"{directory / FILE}: image_processor_type={kind!r} is not supported, only {supported}")
    fields = DEFAULTS[match[1]] | {name: value for name, value in said.items() if value is not None}
    known = {*_ALL, "size", "resample", "crop_size"}
    for name, value in fields.items():  # one that is false says what is not done
        if name not in known | HARMLESS and value is not False:
            raise ValueError(
                f"{directory / FILE}: {name}={value!r} is not supported, so the pixels might be others.{suggest(name, known)} "
                "Take the field out if it does not matter"
            )
    return _preparation(fields, str(directory / FILE))


def _preparation(fields: Mapping[str, Any], file: str) -> Preparation:
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "default_to_square"):
        if type(fields[name]) is not bool:
            raise ValueError(f"{file}: {name}={fields[name]!r} is neither true nor false")
    if fields["resample"] not in range(6):
        raise ValueError(f"{file}: resample={fields['resample']!r} is none of PIL's filters, 0 to 5 (2: bilinear)")
    if type(fields["rescale_factor"]) not in (int, float):
        raise ValueError(f"{file}: rescale_factor={fields['rescale_factor']!r} is no number")
    size, crop = fields["size"], fields.get("crop_size")
    resize: tuple[int, int] | int
    match size:
        case {"shortest_edge": int(side), **rest} if not rest:
            resize = side
        case int(side) if not fields["default_to_square"]:
            resize = side
        case _:
            resize = _sides(size, "size", file)
    mean, std = (_channels(fields[name], name, file) for name in ("image_mean", "image_std"))
    return Preparation(
        resize=resize if fields["do_resize"] else None,
        resample=fields["resample"],
        crop=_sides(crop, "crop_size", file) if fields["do_center_crop"] else None,
        rescale=fields["rescale_factor"] if fields["do_rescale"] else None,
        normalize=(mean, std) if fields["do_normalize"] else None,
    )


def _sides(value: Any, name: str, file: str) -> tuple[int, int]:
    """Height and width."""
    match value:
        case int(side):
            return side, side
        case [int(height), int(width)]:
            return height, width
        case {"height": int(height), "width": int(width), **rest} if not rest:
            return height, width
    raise ValueError(
        f"{file}: {name}={value!r} is not supported: say a number, {{'height': 224, 'width': 224}}, or as size "
        "{'shortest_edge': 256} and crop the rest away (do_center_crop, crop_size)"
    )


def _channels(value: Any, name: str, file: str) -> np.ndarray:
    """A number for each channel, [C]."""
    values = value if isinstance(value, list) else [value] * CHANNELS
    if len(values) != CHANNELS or any(type(number) not in (int, float) for number in values):
        raise ValueError(f"{file}: {name}={value!r} is neither a number nor {CHANNELS} of them")
    return np.array(values, np.float32)


def open_image(value: Any) -> "Image":
    """The RGB image that a record holds: the bytes of a file, with or without datasets' {"bytes": ...} around them, or
    uint8 [H, W] or [H, W, C]. As transformers opens a file: turned as its EXIF data says, without its transparency, the
    first of several frames.

    Raises:
      Exception: what Pillow has to say of damaged bytes; a ValueError if the value is something else, or if a channel
        has more than 8 bits, which Pillow would cut off.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(value, Mapping) and "bytes" in value:
        value = value["bytes"]
    if isinstance(value, bytes):
        try:
            image: Image.Image = Image.open(io.BytesIO(value))
        except UnidentifiedImageError:
            raise ValueError(f"its {len(value):,} bytes are of no format that Pillow reads") from None
    elif isinstance(value, np.ndarray) and value.dtype == np.uint8:
        image = Image.fromarray(value[..., 0] if value.ndim == 3 and value.shape[-1] == 1 else value)
    else:
        what = f"the str {value[:80]!r}" if isinstance(value, str) else f"a {type(value).__name__}"
        raise ValueError(
            f"it is {what}, and must be the bytes of an image file or a uint8 array; files in folders are read by "
            "images:DIR"
        )
    if image.mode[0] in "IF":  # integers of 16 or 32 bits, or floats
        raise ValueError("it has more than 8 bits a channel, of which Pillow would cut off some; store it with 8 bits")
    image = ImageOps.exif_transpose(image)
    if "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; from a palette Pillow warns otherwise
    return image.convert("RGB")


class ImageRows(Rows):
    """One class of an image."""

    def __init__(self, config: ConfigDict, directory: Path):
        self._config, self._data = config, config.data
        self._prepare, self._sides = load_preparation(directory), _model_sides(directory)
        if self._prepare.sides not in (None, self._sides):
            raise ValueError(
                f"{directory / FILE}: images become {_by(self._prepare.sides)} pixels, and the model reads "
                f"{_by(self._sides)} (image_size in config.json): set size, or with do_center_crop crop_size, to that"
            )
        self._labels = Labels(config, directory, example=class_folders(config.data.train))
        self.labels = self._labels.names
        for spec in (*config.data.train, *config.data.eval):  # now, and not when the first such image comes
            for label in class_folders([spec]):
                self._labels.number(label, spec)

    def document(self, record: Mapping[str, Any], name: str) -> Document:
        value = field_of(record, self._data.image_field, "image_field", name)
        label = self._labels.number(field_of(record, self._data.label_field, "label_field", name), name)
        try:
            image = open_image(value)
        except Exception as error:  # of damaged bytes Pillow may raise anything
            where = f"{name}: the image in the field {self._data.image_field!r}"
            raise ValueError(f"{where} cannot be read: {error}") from error
        pixels = self._prepare(image)
        if pixels.shape[:2] != self._sides:
            raise ValueError(
                f"{name}: the image has {_by(pixels.shape)} pixels after its preparation, and the model reads "
                f"{_by(self._sides)}; let {FILE} resize or crop it"
            )
        return Document(
            {"pixels": pixels, "labels": np.asarray(label, np.int32), "loss_weights": np.ones((), np.float32)}
        )

    def empty(self) -> Row:
        return empty_row(self._config, classes=len(self.labels), image=(*self._sides, CHANNELS))


def _model_sides(directory: Path) -> tuple[int, int]:
    """Height and width of the images that the model reads."""
    config = read_json_if_any(directory / "config.json")
    if (channels := config.get("num_channels", CHANNELS)) != CHANNELS:
        raise ValueError(f"{directory}: the model reads {channels} channels (num_channels); images are read as RGB")
    size = config.get("image_size", 224)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _by(sides: tuple[int, ...] | None) -> str:
    return "any number of" if sides is None else f"{sides[0]} x {sides[1]}"
