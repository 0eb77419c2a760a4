"""Images without transformers: where they come from, what is refused, and what a batch of them is.

tests/interop/test_images.py compares their pixels with transformers.
"""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from peftjax.core.config import defaults
from peftjax.data.batches import Batching, HeldOut, train_batches
from peftjax.data.images import load_preparation
from peftjax.data.sources import open_source
from peftjax.tasks import Task, make_task
from peftjax.tasks.image_classification import ImageClassification
from peftjax.training import config as configs
from peftjax.training.config import Config

RED, BLUE = (200, 0, 0), (0, 0, 200)


def encoded(color: Any = RED, size: tuple[int, int] = (6, 4), mode: str = "RGB", form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, form)
    return file.getvalue()


def write(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model's directory; `fields` are of preprocessor_config.json."""

    def make(model: dict[str, Any] | None = None, **fields: Any) -> Path:
        (tmp_path / "model").mkdir(exist_ok=True)
        sizes = {"model_type": "vit", "image_size": 4} | (model or {})
        (tmp_path / "model" / "config.json").write_text(json.dumps(sizes))
        (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps({"size": 4} | fields))
        return tmp_path / "model"

    return make


@pytest.fixture
def config(tmp_path: Path) -> Config:
    made = defaults()
    made.task.kind, made.task.labels, made.train.batch_size = "image_classification", ("red", "blue"), 2
    made.data.train = made.data.eval = (f"images:{tmp_path}/colors",)
    return configs.validate(made)


def task_of(config: Config, directory: Path) -> Task:
    task = make_task(config.task, config.data, directory)
    assert isinstance(task, ImageClassification)
    assert task.preparation  # refused here if it cannot be done
    return task


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    """A folder of three images of two classes."""
    write(tmp_path / "colors" / "red" / "2.png", encoded(RED))
    write(tmp_path / "colors" / "red" / "10" / "1.JPG", encoded(RED, (4, 9), form="JPEG"))
    write(tmp_path / "colors" / "blue" / "1.webp", encoded(BLUE, form="WEBP"))
    return tmp_path / "colors"


def test_a_folder_of_classes_is_a_source_sorted_by_path(colors: Path) -> None:
    write(colors / "red" / ".DS_Store")
    write(colors / ".cache" / "1.png")
    source = open_source(f"images:{colors}")
    assert [source.name(i) for i in range(len(source))] == ["blue/1.webp", "red/10/1.JPG", "red/2.png"]
    assert source[2] == {"image": (colors / "red" / "2.png").read_bytes(), "label": "red"}
    write(colors / "red" / "notes.txt")
    write(colors / "1.png")
    with pytest.warns(UserWarning, match=r"ignoring files that are not images of a class: 1\.png, red/notes\.txt"):
        assert len(open_source(f"images:{colors}")) == 3


def test_a_folder_without_classes_or_images_is_an_error_that_says_what_is_needed(colors: Path) -> None:
    with pytest.raises(ValueError, match=r"no such folder\. Did you mean 'colors'\?"):
        open_source(f"images:{colors.with_name('color')}")
    with pytest.raises(ValueError, match=r"colors' is a directory; .* images:.*colors"):
        open_source(str(colors))
    with pytest.raises(
        ValueError, match=r"it has no class folders. .* DIR/CLASS, and have one of the suffixes .*\.webp"
    ):
        open_source(f"images:{colors / 'blue'}")
    (colors / "green").mkdir()
    with pytest.raises(ValueError, match=r"its folder 'green' contains no images"):
        open_source(f"images:{colors}")


def test_batches_hold_pixels_and_classes_and_the_last_one_is_filled_up(
    colors: Path, directory: Callable[..., Path], config: Config
) -> None:
    task = task_of(config, directory())
    assert (type(task), task.labels) == (ImageClassification, ("red", "blue"))
    held_out = HeldOut(config.data, task).batches(Batching(2))
    first, last = held_out
    assert first.arrays["pixels"].shape == (2, 4, 4, 3)
    assert [array.dtype for array in first.arrays.values()] == [np.float32, np.int32, np.float32]
    assert np.concatenate([first.arrays["labels"], last.arrays["labels"]]).tolist() == [1, 0, 0, 0]
    assert last.arrays["loss_weights"].tolist() == [1, 0]
    np.testing.assert_allclose(last.arrays["pixels"][0, 2, 1], [2 * 200 / 255 - 1, -1, -1], rtol=1e-6)  # mean, std: 0.5
    assert held_out.summary_text() == "eval: 3 images read"
    assert next(train_batches(config.data, task, Batching(2), config.seed)).real_tokens == 2


def test_an_image_is_bytes_of_a_file_datasets_bytes_or_an_array(
    directory: Callable[..., Path], config: Config, colors: Path
) -> None:
    task = task_of(config, directory())
    whole = np.broadcast_to(np.uint8(RED), (4, 6, 3))
    pixels = [
        task.document({"image": image, "label": 0}, "a").arrays["pixels"]
        for image in (encoded(), {"bytes": encoded(), "path": "a.png"}, whole, np.ascontiguousarray(whole))
    ]
    assert all(np.array_equal(pixels[0], other) for other in pixels)
    grey = [np.full((4, 6), 200, np.uint8), np.full((4, 6, 1), 200, np.uint8), encoded(200, mode="L")]
    pixels = [task.document({"image": image, "label": 0}, "a").arrays["pixels"] for image in grey]
    assert all(np.array_equal(np.full((4, 4, 3), pixels[0][0, 0, 0]), other) for other in pixels)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", r"its 0 bytes are not an image format that Pillow reads"),
        (b"<html>", r"its 6 bytes are not an image format that Pillow reads"),
        (encoded(size=(60, 60), form="JPEG")[:-20], "truncated"),
        (encoded(7, mode="I;16"), r"it has more than 8 bits per channel, .*; store it with 8 bits"),
        ("cats/1.png", r"it is the str 'cats/1\.png', but must be the bytes .* images:DIR"),
        ({"bytes": None, "path": "cats/1.png"}, r"it is a NoneType"),
        (np.zeros((4, 4, 3), np.float32), r"it is a ndarray, but must be the bytes of an image file or a uint8 array"),
        (np.zeros((3, 8, 8), np.uint8), r"Cannot handle this data type"),
    ],
)
def test_an_image_that_cannot_be_read_is_an_error_with_its_record(
    image: Any, message: str, directory: Callable[..., Path], config: Config
) -> None:
    with pytest.raises(ValueError, match=rf"^cats:7: cannot read the image in field 'image': .*{message}"):
        task_of(config, directory()).document({"image": image, "label": 0}, "cats:7")


