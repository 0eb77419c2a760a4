"""Tasks whose examples have labels: the loss and the metrics are computed from the head's logits."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.data.documents import Arrays, Document, Text, over
from peftjax.data.fields import field_of, fill
from peftjax.models.base import Model
from peftjax.models.text_encoder import TextEncoder
from peftjax.tasks import metrics
from peftjax.tasks.base import Outputs, Task, shapes
from peftjax.totals import Batch, Totals, classification_loss


class LabelledTask(Task):
    """A task that predicts labels from the logits of a head; each label is a class, unless a subclass overrides the loss."""

    def logits(self, model: Model, batch: Batch) -> jax.Array:
        """The head's logits [B, C], or [B, T, C] for a label per token."""
        raise NotImplementedError

    def loss_of(self, logits: jax.Array, batch: Batch) -> Totals:
        """The loss of the logits, summed over the labels that count."""
        return classification_loss(logits, batch)

    def score(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The metrics of all predictions [N, C] and their labels [N]."""
        return metrics.score_classification(logits, labels)

    def loss(self, model: Model, batch: Batch) -> Totals:
        return self.loss_of(self.logits(model, batch), batch)

    def evaluate(self, model: Model, batch: Batch) -> Outputs:
        logits = self.logits(model, batch).astype(jnp.float32)
        return Outputs(self.loss_of(logits, batch), (logits, batch["labels"], batch["loss_weights"]))

    def metrics(self, totals: Totals, logits: np.ndarray | None, labels: np.ndarray | None) -> dict[str, float]:
        """eval_loss, the scores of the task, and the number of labels."""
        assert logits is not None
        assert labels is not None
        count = float(totals.tokens)
        return {"eval_loss": float(totals.loss) / count} | self.score(logits, labels) | {"eval_labels": count}


class TextTask(LabelledTask):
    """A task on texts that an encoder reads. Rows hold tokens, token_types and mask [T].

    Attributes:
        words: Whether a text is a list of words.
    """

    model_class: ClassVar[type[Model]] = TextEncoder
    pads: ClassVar[bool] = True
    words: ClassVar[bool] = False

    @functools.cached_property
    def _cut(self) -> Callable[..., Any]:
        return self.tokenizer.cut(self.data.max_length, self.words)

    def row_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        return shapes((self.data.max_length,), tokens=jnp.int32, token_types=jnp.int32, mask=jnp.bool_)

    def logits(self, model: Model, batch: Batch) -> jax.Array:
        return model(batch["tokens"], mask=batch["mask"], token_types=batch["token_types"])


class TextLabelTask(TextTask):
    """A text or a pair of texts with a label.

    Rows hold tokens, token_types and mask [T]; labels and loss_weights [].
    """

    head: ClassVar[str | None] = "sequence_classification"
    texts: tuple[Text, ...] = (Text(("tokens", "token_types", "mask")),)

    def label(self, value: Any, name: str) -> np.ndarray:
        """The label that a record holds, as an array."""
        raise NotImplementedError

    def label_shape(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of `label`."""
        raise NotImplementedError

    def parts(self, record: Mapping[str, Any], name: str) -> tuple[str, str | None]:
        """The text of a record, and the second of a pair of texts."""
        pair = self.data.pair_template
        first = fill(self.data.prompt_template, record, self.data, name)
        return first, fill(pair, record, self.data, name) if pair else None

    def shown(self, record: Mapping[str, Any], name: str) -> str:
        return "\n".join(text for text in self.parts(record, name) if text is not None)

    def document(self, record: Mapping[str, Any], name: str) -> Document:
        encoding, length = self._cut(*self.parts(record, name))
        label = self.label(field_of(record, self.data.label_field, "label_field", name), name)
        arrays = text_inputs(encoding) | {"labels": label, "loss_weights": np.ones((), np.float32)}
        return Document(arrays, len(encoding.ids), over(length, self.data.max_length))

    def row_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        return super().row_shapes() | {"labels": self.label_shape()} | shapes((), loss_weights=jnp.float32)


def text_inputs(encoding: Any) -> Arrays:
    """What an encoder reads of an encoded text: tokens, token_types and mask [n]."""
    return {
        "tokens": np.asarray(encoding.ids, np.int32),
        "token_types": np.asarray(encoding.type_ids, np.int32),
        "mask": np.ones(len(encoding.ids), bool),
    }
