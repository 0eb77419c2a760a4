"""Classification: one class of a text or a pair of texts, or any number of them."""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core.errors import UserError
from peftjax.tasks import metrics
from peftjax.tasks.labelled import TextLabelTask
from peftjax.tasks.labels import Labels
from peftjax.totals import Batch, Totals, classification_loss, multi_label_loss


class Classification(TextLabelTask):
    """An encoder predicts the class of a text; with task.multi_label, which of the classes apply, if any.

    Labels are int32 [], or with multi_label float32 [C], 0 or 1.
    """

    kind: ClassVar[str] = "classification"
    card_task: ClassVar[str] = "SEQ_CLS"
    options: ClassVar[tuple[str, ...]] = ("multi_label",)

    def __init__(self, *arguments: Any, multi_label: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.multi_label = multi_label
        self.problem_type = "multi_label_classification" if multi_label else "single_label_classification"
        self._classes = Labels(self, "ForSequenceClassification")
        self.labels = self._classes.names

    def label(self, value: Any, name: str) -> np.ndarray:
        if not self.multi_label:
            return np.asarray(self._classes.number(value, name), np.int32)
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise UserError(
                f"{name}: field {self.data.label_field!r} must hold a list of classes (task.multi_label), not {value!r}"
            )
        flags = len(value) == len(self.labels) and all(one in (0, 1) for one in value)
        # Of two classes, [0, 1] lists both, but [1, 1] and [True, False] do not.
        if flags and (len(value) > 2 or len({*value}) < len(value) or any(isinstance(one, bool) for one in value)):
            raise UserError(
                f"{name}: field {self.data.label_field!r} seems to hold a 0 or 1 for each class, {value!r:.80}; list the numbers "
                f"or the names of the classes that apply, such as {[i for i, one in enumerate(value) if one]}"
            )
        label = np.zeros(len(self.labels), np.float32)
        label[[self._classes.number(one, name) for one in value]] = 1
        return label

    def label_shape(self) -> jax.ShapeDtypeStruct:
        if self.multi_label:
            return jax.ShapeDtypeStruct((len(self.labels),), jnp.float32)
        return jax.ShapeDtypeStruct((), jnp.int32)

    def loss_of(self, logits: jax.Array, batch: Batch) -> Totals:
        return (multi_label_loss if self.multi_label else classification_loss)(logits, batch)

    def score(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return (metrics.score_multi_label if self.multi_label else metrics.score_classification)(logits, labels)
