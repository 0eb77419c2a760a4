"""What a record is for each kind of task: the arrays of one example, which padding or packing makes a row of.

    causal_lm             tokens, targets, loss_weights [n]
    seq2seq               tokens, mask [n]; decoder_tokens, targets, loss_weights [m]
    classification        tokens, token_types, mask [n]; labels, loss_weights []; with task.multi_label labels [C], 0 or 1
    regression            tokens, token_types, mask [n]; labels, loss_weights []
    token_classification  tokens, token_types, mask, labels, loss_weights [n]
    image_classification  pixels [H, W, C]; labels, loss_weights []

n is at most data.max_length, m data.max_target_length, C the number of classes. mask is bool; pixels, loss_weights, and
the labels of regression and of several classes, are float32; all else is int32. loss_weights are 1 where a target counts
and 0 elsewhere, in padding and in the rows that fill up a batch too.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from peftjax.data.fields import fill
from peftjax.data.packing import Row
from peftjax.data.records import Example, Prompt, encode_prompt, encode_record
from peftjax.data.tokenizer import Tokenizer, load_tokenizer
from peftjax.io.hf_files import read_json_if_any

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """A record as arrays. too_long: what of it is longer than the config allows, for a message; empty if nothing is."""

    arrays: Arrays
    too_long: str = ""


class Rows:
    """How a kind of task makes examples of records.

    tokenizer: of its texts; None for images. labels: the names of the classes; none where there are no classes.
    """

    tokenizer: Any = None
    labels: tuple[str, ...] = ()

    def __init__(self, config: ConfigDict, tokenizer: Tokenizer):
        self._config, self._data, self.tokenizer = config, config.data, tokenizer

    def document(self, record: Mapping[str, Any], name: str) -> Document:
        """The example that a record is; `name`, what to call it, is in messages.

        Raises:
          ValueError: a field is missing, or holds what it should not.
        """
        raise NotImplementedError

    def empty(self) -> Row:
        """The row without an example."""
        return empty_row(self._config, self.tokenizer.pad_id, len(self.labels))

    def prompt(self, record: Mapping[str, Any], name: str) -> Prompt | None:
        """What a generation starts from for this record, and the text that should follow; None if there is no room for
        any within config.data.max_length."""
        raise ValueError("eval.exact_match and eval.samples: only causal_lm and seq2seq answer in words; set them to 0")


def load_rows(config: ConfigDict, directory: Path) -> Any:
    """The `Rows` of config.task.kind, with what a model's directory has for its inputs: a tokenizer, or how images are
    prepared.

    Raises:
      ValueError: something that it needs is not in the directory, or config fields that do not go together.
    """
    kind = config.task.kind
    if config.data.pack and kind != "causal_lm":
        raise ValueError(
            f"config.data.pack: texts are packed into rows for task.kind='causal_lm' only, not for {kind!r}"
        )
    if config.task.multi_label and kind != "classification":
        raise ValueError(f"config.task.multi_label goes with task.kind='classification', not with {kind!r}")
    if kind == "image_classification":
        from peftjax.data.images import ImageRows

        return ImageRows(config, directory)
    return make_rows(config, load_tokenizer(directory))


def make_rows(config: ConfigDict, tokenizer: Tokenizer) -> Any:
    """The `Rows` of a kind of task whose inputs are texts."""
    from peftjax.data import labelled

    kinds = {
        "causal_lm": TextRows,
        "seq2seq": AnswerRows,
        "classification": labelled.ClassRows,
        "regression": labelled.NumberRows,
        "token_classification": labelled.WordRows,
    }
    return kinds[config.task.kind](config, tokenizer)


def empty_row(config: ConfigDict, pad_id: int = 0, classes: int = 0, image: tuple[int, ...] = ()) -> Row:
    """The row without an example: what stands where there is padding. image: [H, W, C]."""
    kind, length = config.task.kind, config.data.max_length
    none: Row = {"labels": np.zeros((), np.int32), "loss_weights": np.zeros((), np.float32)}
    if kind == "image_classification":
        return {"pixels": np.zeros(image, np.float32)} | none
    if kind == "causal_lm":
        row = _filled(length, tokens=pad_id, targets=0, loss_weights=0.0)
        return row | (_filled(length, positions=0, segments=0) if config.data.pack else {})
    if kind == "seq2seq":
        answer = _filled(config.data.max_target_length, decoder_tokens=pad_id, targets=0, loss_weights=0.0)
        return _filled(length, tokens=pad_id, mask=False) | answer
    read = _filled(length, tokens=pad_id, token_types=0, mask=False)
    if kind == "token_classification":
        return read | _filled(length, labels=0, loss_weights=0.0)
    if kind == "regression":
        none["labels"] = np.zeros((), np.float32)
    if config.task.multi_label:
        none["labels"] = np.zeros(classes, np.float32)
    return read | none


def _filled(length: int, **values: Any) -> Arrays:
    """Arrays [length], each full of one value: of a bool, an int or a float as bool, int32 or float32."""
    dtypes: dict[type, Any] = {bool: np.bool_, int: np.int32, float: np.float32}
    return {name: np.full(length, value, dtypes[type(value)]) for name, value in values.items()}


class TextRows(Rows):
    """Of a causal language model: each token predicts the next one of its document."""

    def document(self, record: Mapping[str, Any], name: str) -> Document:
        example, limit = encode_record(record, self._data, self.tokenizer, name=name), self._data.max_length
        return Document(next_tokens(example, limit), over(len(example.tokens), limit))

    def prompt(self, record: Mapping[str, Any], name: str) -> Prompt | None:
        prompt = encode_prompt(record, self._data, self.tokenizer, name=name)
        return prompt if len(prompt.tokens) < self._data.max_length else None


def next_tokens(example: Example, limit: int) -> Arrays:
    """The first `limit` tokens of an example, each with the next one as its target, and the last one without a loss."""
    tokens = example.tokens[:limit]
    arrays = {"tokens": tokens} | _filled(len(tokens), targets=0, loss_weights=0.0)
    arrays["targets"][:-1] = tokens[1:]
    arrays["loss_weights"][:-1] = example.loss_mask[1:limit]
    return arrays


class AnswerRows(Rows):
    """Of an encoder-decoder: it reads the prompt and writes the completion, each by its template."""

    def __init__(self, config: ConfigDict, tokenizer: Tokenizer):
        super().__init__(config, tokenizer)
        self._cut = tokenizer.cut(config.data.max_length)
        model = read_json_if_any(tokenizer.directory / "config.json")
        start = model.get("decoder_start_token_id")
        self._start = int(tokenizer.pad_id if start is None else start)

    def document(self, record: Mapping[str, Any], name: str) -> Document:
        source, length = self._cut(fill(self._data.prompt_template, record, self._data, name))
        answer = self.tokenizer.end(
            self.tokenizer.encode(fill(self._data.completion_template, record, self._data, name))
        )
        targets = np.asarray(answer[: self._data.max_target_length], np.int32)
        arrays = {
            "tokens": np.asarray(source.ids, np.int32),
            "mask": np.ones(len(source.ids), bool),
            "decoder_tokens": np.concatenate([[self._start], targets[:-1]]).astype(np.int32),
            "targets": targets,
            "loss_weights": np.ones(len(targets), np.float32),
        }
        long = over(length, self._data.max_length)
        return Document(arrays, long or over(len(answer), self._data.max_target_length, "max_target_length"))

    def prompt(self, record: Mapping[str, Any], name: str) -> Prompt:
        text = fill(self._data.prompt_template, record, self._data, name)
        expected = fill(self._data.completion_template, record, self._data, name)
        return Prompt(self._cut(text)[0].ids, text, expected, name)


def over(length: int, limit: int, field: str = "max_length") -> str:
    """What a record is that has more tokens than that; empty if it has not."""
    return f"{length} tokens, config.data.{field} is {limit}" if length > limit else ""
