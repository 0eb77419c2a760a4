"""Images as pixels, prepared as the model's preprocessor_config.json says.

Equal to transformers' ViTImageProcessor and DeiTImageProcessor with backend="pil" for the path of an image. Their
torchvision backend, the default if torchvision is installed, differs by rounding: it resizes with other code, and merges
rescaling and normalization into one step.
"""

import dataclasses
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peftjax.core.errors import UserError
from peftjax.core.paths import suggest
from peftjax.io.json_files import read_json_if_any

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
# transformers' default for a field that is missing or null, by the kind of processor.
DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": _ALL | {"size": 224, "resample": 2},
    "DeiT": _ALL | {"size": 256, "resample": 3, "do_center_crop": True, "crop_size": 224},
}
# Fields that change no pixel here: the name of the processor, do_convert_rgb (images are always converted to RGB), and
# the layouts (rows are always [H, W, C]).
HARMLESS = frozenset({
    "image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb", "data_format",
    "input_data_format", "_valid_processor_keys",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How an image becomes pixels: (image * rescale - mean) / std of the resized and cropped image.

    Attributes:
        resize: Height and width, or the length of the shortest side; None: no resizing.
        resample: PIL's number of the resampling filter.
        crop: Height and width around the center, padded with black if the image is smaller; None: no cropping.
        rescale: Factor of the pixel values; None: 1.
        normalize: Mean and std, each [C]; None: no normalization.
    """

    resize: tuple[int, int] | int | None
    resample: int
    crop: tuple[int, int] | None
    rescale: float | None
    normalize: tuple[np.ndarray, np.ndarray] | None

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width of the result; None if they depend on the image."""
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
    """Height and width of an image scaled so that its shortest side has the given length."""
    longest = int(side * max(image.size) / min(image.size))
    return (longest, side) if image.width <= image.height else (side, longest)


def load_preparation(directory: Path) -> Preparation:
    """The preparation that a model directory asks for.

    Raises:
        UserError: There is no preprocessor_config.json, or it has a field or a value that is not supported.
    """
    if not (directory / FILE).is_file():
        kind = read_json_if_any(directory / "config.json").get("model_type")
        raise UserError(
            f"{directory} (model_type {kind!r}) has no {FILE}, which says how to prepare images: copy it "
            "from the original checkpoint, or write one for your own model (docs/images.md)"
        )
    said = read_json_if_any(directory / FILE)
    kind = said.get("image_processor_type") or said.get("feature_extractor_type") or "ViTImageProcessor"
    match = re.fullmatch(r"(\w+?)(ImageProcessor(Fast|Pil)?|FeatureExtractor)", str(kind))
    if not match or match[1] not in DEFAULTS:
        supported = ", ".join(f"{name}ImageProcessor" for name in DEFAULTS)
        raise UserError(f"{directory / FILE}: image_processor_type={kind!r} is not supported, only {supported}")
    fields = DEFAULTS[match[1]] | {name: value for name, value in said.items() if value is not None}
    known = {*_ALL, "size", "resample", "crop_size"}
    for name, value in fields.items():  # one that is false says what is not done
        if name not in known | HARMLESS and value is not False:
            raise UserError(
                f"{directory / FILE}: {name}={value!r} is not supported, so the pixels could differ.{suggest(name, known)} "
                "Remove the field if it does not matter"
            )
    return _preparation(fields, str(directory / FILE))


def _preparation(fields: Mapping[str, Any], file: str) -> Preparation:
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "default_to_square"):
        if type(fields[name]) is not bool:
            raise UserError(f"{file}: {name}={fields[name]!r} must be true or false")
    if fields["resample"] not in range(6):
        raise UserError(
            f"{file}: resample={fields['resample']!r} must be the number of a PIL filter, 0 to 5 (2: bilinear)"
        )
    if type(fields["rescale_factor"]) not in (int, float):
        raise UserError(f"{file}: rescale_factor={fields['rescale_factor']!r} must be a number")
    size, crop = fields["size"], fields.get("crop_size")
    resize: tuple[int, int] | int
    match size:
        case {"shortest_edge": int(side), **rest} if not rest and side > 0:
            resize = side
        case int(side) if not fields["default_to_square"] and side > 0:
            resize = side
        case _:
            resize = _sides(size, "size", file)
    mean, std = (_channels(fields[name], name, file) for name in ("image_mean", "image_std"))
    if fields["do_normalize"] and not std.all():
        raise UserError(f"{file}: image_std={fields['image_std']!r} must not be 0")
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
        case int(side) if side > 0:
            return side, side
        case [int(height), int(width)] if min(height, width) > 0:
            return height, width
        case {"height": int(height), "width": int(width), **rest} if not rest and min(height, width) > 0:
            return height, width
    raise UserError(
        f"{file}: {name}={value!r} is not supported; use a number, {{'height': 224, 'width': 224}}, or as size "
        "{'shortest_edge': 256} with a crop (do_center_crop, crop_size)"
    )


def _channels(value: Any, name: str, file: str) -> np.ndarray:
    """One number per channel, [C]."""
    values = value if isinstance(value, list) else [value] * CHANNELS
    if len(values) != CHANNELS or any(type(number) not in (int, float) for number in values):
        raise UserError(f"{file}: {name}={value!r} must be a number or a list of {CHANNELS}")
    return np.array(values, np.float32)


def thumbnail(value: Any, side: int = 160) -> bytes:
    """A small JPEG file of the image that a record holds; the value is as for `open_image`."""
    image = open_image(value)
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()


def open_image(value: Any) -> "Image":
    """The RGB image that a record holds, opened as transformers opens a file.

    It is rotated as its EXIF data says, without transparency, and the first of several frames.

    Args:
        value: The bytes of an image file, bare or as the {"bytes": ...} of datasets, or a uint8 array [H, W] or [H, W,
            C].

    Raises:
        UserError: The value is something else, or has more than 8 bits per channel, which Pillow would truncate.
        Exception: Whatever Pillow raises for damaged bytes.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(value, Mapping) and "bytes" in value:
        value = value["bytes"]
    if isinstance(value, bytes):
        try:
            image: Image.Image = Image.open(io.BytesIO(value))
        except UnidentifiedImageError:
            raise UserError(f"its {len(value):,} bytes are not an image format that Pillow reads") from None
    elif isinstance(value, np.ndarray) and value.dtype == np.uint8:
        image = Image.fromarray(value[..., 0] if value.ndim == 3 and value.shape[-1] == 1 else value)
    else:
        what = f"the str {value[:80]!r}" if isinstance(value, str) else f"a {type(value).__name__}"
        raise UserError(
            f"it is {what}, but must be the bytes of an image file or a uint8 array; use images:DIR to read files in folders"
        )
    if image.mode[0] in "IF":  # integers of 16 or 32 bits, or floats
        raise UserError("it has more than 8 bits per channel, which Pillow would truncate; store it with 8 bits")
    image = ImageOps.exif_transpose(image)
    if "transparency" in image.info:
        image = image.convert("RGBA")  # the same colors; without this Pillow warns about palettes
    return image.convert("RGB")


def model_sides(config: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the images that the model with this config.json reads."""
    if (channels := config.get("num_channels", CHANNELS)) != CHANNELS:
        raise UserError(f"config.json: the model reads {channels} channels (num_channels), but images are RGB")
    size = config.get("image_size", 224)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def dimensions(sides: tuple[int, ...] | None) -> str:
    return "any number of" if sides is None else f"{sides[0]} x {sides[1]}"
