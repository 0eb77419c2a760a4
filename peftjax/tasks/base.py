"""What a task type defines: how records become examples, what the model minimizes, and how it is scored."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from peftjax.core.errors import UserError
from peftjax.data.config import DataConfig
from peftjax.data.documents import Document, Row, Text
from peftjax.data.records import Prompt
from peftjax.data.token_rows import check_token_rows
from peftjax.data.tokenizer import Tokenizer, load_tokenizer
from peftjax.io.json_files import read_json_if_any
from peftjax.models.base import Model
from peftjax.tasks.model import ModelSection, load_base
from peftjax.totals import Batch, Totals

# The arrays of a row that hold token ids. Only these are checked against the rows of the embedding, and arrays of other names are
# padded with 0 instead of the padding token.
TOKENS = ("tokens", "decoder_tokens", "targets")


class Outputs(NamedTuple):
    """What an evaluation step returns.

    Attributes:
        totals: Sums of the loss.
        labelled: Logits, labels and loss weights of the batch, for metrics over the whole held-out data; None where the
            metrics follow from the totals.
    """

    totals: Totals
    labelled: tuple[jax.Array, jax.Array, jax.Array] | None


class Task:
    """A kind of task. It is also the `peftjax.data.documents.RecordEncoder` of its records.

    A subclass is one file in this package and one entry in `TASKS`. It declares the class attributes below and
    implements `document`, `row_shapes`, `loss` and `metrics`; a task whose metrics need all predictions overrides
    `evaluate`, and one that answers prompts in text implements `prompt`.

    Attributes:
        kind: Its name, the value of task.kind.
        model_class: The model classes that support it.
        head: The head of the model, as for `load_model`; None if the model class has no choice of heads.
        problem_type: transformers' name for what the head predicts.
        card_task: PEFT's task_type for it, used in model cards.
        options: The fields of `TaskConfig` that only some tasks have and this one reads, as keyword arguments of
            `__init__`.
        unit: What the training speed counts. Without `texts`, each row counts as one.
        loss_unit: The unit of the mean loss in the report.
        texts: The arrays of a row that are as long as a text; without packing they are as short as a batch allows.
            Empty if data.max_length does not apply.
        pads: Whether the model gets a mask that hides padding from its attention.
        generates: Whether the model answers prompts in text.
        fills_template: Whether data.prompt_template makes the prompt with every data.format.
        packs: Whether several records may share a row.
        balanced: Whether the loss has a load-balancing part, `Totals.balance`.
        labels: The class names; empty where there are no classes.
        embedding_rows: `Model.embedding_rows` of the loaded model; None before a model is loaded.
    """

    registry: ClassVar[Mapping[str, type["Task"]]]  # all tasks by kind, for messages
    kind: ClassVar[str]
    model_class: ClassVar[type[Model]]
    head: ClassVar[str | None] = None
    problem_type: str | None = None
    card_task: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    unit: str = "tokens"
    loss_unit: ClassVar[str] = "mean over labels"
    texts: tuple[Text, ...] = ()
    pads: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    fills_template: ClassVar[bool] = False
    packs: bool = False
    balanced: bool = False
    labels: tuple[str, ...] = ()
    embedding_rows: int | None = None

    def __init__(
        self,
        data: DataConfig,
        directory: Path,
        *,
        labels: tuple[str, ...] = (),
        loss_chunk: int = 128,
        hf_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Reads no tokenizer and no weights.

        Args:
            data: The section `data` of the configuration.
            directory: The model directory, of which config.json is read here and the tokenizer when it is first needed.
            labels: Class names in the order of their indices; empty for those of the checkpoint.
            loss_chunk: Positions whose logits are computed at a time.
            hf_config: The fields of config.json; None: read from the directory.

        Raises:
            UserError: The options do not fit the kind of task or the model.
        """
        if data.pack and not self.packs:
            raise UserError(
                f"data.pack=True packs texts for task.kind='causal_lm' only, not for {self.kind!r}; set it to False"
            )
        if data.too_long == "split" and (self.kind != "causal_lm" or data.format != "text"):
            what = f"data.format={data.format!r}" if self.kind == "causal_lm" else f"task.kind={self.kind!r}"
            raise UserError(
                "data.too_long='split' is for raw text only (task.kind='causal_lm' with data.format='text'), not for "
                f"{what}; set it to 'truncate' or 'drop'"
            )
        self.data, self.directory, self.loss_chunk, self.given_labels = data, directory, loss_chunk, labels
        self.hf_config = read_json_if_any(directory / "config.json") if hf_config is None else hf_config

    # --- Data ---

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model directory, with data.chat_template, loaded when it is first needed."""
        return load_tokenizer(self.directory, chat_template=self.data.chat_template)

    def document(self, record: Mapping[str, Any], name: str) -> Document:
        """The example in a record; messages call the record `name`.

        Raises:
            UserError: A field is missing or holds the wrong kind of value.
        """
        raise NotImplementedError

    def check(self, arrays: Mapping[str, np.ndarray], name: str) -> None:
        """Raises a UserError if a token has no row in the embedding of the loaded model."""
        for tokens in TOKENS:
            if tokens in arrays:
                check_token_rows(arrays[tokens], self.embedding_rows, self.tokenizer, name)

    def row_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the longest row, without the batch dimension."""
        raise NotImplementedError

    def empty_row(self) -> Row:
        """The longest row of padding: the tokenizer's padding token in the token arrays, zeros elsewhere."""
        return {
            name: np.full(each.shape, self.tokenizer.pad_id if name in ("tokens", "decoder_tokens") else 0, each.dtype)
            for name, each in self.row_shapes().items()
        }

    def prompt(self, record: Mapping[str, Any], name: str) -> Prompt | None:
        """The prompt of a record and the expected answer; None if there is no room for an answer in data.max_length."""
        raise UserError(
            f"eval.exact_match and eval.samples: task.kind={self.kind!r} does not generate text; set them to 0"
        )

    def shown(self, record: Mapping[str, Any], name: str) -> str:
        """The text with which the report shows a record; empty if there is none."""
        del record, name
        return ""

    def pictured(self, record: Mapping[str, Any], name: str) -> bytes:
        """The JPEG file with which the report shows a record; empty if there is none."""
        del record, name
        return b""

    # --- The model ---

    def load_model(self, config: ModelSection, directory: Path, mesh: Mesh, seed: int) -> Model:
        """The base model in a directory, with the head of this task and without adapters, sharded over the mesh.

        Raises:
            UserError: What `load_model` refuses, a model that does not support this task type, or one without a row for
                the padding token.
        """
        rows = self.tokenizer.vocab_size if config.resize_embeddings else None
        model = load_base(config, directory, mesh, seed, resize_embeddings=rows, **self.head_options(config.new_head))
        self.accept(model, config.path)
        return model

    def accept(self, model: Model, path: str) -> None:
        """Take a base model, whose leaves may be arrays or shapes, as the one that is trained.

        Raises:
            UserError: The model does not support this task type, or has no row for the padding token.
        """
        self.require(model, path)
        self.embedding_rows = model.embedding_rows
        if self.embedding_rows is not None:
            self.check(self.empty_row(), f"{self.directory}: padding")

    def require(self, model: Model, path: str) -> None:
        """Raises a UserError for a model that does not support this task type."""
        if not isinstance(model, self.model_class):
            raise UserError(
                f"model.path={path!r} is a {type(model).__name__}, which does not support task.kind={self.kind!r}; it supports "
                f"{', '.join(kind for kind, task in self.registry.items() if isinstance(model, task.model_class))}"
            )

    def head_options(self, new_head: bool) -> dict[str, Any]:
        """The options for the model's head, as `load_model` and `models.from_hf_config` take them."""
        if self.head is None:
            return {}
        return {
            "head": self.head,
            "labels": self.labels or (1 if self.problem_type == "regression" else None),
            "problem_type": self.problem_type,
            "new_head": new_head,
        }

    def positions(self, model: Model) -> int:
        """The positions of one row that the model computes, without virtual tokens."""
        return self.data.max_length

    def lengths(self, model: Model) -> dict[str, int]:
        """The numbers of positions that mesh.sequence divides, by a description of each.

        Raises:
            UserError: One exceeds the positions of the model.
        """
        virtual, length, most = model.virtual, self.data.max_length, model.config.max_positions
        what, verb = f"data.max_length={length}", "exceeds"
        if virtual:
            what, verb = f"{what} and {virtual} virtual tokens", "exceed"
        if length + virtual > most:
            fields = "data.max_length or method.tokens" if virtual else "data.max_length"
            raise UserError(f"{what} {verb} the model's {most} positions; lower {fields}")
        return {what: length + virtual}

    def check_lengths(self, model: Model, mesh: Mesh) -> None:
        """Raises a UserError if an example has more positions than the model, or mesh.sequence does not divide them."""
        for what, length in self.lengths(model).items():
            if length % (parts := mesh.shape["sequence"]):
                raise UserError(f"{what}: {length} positions are not a multiple of mesh.sequence={parts}")

    # --- Loss and metrics ---

    def loss(self, model: Model, batch: Batch) -> Totals:
        """The loss summed over the tokens or the examples of a batch [B, ...]."""
        raise NotImplementedError

    def evaluate(self, model: Model, batch: Batch) -> Outputs:
        """The loss of a batch, and what else `metrics` needs."""
        return Outputs(self.loss(model, batch), None)

    def metrics(self, totals: Totals, logits: np.ndarray | None, labels: np.ndarray | None) -> dict[str, float]:
        """The metrics of all held-out data, eval_loss among them, and on how much they were measured (`peftjax.log.AMOUNTS`).

        Args:
            totals: The sums of the loss.
            logits: The concatenated logits from `evaluate`, or None.
            labels: Their labels, or None.
        """
        raise NotImplementedError


def shapes(shape: tuple[int, ...], **dtypes: DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a row that have one shape, from their dtypes by name."""
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}
