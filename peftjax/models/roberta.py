"""RoBERTa and XLM-RoBERTa: BERT with positions that depend on padding, and another head for sequences.

Liu et al. 2019 (arXiv:1907.11692); Conneau et al. 2019 (arXiv:1911.02116).
"""

import dataclasses
from typing import ClassVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.models.bert import Bert, read_bert
from peftjax.models.encoder import linear
from peftjax.models.fields import Fields
from peftjax.models.text_encoder import TextEncoderConfig, TextOptions
from peftjax.nn.dropout import Dropout


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig(TextEncoderConfig):
    """Adds what distinguishes RoBERTa.

    Attributes:
        pad_id: Token id of padding.
    """

    pad_id: int


class ClassificationHead(nnx.Module):
    """tanh(x W + b) W_out + b_out, with dropout before each layer: [B, D] -> [B, labels]."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs) -> None:
        self.dropouts = nnx.data([Dropout(config.head_dropout) for _ in range(2)])
        self.dense = linear(config, config.embed, rngs)
        self.out = linear(config, len(config.labels), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        before, between = self.dropouts
        return self.out(between(jnp.tanh(self.dense(before(x)))))


class Roberta(Bert):
    """BERT's blocks; the head for sequences has two layers, the one for tokens has one."""

    config: RobertaConfig
    output_layers: ClassVar = ("classifier", "classifier.dense", "classifier.out")
    task_head: ClassVar = output_layers
    pooled_heads: ClassVar = ("none",)

    def make_head(self, rngs: nnx.Rngs) -> None:
        if self.config.head != "sequence_classification":
            super().make_head(rngs)
        else:
            self.classifier = ClassificationHead(self.config, rngs)

    def classify(self, x: jax.Array) -> jax.Array:
        return self.classifier(x) if self.config.head == "sequence_classification" else super().classify(x)

    def position_ids(self, tokens: jax.Array, first: int, soft: int) -> jax.Array:
        """Positions begin at pad_id + 1. Padding, identified by its token id, has position pad_id and is not counted.

        With a soft prompt, transformers has no token ids to identify padding by and counts all positions.
        """
        pad_id = self.config.pad_id
        if soft:
            return super().position_ids(tokens, first + pad_id + 1, soft)
        real = (tokens != pad_id).astype(jnp.int32)
        return (jnp.cumsum(real, axis=1) + first) * real + pad_id

    # --- Hugging Face: names of our modules, and config.json ---

    hf_root = "roberta"
    hf_heads: ClassVar = {
        "classifier": "classifier",
        "classifier.dense": "classifier.dense",
        "classifier.out": "classifier.out_proj",
    }
    hf_pretraining: ClassVar = (r"lm_head\..*",)


# The names in the classes of transformers, by model_type.
_CLASSES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta"}


def from_hf(fields: Fields, **options: Unpack[TextOptions]) -> RobertaConfig:
    """Read a config.json of model_type roberta or xlm-roberta, in the format of transformers 4 or 5."""
    read, pad_id = read_bert(fields, options, _CLASSES[fields.kind]), fields.take("pad_token_id", 1)
    positions = {"max_positions": read["positions"] - pad_id - 1}  # the first is at pad_id + 1
    return RobertaConfig(model=Roberta, pad_id=pad_id, **read | positions)
