"""Sequence to sequence: an encoder-decoder reads the prompt and writes the completion."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.data.documents import Document, Text, over
from peftjax.data.fields import fill
from peftjax.data.records import Prompt
from peftjax.models.base import Model
from peftjax.models.encoder_decoder import EncoderDecoder
from peftjax.tasks.base import shapes
from peftjax.tasks.generation import GenerationTask
from peftjax.totals import Batch, Totals, seq2seq_loss


class Seq2Seq(GenerationTask):
    """An encoder-decoder reads data.prompt_template and writes data.completion_template.

    Rows hold tokens and mask [S]; decoder_tokens, targets and loss_weights [T].
    """

    kind: ClassVar[str] = "seq2seq"
    card_task: ClassVar[str] = "SEQ_2_SEQ_LM"
    model_class: ClassVar[type[Model]] = EncoderDecoder
    pads: ClassVar[bool] = True
    fills_template: ClassVar[bool] = True
    # Every pair of lengths is a separate program, so targets have half as many lengths.
    texts: tuple[Text, ...] = (
        Text(("tokens", "mask")),
        Text(("decoder_tokens", "targets", "loss_weights"), ratio=4),
    )

    @functools.cached_property
    def _cut(self) -> Callable[..., Any]:
        return self.tokenizer.cut(self.data.max_length)

    @functools.cached_property
    def _start(self) -> int:
        """The token that every target begins with in the decoder."""
        start = self.hf_config.get("decoder_start_token_id")
        return int(self.tokenizer.pad_id if start is None else start)

    def document(self, record: Mapping[str, Any], name: str) -> Document:
        source, length = self._cut(fill(self.data.prompt_template, record, self.data, name))
        answer = self.tokenizer.end(self.tokenizer.encode(fill(self.data.completion_template, record, self.data, name)))
        targets = np.asarray(answer[: self.data.max_target_length], np.int32)
        arrays = {
            "tokens": np.asarray(source.ids, np.int32),
            "mask": np.ones(len(source.ids), bool),
            "decoder_tokens": np.concatenate([[self._start], targets[:-1]]).astype(np.int32),
            "targets": targets,
            "loss_weights": np.ones(len(targets), np.float32),
        }
        too_long = over(length, self.data.max_length)
        too_long = too_long or over(len(answer), self.data.max_target_length, "max_target_length")
        return Document(arrays, len(source.ids), too_long)

    def row_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        source = shapes((self.data.max_length,), tokens=jnp.int32, mask=jnp.bool_)
        target = {"decoder_tokens": jnp.int32, "targets": jnp.int32, "loss_weights": jnp.float32}
        return source | shapes((self.data.max_target_length,), **target)

    def prompt(self, record: Mapping[str, Any], name: str) -> Prompt:
        text = fill(self.data.prompt_template, record, self.data, name)
        expected = fill(self.data.completion_template, record, self.data, name)
        return Prompt(self._cut(text)[0].ids, text, expected, name)

    def lengths(self, model: Model) -> dict[str, int]:
        target = self.data.max_target_length
        return super().lengths(model) | {f"data.max_target_length={target}": target}

    def loss(self, model: Model, batch: Batch) -> Totals:
        assert isinstance(model, EncoderDecoder)
        return seq2seq_loss(model, batch, self.loss_chunk)
