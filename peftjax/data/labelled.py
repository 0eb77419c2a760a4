"""Texts with a label: a class, several classes, a number, or a class for each word."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from peftjax.core.paths import suggest
from peftjax.data.fields import field_of, fill
from peftjax.data.rows import Arrays, Document, Rows, over
from peftjax.data.tokenizer import Tokenizer
from peftjax.io.hf_files import read_json_if_any
from peftjax.models.heads import stored_labels

# task.kind -> how the classes of transformers that have such a head are called
HEADS = {
    "classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "image_classification": "ForImageClassification",
}


class Labels:
    """The classes of a task: config.task.labels, or those of the checkpoint's own head.

    example: of names, for the message where there are none.

    Raises:
      ValueError: neither names them, or a name stands there twice.
    """

    def __init__(self, config: ConfigDict, directory: Path, example: tuple[str, ...] = ()):
        self.names = tuple(config.task.labels) or _stored(directory, HEADS[config.task.kind])
        self._field = config.data.label_field
        if not self.names:
            raise ValueError(
                f"config.task.labels names no classes, and the checkpoint in {directory} has no head with classes of its "
                f"own. Name them in the order of their numbers, such as config.task.labels = {example or ('negative', 'positive')}"
            )
        if twice := [label for label in self.names if self.names.count(label) > 1]:
            raise ValueError(f"config.task.labels has {twice[0]!r} twice")

    def number(self, label: Any, name: str) -> int:
        """The number of a class that a record gives by its number or by its name."""
        if isinstance(label, str):
            if label not in self.names:
                raise ValueError(
                    f"{name}: the field {self._field!r} has the class {label!r}, which is none of config.task.labels."
                    f"{suggest(label, self.names)} There are {', '.join(map(repr, self.names[:20]))}"
                )
            return self.names.index(label)
        if not isinstance(label, int) or not 0 <= label < len(self.names):
            why = "; records of GLUE's test splits have none" if label == -1 else ""
            raise ValueError(
                f"{name}: the field {self._field!r} has the class {label!r}; the {len(self.names)} of config.task.labels are "
                f"given by a number from 0 to {len(self.names) - 1} or by name{why}"
            )
        return int(label)


class TextLabelRows(Rows):
    """A text or a pair of texts as an encoder reads it, and a label."""

    def __init__(self, config: ConfigDict, tokenizer: Tokenizer):
        super().__init__(config, tokenizer)
        self._cut = tokenizer.cut(config.data.max_length)

    def document(self, record: Mapping[str, Any], name: str) -> Document:
        pair = self._data.pair_template
        encoding, length = self._cut(
            fill(self._data.prompt_template, record, self._data, name),
            fill(pair, record, self._data, name) if pair else None,
        )
        label = self.label(field_of(record, self._data.label_field, "label_field", name), name)
        arrays = _inputs(encoding) | {"labels": label, "loss_weights": np.ones((), np.float32)}
        return Document(arrays, over(length, self._data.max_length))

    def label(self, value: Any, name: str) -> np.ndarray:
        """The label that stands in a record."""
        raise NotImplementedError


class ClassRows(TextLabelRows):
    """One class, or with config.task.multi_label any number of them."""

    def __init__(self, config: ConfigDict, tokenizer: Tokenizer):
        super().__init__(config, tokenizer)
        self._labels, self._several = Labels(config, tokenizer.directory), config.task.multi_label
        self.labels = self._labels.names

    def label(self, value: Any, name: str) -> np.ndarray:
        if not self._several:
            return np.asarray(self._labels.number(value, name), np.int32)
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(
                f"{name}: the field {self._data.label_field!r} must hold a list of classes (task.multi_label), and holds {value!r}"
            )
        label = np.zeros(len(self.labels), np.float32)
        label[[self._labels.number(one, name) for one in value]] = 1
        return label


class NumberRows(TextLabelRows):
    """A number."""

    def __init__(self, config: ConfigDict, tokenizer: Tokenizer):
        super().__init__(config, tokenizer)
        if config.task.labels:
            raise ValueError("config.task.labels: a regression has no classes; leave it empty")

    def label(self, value: Any, name: str) -> np.ndarray:
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise ValueError(f"{name}: the field {self._data.label_field!r} must hold a number, and holds {value!r}")
        return np.asarray(value, np.float32)


class WordRows(Rows):
    """A class for every word, told at its first token (Devlin et al. 2018, section 5.3)."""

    def __init__(self, config: ConfigDict, tokenizer: Tokenizer):
        super().__init__(config, tokenizer)
        self._cut = tokenizer.cut(config.data.max_length, words=True)
        self._labels = Labels(config, tokenizer.directory)
        self.labels = self._labels.names

    def document(self, record: Mapping[str, Any], name: str) -> Document:
        words = field_of(record, self._data.words_field, "words_field", name)
        classes = field_of(record, self._data.label_field, "label_field", name)
        for field, value in ((self._data.words_field, words), (self._data.label_field, classes)):
            if not isinstance(value, list | tuple):
                raise ValueError(f"{name}: the field {field!r} must hold a list, one entry a word, and holds {value!r}")
        if wrong := [word for word in words if not isinstance(word, str)]:
            raise ValueError(f"{name}: the field {self._data.words_field!r} must hold words, and holds {wrong[0]!r}")
        if len(words) != len(classes):
            raise ValueError(f"{name}: {len(words)} words ({self._data.words_field!r}) with {len(classes)} classes")
        numbers = [self._labels.number(label, name) for label in classes]
        encoding, length = self._cut(words)
        owners = encoding.word_ids  # None for special tokens
        first = [owner is not None and owner != before for owner, before in zip(owners, [None, *owners], strict=False)]
        labels = [numbers[owner or 0] if begins else 0 for owner, begins in zip(owners, first, strict=True)]
        arrays = _inputs(encoding) | {
            "labels": np.asarray(labels, np.int32),
            "loss_weights": np.asarray(first, np.float32),
        }
        return Document(arrays, over(length, self._data.max_length))


def _inputs(encoding: Any) -> Arrays:
    return {
        "tokens": np.asarray(encoding.ids, np.int32),
        "token_types": np.asarray(encoding.type_ids, np.int32),
        "mask": np.ones(len(encoding.ids), bool),
    }


def _stored(directory: Path, ending: str) -> tuple[str, ...]:
    """The classes of a checkpoint's own head; none where it has another one, or none."""
    config = read_json_if_any(directory / "config.json")
    if not any(name.endswith(ending) for name in config.get("architectures") or ()):
        return ()
    return stored_labels(config)