def test_a_damaged_file_in_a_folder_is_named(colors: Path, directory: Callable[..., Path], config: Config) -> None:
    write(colors / "red" / "3.png", encoded()[:40])
    task = task_of(config, directory())
    with pytest.raises(ValueError, match=r"^red/3\.png: cannot read the image"):
        list(HeldOut(config.data, task).batches(Batching(2)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, r"only ViTImageProcessor, DeiTImageProcessor"),
        ({"do_resise": True}, r"do_resise=True is not supported.* Did you mean 'do_resize'"),
        ({"do_pad": True}, r"do_pad=True is not supported"),
        ({"do_resize": 1}, r"do_resize=1 must be true or false"),
        ({"resample": 6}, r"resample=6 must be the number of a PIL filter, 0 to 5"),
        ({"image_std": [1, 1, 0]}, r"image_std=\[1, 1, 0\] must not be 0"),
        (
            {"size": {"shortest_edge": 0}, "do_center_crop": True, "crop_size": 4},
            r"size=\{'shortest_edge': 0\} is not supp",
        ),
        ({"size": {"longest_edge": 4}}, r"size=\{'longest_edge': 4\} is not supported; use a number, \{'height'"),
        ({"do_center_crop": True}, r"crop_size=None is not supported"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean=\[0\.5, 0\.5\] must be a number or a list of 3"),
        ({"rescale_factor": "1/255"}, r"rescale_factor='1/255' must be a number"),
        ({"size": 8}, r"images become 8 x 8 pixels, but the model reads 4 x 4 \(image_size"),
        ({"model": {"num_channels": 1}}, r"the model reads 1 channels \(num_channels\)"),
    ],
)
def test_a_preparation_that_cannot_be_honoured_is_refused_by_name(
    fields: dict[str, Any], message: str, directory: Callable[..., Path], config: Config
) -> None:
    with pytest.raises(ValueError, match=message):
        task_of(config, directory(**fields))


