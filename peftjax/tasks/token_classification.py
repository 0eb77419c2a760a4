"""Token classification: a class for every word, predicted at its first token.

Devlin et al. 2018 (arXiv:1810.04805), section 5.3.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core.errors import UserError
from peftjax.data.documents import Document, Text, over
from peftjax.data.fields import field_of
from peftjax.tasks.base import shapes
from peftjax.tasks.labelled import TextTask, text_inputs
from peftjax.tasks.labels import Labels

IGNORED = -100  # the label of a word that is not counted, as in transformers


class TokenClassification(TextTask):
    """An encoder predicts the class of each word of a text.

    Rows hold tokens, token_types, mask, labels and loss_weights [T]; the weights are 1 at the first token of a word with a class.
    """

    kind: ClassVar[str] = "token_classification"
    card_task: ClassVar[str] = "TOKEN_CLS"
    head: ClassVar[str | None] = "token_classification"
    words: ClassVar[bool] = True
    texts: tuple[Text, ...] = (Text(("tokens", "token_types", "mask", "labels", "loss_weights")),)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._classes = Labels(self, "ForTokenClassification")
        self.labels = self._classes.names

    def document(self, record: Mapping[str, Any], name: str) -> Document:
        words = field_of(record, self.data.words_field, "words_field", name)
        classes = field_of(record, self.data.label_field, "label_field", name)
        self._check(words, classes, name)
        counts = [label != IGNORED for label in classes]
        numbers = [
            self._classes.number(label, name) if there else 0 for label, there in zip(classes, counts, strict=True)
        ]
        encoding, length = self._cut(words)
        owners = encoding.word_ids  # the word of each token; None for special tokens
        first = [owner is not None and owner != before for owner, before in zip(owners, [None, *owners], strict=False)]
        first = [begins and counts[owner or 0] for owner, begins in zip(owners, first, strict=True)]
        labels = [numbers[owner or 0] if begins else 0 for owner, begins in zip(owners, first, strict=True)]
        arrays = text_inputs(encoding) | {
            "labels": np.asarray(labels, np.int32),
            "loss_weights": np.asarray(first, np.float32),
        }
        return Document(arrays, len(encoding.ids), over(length, self.data.max_length))

    def _check(self, words: Any, classes: Any, name: str) -> None:
        for field, value in ((self.data.words_field, words), (self.data.label_field, classes)):
            if not isinstance(value, list | tuple):
                raise UserError(f"{name}: field {field!r} must hold a list with one entry per word, not {value!r}")
        if wrong := [word for word in words if not isinstance(word, str)]:
            raise UserError(f"{name}: field {self.data.words_field!r} must hold words, but holds {wrong[0]!r}")
        if len(words) != len(classes):
            raise UserError(f"{name}: {len(words)} words ({self.data.words_field!r}) with {len(classes)} classes")

    def row_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        return super().row_shapes() | shapes((self.data.max_length,), labels=jnp.int32, loss_weights=jnp.float32)
