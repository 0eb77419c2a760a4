"""The preparation of images beside transformers' image processors with backend="pil"."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DeiTImageProcessorPil, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import peftjax
from peftjax.data.config import DataConfig
from peftjax.data.images import load_preparation, open_image
from peftjax.tasks import TaskConfig, make_task
from tests.interop.peers import THEIRS

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings(*THEIRS)]

SIZES = [(37, 23), (23, 37), (64, 64), (9, 15), (16, 12)]  # wider, taller, smaller than what is asked for, just that


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Slopes with noise, [H, W, 3]: neither all edges nor none."""
    width, height = size
    slope = np.add.outer(np.arange(height) / height, np.arange(width) / width)[..., None] * [100, 60, 20]
    noise = np.random.default_rng(seed).integers(0, 50, (height, width, 3))
    return Image.fromarray((slope + noise).astype(np.uint8))


def written(directory: Path, processor: Any, **fields: Any) -> Path:
    """A model's directory as transformers writes it, with some fields as older ones did."""
    processor.save_pretrained(directory)
    path = directory / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


@pytest.mark.parametrize(
    "options",
    [
        {},
        *({"size": {"height": 12, "width": 16}, "resample": resample} for resample in range(6)),
        {"size": 10, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
        {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": {"height": 16, "width": 18}},
        {"size": 20, "default_to_square": False, "do_center_crop": True, "crop_size": 25},
        {"do_resize": False, "do_center_crop": True, "crop_size": [16, 31]},
        {"size": [12, 16], "do_normalize": False, "rescale_factor": 1 / 127.5},
        {"size": 12, "do_rescale": False, "image_mean": 127.0, "image_std": 60.0, "do_convert_rgb": True},
        {"size": 12, "do_rescale": False, "do_normalize": False},
    ],
)
def test_pixels_are_those_of_the_vit_processor_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    processor = ViTImageProcessorPil(**options)
    prepare = load_preparation(written(tmp_path, processor))
    for seed, size in enumerate(SIZES):
        picture(size, seed).save(tmp_path / "a.png")
        theirs = processor(str(tmp_path / "a.png"))["pixel_values"][0].transpose(1, 2, 0)
        ours = prepare(open_image((tmp_path / "a.png").read_bytes()))
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, theirs)


def test_old_files_and_those_of_deit_mean_what_they_mean_to_transformers(tmp_path: Path) -> None:
    old = {"image_processor_type": None, "feature_extractor_type": "DeiTFeatureExtractor", "size": 40, "crop_size": 30}
    directory = written(tmp_path, DeiTImageProcessorPil(), **old)
    picture((50, 33)).save(tmp_path / "a.png")
    theirs = DeiTImageProcessorPil.from_pretrained(directory)(str(tmp_path / "a.png"))["pixel_values"][0]
    ours = load_preparation(directory)(open_image((tmp_path / "a.png").read_bytes()))
    assert ours.shape == (30, 30, 3)
    np.testing.assert_array_equal(ours, theirs.transpose(1, 2, 0))


def save(path: Path, mode: str) -> None:
    """A file in which an image is not simply RGB."""
    image = picture((20, 14))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    if mode == "turned":
        image.save(path, "JPEG", exif=exif)
    elif mode == "transparent colours":
        image.quantize(8).save(path, "PNG", transparency=bytes(range(0, 240, 30)))
    elif mode == "one transparent colour":
        image.save(path, "PNG", transparency=image.getpixel((3, 4)))
    elif mode == "CMYK":
        image.convert("CMYK").save(path, "JPEG")
    else:
        image = image.convert(mode)
        if mode in ("RGBA", "LA"):
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(path, "WEBP" if mode == "RGBA" else "PNG", **({"lossless": True} if mode == "RGBA" else {}))


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "turned", "transparent colours", "one transparent colour"]
)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")  # as transformers opens it
def test_any_image_becomes_rgb_as_it_does_in_transformers(mode: str, tmp_path: Path) -> None:
    processor = ViTImageProcessorPil(size=12)
    prepare = load_preparation(written(tmp_path, processor))
    save(tmp_path / "a", mode)
    theirs = processor(str(tmp_path / "a"))["pixel_values"][0]
    np.testing.assert_array_equal(prepare(open_image((tmp_path / "a").read_bytes())), theirs.transpose(1, 2, 0))


def test_a_file_gives_the_logits_that_it_gives_in_transformers(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    peer = ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, initializer_range=0.2, **sizes)).eval()
    processor = ViTImageProcessorPil(size=16)
    for one in (peer, processor):
        one.save_pretrained(tmp_path / "model")
    picture((37, 23)).save(tmp_path / "a.jpg")
    with torch.no_grad():
        theirs = peer(**processor(str(tmp_path / "a.jpg"), return_tensors="pt")).logits

    task = make_task(
        TaskConfig(kind="image_classification"), DataConfig(), tmp_path / "model"
    )  # the checkpoint's classes
    record = {"image": (tmp_path / "a.jpg").read_bytes(), "label": 1}
    arrays = task.document(record, "a.jpg").arrays
    ours = peftjax.load_model(tmp_path / "model")(arrays["pixels"][None])
    assert theirs.abs().max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