def test_fields_that_say_what_is_not_done_or_change_no_pixel_are_let_be(directory: Callable[..., Path]) -> None:
    plain = load_preparation(directory())
    said = load_preparation(
        directory(
            image_processor_type="ViTImageProcessorFast", data_format="channels_first", do_pad=False, crop_size=None
        )
    )
    for made in (plain, said):
        assert (made.resize, made.resample, made.crop, made.rescale) == ((4, 4), 2, None, 1 / 255)


def test_a_directory_without_a_preparation_and_images_that_keep_their_sizes_are_refused(
    directory: Callable[..., Path], config: Config, tmp_path: Path
) -> None:
    task = task_of(config, directory(do_resize=False))
    assert task.document({"image": encoded(size=(4, 4)), "label": 1}, "a").arrays["pixels"].shape == (4, 4, 3)
    with pytest.raises(ValueError, match=r"^a: the image has 4 x 6 pixels after its preparation, .* reads 4 x 4"):
        task.document({"image": encoded(), "label": 1}, "a")
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    with pytest.raises(
        ValueError, match=r"model \(model_type 'vit'\) has no preprocessor_config\.json, .*docs/images\.md"
    ):
        task_of(config, tmp_path / "model")


def test_a_new_head_needs_names_and_those_of_the_folders_are_offered(
    colors: Path, directory: Callable[..., Path], config: Config
) -> None:
    config = configs.changed(config, {"task.labels": ()})
    with pytest.raises(ValueError, match=r"for example task\.labels=\('blue', 'red'\)"):
        task_of(config, directory())
    head = {"architectures": ["ViTForImageClassification"], "id2label": {"0": "blue", "1": "red"}}
    assert task_of(config, directory(head)).labels == ("blue", "red")
    head["id2label"] = {"0": "blue", "1": "crimson"}
    with pytest.raises(ValueError, match=r"^images:.*colors: field 'label' has the class 'red', which is not in"):
        task_of(config, directory(head))


@pytest.fixture(scope="session")  # a builder is registered once in a process; a worker may come back to this module
def painted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data_dir, and a builder is registered of images with classes."""
    import tensorflow_datasets as tfds

    class Painted(tfds.core.GeneratorBasedBuilder):
        """Made up."""

        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # no checksum file beside the code

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "small": tfds.features.Tensor(shape=(2, 3, 3), dtype=np.uint8),
                "label": tfds.features.ClassLabel(names=["red", "blue"]),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[Any]:
            for i in range(4):
                image = encoded((RED, BLUE)[i % 2], (6 + i, 4))
                yield i, {"image": io.BytesIO(image), "small": np.full((2, 3, 3), i, np.uint8), "label": i % 2}

    return str(tmp_path_factory.mktemp("tfds"))


def test_tfds_gives_the_bytes_of_images_and_uint8_arrays_as_they_are(
    painted: str, directory: Callable[..., Path], config: Config
) -> None:
    source = open_source("tfds:painted/train", tfds_data_dir=painted)
    record = next(source[i] for i in range(4) if source[i]["small"][0, 0, 0] == 3)
    assert record["image"] == encoded(BLUE, (9, 4))
    assert (record["label"], record["small"].dtype, record["small"].shape) == (1, np.uint8, (2, 3, 3))
    for field in ("image", "small"):
        task = task_of(configs.changed(config, {"data.image_field": field}), directory())
        assert task.document(record, "a").arrays["pixels"].shape == (4, 4, 3)
