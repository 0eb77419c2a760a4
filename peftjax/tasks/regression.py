"""Regression: a number for a text or a pair of texts."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core.errors import UserError
from peftjax.tasks import metrics
from peftjax.tasks.labelled import TextLabelTask
from peftjax.totals import Batch, Totals, regression_loss


class Regression(TextLabelTask):
    """An encoder with one output predicts a number. Labels are float32 []."""

    kind: ClassVar[str] = "regression"
    card_task: ClassVar[str] = "SEQ_CLS"
    problem_type: str | None = "regression"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.given_labels:
            raise UserError(f"task.labels={self.given_labels!r}: a regression has no classes; leave it empty")

    def label(self, value: Any, name: str) -> np.ndarray:
        try:
            number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else np.nan
        except (ValueError, OverflowError):  # a CSV file may hold a number as text, such as "2.50"
            number = np.nan
        if not np.isfinite(number):
            raise UserError(f"{name}: field {self.data.label_field!r} must hold a finite number, not {value!r}")
        return np.asarray(number, np.float32)

    def label_shape(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), jnp.float32)

    def loss_of(self, logits: jax.Array, batch: Batch) -> Totals:
        return regression_loss(logits, batch)

    def score(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return metrics.score_regression(logits, labels)
