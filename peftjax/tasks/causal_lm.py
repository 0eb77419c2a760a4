"""Causal language modeling: each token of a document predicts the next one."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core.errors import UserError
from peftjax.data.documents import Arrays, Document, Text, over
from peftjax.data.records import Example, Prompt, encode_prompt, encode_record
from peftjax.models.base import Model
from peftjax.models.decoder import Decoder
from peftjax.models.moe import MoeLlama
from peftjax.tasks.base import Outputs, shapes
from peftjax.tasks.generation import GenerationTask
from peftjax.totals import Batch, Totals, balanced_next_token_loss, next_token_loss


class CausalLM(GenerationTask):
    """A decoder reads a text, a prompt with its completion, or a conversation.

    Rows hold tokens, targets and loss_weights [T]; packed rows also positions and segments [T]. Others with a load-balancing
    loss have a mask [T] of the tokens that are not padding.
    """

    kind: ClassVar[str] = "causal_lm"
    card_task: ClassVar[str] = "CAUSAL_LM"
    model_class: ClassVar[type[Model]] = Decoder
    options: ClassVar[tuple[str, ...]] = ("router_aux_loss_coef",)
    packs: bool = True

    def __init__(self, *args: Any, router_aux_loss_coef: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.router_aux_loss_coef, self.balanced = router_aux_loss_coef, router_aux_loss_coef > 0
        self.masked = self.balanced and not self.data.pack
        names = ("tokens", "targets", "loss_weights")
        self.texts: tuple[Text, ...] = (Text((*names, "mask") if self.masked else names),)

    def document(self, record: Mapping[str, Any], name: str) -> Document:
        example, limit = encode_record(record, self.data, self.tokenizer, name=name), self.data.max_length
        arrays = next_tokens(example, None if self.data.too_long == "split" else limit)
        if self.masked:
            arrays["mask"] = np.ones(len(arrays["tokens"]), bool)
        return Document(arrays, len(arrays["tokens"]), over(len(example.tokens), limit))

    def row_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        length = (self.data.max_length,)
        packed = shapes(length, positions=jnp.int32, segments=jnp.int32) if self.data.pack else {}
        masked = shapes(length, mask=jnp.bool_) if self.masked else {}
        return shapes(length, tokens=jnp.int32, targets=jnp.int32, loss_weights=jnp.float32) | packed | masked

    def prompt(self, record: Mapping[str, Any], name: str) -> Prompt | None:
        prompt = encode_prompt(record, self.data, self.tokenizer, name=name)
        return prompt if len(prompt.tokens) < self.data.max_length else None

    def require(self, model: Model, path: str) -> None:
        super().require(model, path)
        if self.balanced and not (isinstance(model, MoeLlama) and model.balanced):
            raise UserError(
                f"task.router_aux_loss_coef={self.router_aux_loss_coef}: model.path={path!r} is a {type(model).__name__}, for "
                "which no load-balancing loss is defined; set it to 0"
            )

    def loss(self, model: Model, batch: Batch) -> Totals:
        if self.balanced:
            assert isinstance(model, MoeLlama)
            counted = batch["mask"] if self.masked else batch["segments"] > 0
            return balanced_next_token_loss(model, batch, counted, self.loss_chunk, self.router_aux_loss_coef)
        assert isinstance(model, Decoder)
        return next_token_loss(model, batch, self.loss_chunk)

    def evaluate(self, model: Model, batch: Batch) -> Outputs:
        assert isinstance(model, Decoder)
        return Outputs(next_token_loss(model, batch, self.loss_chunk), None)


def next_tokens(example: Example, limit: int | None) -> Arrays:
    """The first `limit` tokens of an example (None: all), each with the next one as its target; the last one carries no loss."""
    tokens = example.tokens[:limit]
    targets, weights = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.float32)
    targets[:-1] = tokens[1:]
    weights[:-1] = example.loss_mask[1:limit]
    return {"tokens": tokens, "targets": targets, "loss_weights": weights}
