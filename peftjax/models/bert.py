"""BERT: a post-norm encoder with learned positions (Devlin et al. 2018, arXiv:1810.04805, section 3)."""

from typing import Any, ClassVar, Unpack

import jax
from flax import nnx

from peftjax import sharding
from peftjax.models.encoder import EncoderBlock, linear, read_shared
from peftjax.models.fields import Fields
from peftjax.models.text_encoder import TextEncoder, TextEncoderConfig, TextOptions, read_text_head
from peftjax.nn.residual import NormedResidual
from peftjax.nn.stack import scan_stack


class Block(EncoderBlock):
    """x <- norm(x + attention(x)), then x <- norm(x + feedforward(x)): [B, T, D] -> [B, T, D]."""

    def __init__(self, config: TextEncoderConfig, rngs: nnx.Rngs) -> None:
        super().__init__(config, qkv_bias=True, rngs=rngs)
        self.attention_residual = NormedResidual(config.norm())
        self.feedforward_residual = NormedResidual(config.norm())

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.attention_residual(x, lambda x: self.attend(x, mask))
        x = self.feedforward_residual(x, self.transform)
        return sharding.constrain(x, "batch", "length", None)


class Bert(TextEncoder):
    """BERT's blocks; the head for sequences has a pooler.

    Attributes:
        pooled_heads: The heads with a pooler, as in the transformers classes.
    """

    blocks: Block
    block_type: ClassVar = Block
    pooled_heads: ClassVar[tuple[str, ...]] = ("none", "sequence_classification")

    @property
    def has_pooler(self) -> bool:
        """Whether the model has a pooler."""
        return self.config.head in self.pooled_heads

    def make_head(self, rngs: nnx.Rngs) -> None:
        if self.has_pooler:
            self.pooler = linear(self.config, self.config.embed, rngs)
        super().make_head(rngs)

    def states(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        seen = valid[:, None, None, :]  # [B, 1, 1, P + T]
        x, _ = scan_stack(self.blocks, lambda block, x, _: (block(x, seen), None), x, None, self.config.remat)
        return x

    def pool(self, states: jax.Array, valid: jax.Array) -> jax.Array:
        first = super().pool(states, valid)
        return self.pooled(first) if self.has_pooler else first

    # --- Hugging Face: names of our modules, and config.json ---

    hf_pretraining: ClassVar = (r"cls\..*",)

    @property
    def hf_ignored(self) -> tuple[str, ...]:
        return super().hf_ignored if self.has_pooler else (*super().hf_ignored, rf"{self.hf_root}\.pooler\..*")

    @property
    def hf_fresh(self) -> tuple[str, ...]:
        """A head that the checkpoint does not have, and the pooler, which pretraining without sentence pairs lacks."""
        new = self.config.head == "none" or self.config.head != self.config.stored_head
        return ("pooler", *super().hf_fresh) if new else ()


Bert.hf_base = {
    "embed": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "blocks.attention": "encoder.layer.{}.attention.self",
    "blocks.attention.query": "encoder.layer.{}.attention.self.query",
    "blocks.attention.key": "encoder.layer.{}.attention.self.key",
    "blocks.attention.value": "encoder.layer.{}.attention.self.value",
    "blocks.attention.out": "encoder.layer.{}.attention.output.dense",
    "blocks.attention_residual": "encoder.layer.{}.attention.output",  # where AdapterHub puts its adapters
    "blocks.attention_residual.norm": "encoder.layer.{}.attention.output.LayerNorm",
    "blocks.feedforward.up": "encoder.layer.{}.intermediate.dense",
    "blocks.feedforward.down": "encoder.layer.{}.output.dense",
    "blocks.feedforward_residual": "encoder.layer.{}.output",
    "blocks.feedforward_residual.norm": "encoder.layer.{}.output.LayerNorm",
    "pooler": "pooler.dense",
}
# In BERT's first checkpoints; they describe the pooler that every BERT has.
_POOLER = (
    "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head",
    "pooler_type", "output_past",
)  # fmt: skip
# Fields of which only one value is supported.
_FIXED = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False, "pruned_heads": {}}


def from_hf(fields: Fields, **options: Unpack[TextOptions]) -> TextEncoderConfig:
    """Read a config.json of model_type bert, in the format of transformers 4 or 5."""
    return TextEncoderConfig(model=Bert, **read_bert(fields, options, "Bert", "BertForPreTraining"))


def read_bert(fields: Fields, options: TextOptions, name: str, *others: str) -> dict[str, Any]:
    """Read the options of `TextEncoderConfig`.

    Takes the arguments of `read_text_head`.

    Raises:
        UserError: A field is missing, or its value is not supported.
    """
    fields.skip(*_POOLER)
    for field, value in _FIXED.items():
        fields.only(field, value)
    chosen = read_text_head(fields, options, name, *others)
    shared = read_shared(fields, dropout=0.1)
    positions = fields.take("max_position_embeddings", 512)
    return {
        "vocab": fields.take("vocab_size"),
        "positions": positions,
        "max_positions": positions,
        "token_types": fields.take("type_vocab_size", 2),
        "head_dropout": fields.take("classifier_dropout", shared["dropout"]),
        **shared,
        **chosen,
    }
