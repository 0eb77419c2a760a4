"""Causal language modeling: each token of a document predicts the next one."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from peftjax.data.documents import Arrays, Document, Text, filled, over
from peftjax.data.records import Example, Prompt, encode_prompt, encode_record
from peftjax.models.base import Model
from peftjax.models.decoder import Decoder
from peftjax.tasks.generation import GenerationTask
from peftjax.totals import Batch, Totals, next_token_loss


class CausalLM(GenerationTask):
    """A decoder reads a text, a prompt with its completion, or a conversation.

    Rows hold tokens, targets and loss_weights [T]; packed rows also positions and segments [T].
    """

    kind: ClassVar[str] = "causal_lm"
    card_task: ClassVar[str] = "CAUSAL_LM"
    model_class: ClassVar[type[Model]] = Decoder
    packs: bool = True
    texts: tuple[Text, ...] = (Text(("tokens", "targets", "loss_weights")),)

    def document(self, record: Mapping[str, Any], name: str) -> Document:
        example, limit = encode_record(record, self.data, self.tokenizer, name=name), self.data.max_length
        arrays = next_tokens(example, limit)
        return Document(arrays, len(arrays["tokens"]), over(len(example.tokens), limit))

    def row_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        names = {"tokens": jnp.int32, "targets": jnp.int32, "loss_weights": jnp.float32}
        names |= {"positions": jnp.int32, "segments": jnp.int32} if self.data.pack else {}
        return {name: jax.ShapeDtypeStruct((self.data.max_length,), dtype) for name, dtype in names.items()}

    def prompt(self, record: Mapping[str, Any], name: str) -> Prompt | None:
        prompt = encode_prompt(record, self.data, self.tokenizer, name=name)
        return prompt if len(prompt.tokens) < self.data.max_length else None

    def loss(self, model: Model, batch: Batch) -> Totals:
        assert isinstance(model, Decoder)
        return next_token_loss(model, batch, self.loss_chunk)


def next_tokens(example: Example, limit: int) -> Arrays:
    """The first `limit` tokens of an example, each with the next one as its target; the last one carries no loss."""
    tokens = example.tokens[:limit]
    arrays = {"tokens": tokens} | filled(len(tokens), targets=0, loss_weights=0.0)
    arrays["targets"][:-1] = tokens[1:]
    arrays["loss_weights"][:-1] = example.loss_mask[1:limit]
    return arrays
