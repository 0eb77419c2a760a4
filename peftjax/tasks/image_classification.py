"""Image classification: the class of an image."""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core.errors import UserError
from peftjax.data import images
from peftjax.data.documents import Document
from peftjax.data.fields import field_of
from peftjax.data.image_folder import class_folders
from peftjax.models.base import Model
from peftjax.models.vit import Vit
from peftjax.tasks.base import shapes
from peftjax.tasks.labelled import LabelledTask
from peftjax.tasks.labels import Labels
from peftjax.totals import Batch


class ImageClassification(LabelledTask):
    """A vision transformer predicts the class of an image, prepared as the model's directory says.

    Rows hold pixels [H, W, C]; labels and loss_weights [].
    """

    kind: ClassVar[str] = "image_classification"
    card_task: ClassVar[str] = "IMAGE_CLS"
    model_class: ClassVar[type[Model]] = Vit
    head: ClassVar[str | None] = "image_classification"
    problem_type: str | None = "single_label_classification"
    unit: str = "images"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._sides = images.model_sides(self.hf_config)
        self._classes = Labels(self, "ForImageClassification", class_folders(self.data.train))
        self.labels = self._classes.names
        for spec in (*self.data.train, *self.data.eval):  # now, and not when the first such image comes
            for label in class_folders([spec]):
                self._classes.number(label, spec)

    @functools.cached_property
    def preparation(self) -> images.Preparation:
        prepare = images.load_preparation(self.directory)
        if prepare.sides not in (None, self._sides):
            raise UserError(
                f"{self.directory / images.FILE}: images become {images.dimensions(prepare.sides)} pixels, but the model reads "
                f"{images.dimensions(self._sides)} (image_size in config.json); set size, or with do_center_crop crop_size, to that"
            )
        return prepare

    def document(self, record: Mapping[str, Any], name: str) -> Document:
        value = field_of(record, self.data.image_field, "image_field", name)
        label = self._classes.number(field_of(record, self.data.label_field, "label_field", name), name)
        try:
            image = images.open_image(value)
        except Exception as error:  # Pillow may raise anything for damaged bytes
            raise UserError(f"{name}: cannot read the image in field {self.data.image_field!r}: {error}") from error
        pixels = self.preparation(image)
        if pixels.shape[:2] != self._sides:
            raise UserError(
                f"{name}: the image has {images.dimensions(pixels.shape)} pixels after its preparation, but the model reads "
                f"{images.dimensions(self._sides)}; make {images.FILE} resize or crop it"
            )
        labels, weights = np.asarray(label, np.int32), np.ones((), np.float32)
        return Document({"pixels": pixels, "labels": labels, "loss_weights": weights}, 1)

    def pictured(self, record: Mapping[str, Any], name: str) -> bytes:
        return images.thumbnail(field_of(record, self.data.image_field, "image_field", name))

    def row_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        scalars = shapes((), labels=jnp.int32, loss_weights=jnp.float32)
        return shapes((*self._sides, images.CHANNELS), pixels=jnp.float32) | scalars

    def positions(self, model: Model) -> int:
        """The patches and the class token."""
        assert isinstance(model, Vit)
        return 1 + model.config.patches

    def lengths(self, model: Model) -> dict[str, int]:
        return {"an image with its patches and the class token": self.positions(model)}

    def logits(self, model: Model, batch: Batch) -> jax.Array:
        return model(batch["pixels"])
