"""BERT and RoBERTa: post-norm encoders with learned positions, and heads for classification and sentence embeddings.

Devlin et al. 2018 (arXiv:1810.04805), section 3; Liu et al. 2019 (arXiv:1907.11692). Mean pooling of token states into
sentence vectors: Reimers and Gurevych 2019 (arXiv:1908.10084), section 3.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax import sharding
from peftjax.core.errors import UserError
from peftjax.models.base import ComputeOptions
from peftjax.models.eager import compiled
from peftjax.models.encoder import Encoder, EncoderBlock, EncoderConfig, linear, read_shared
from peftjax.models.fields import Fields
from peftjax.models.heads import LABELS, read_head
from peftjax.nn.dropout import Dropout
from peftjax.nn.embedding import Embedding
from peftjax.nn.linear import Linear
from peftjax.nn.norm import LayerNorm
from peftjax.nn.stack import NormedResidual, make_stack, scan_stack

HEADS = ("none", "sequence_classification", "token_classification")
POOLINGS = ("mean", "cls")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(EncoderConfig):
    """Adds what distinguishes BERT and RoBERTa.

    Attributes:
        vocab: Vocabulary size, V.
        positions: Rows of the position table.
        token_types: Rows of the token type table.
        pad_id: Token id of padding.
        head_dropout: Dropout rate of the task head's input.
        pooling: How `Bert.sentence_vectors` pools, one of `POOLINGS`; None: not specified, the mean.
        normalize: Whether `Bert.sentence_vectors` normalizes to length 1.
    """

    vocab: int
    positions: int
    token_types: int
    pad_id: int
    head_dropout: float
    pooling: str | None
    normalize: bool

    @property
    def architectures(self) -> dict[str, str]:
        return _ARCHITECTURES[self.kind]

    @property
    def pooler(self) -> bool:
        """Whether the model has a pooler, as the transformers class for this head does."""
        return self.head == "none" or (self.kind, self.head) == ("bert", "sequence_classification")

    def make(self, rngs: nnx.Rngs) -> "Bert":
        return Bert(self, rngs)


class Block(EncoderBlock):
    """x <- norm(x + attention(x)), then x <- norm(x + feedforward(x)): [B, T, D] -> [B, T, D]."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs) -> None:
        def norm() -> LayerNorm:
            return LayerNorm(config.embed, eps=config.norm_eps, dtype=jnp.dtype(config.param_dtype))

        super().__init__(config, qkv_bias=True, rngs=rngs)
        self.attention_residual = NormedResidual(norm())
        self.feedforward_residual = NormedResidual(norm())

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.attention_residual(x, lambda x: self.attend(x, mask))
        x = self.feedforward_residual(x, self.transform)
        return sharding.constrain(x, "batch", "length", None)


class ClassificationHead(nnx.Module):
    """tanh(x W + b) W_out + b_out, with dropout before each layer: RoBERTa's sequence head. [B, D] -> [B, labels]."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs) -> None:
        self.dropouts = nnx.data([Dropout(config.head_dropout) for _ in range(2)])
        self.dense = linear(config, config.embed, rngs)
        self.out = linear(config, len(config.labels), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        before, between = self.dropouts
        return self.out(between(jnp.tanh(self.dense(before(x)))))


class Bert(Encoder):
    """An encoder and its head, from token ids int [B, T].

    Returns logits [B, labels] for sequence classification and [B, T, labels] for token classification, or without a head
    the last hidden states [B, T, D], in the compute dtype.
    """

    config: BertConfig
    blocks: Block
    output_layers: ClassVar = ("classifier", "classifier.dense", "classifier.out")
    task_head: ClassVar = output_layers

    def __init__(self, config: BertConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)

        def table(rows: int) -> Embedding:
            return Embedding(
                rows, config.embed, stddev=config.init_stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.embed = table(config.vocab)
        self.positions = table(config.positions)
        self.token_types = table(config.token_types)
        self.embed_norm = LayerNorm(config.embed, eps=config.norm_eps, dtype=param_dtype)
        self.embed_dropout = Dropout(config.dropout)
        self.blocks = make_stack(lambda rngs: Block(config, rngs), config.layers, rngs)
        if config.pooler:
            self.pooler = linear(config, config.embed, rngs)
        if (config.kind, config.head) == ("roberta", "sequence_classification"):
            self.classifier: Linear | ClassificationHead = ClassificationHead(config, rngs)
        elif config.head != "none":
            self.head_dropout = Dropout(config.head_dropout)
            self.classifier = linear(config, len(config.labels), rngs)

    @compiled
    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, token_types: jax.Array | None = None
    ) -> jax.Array:
        """Return the head's logits, or without a head the last hidden states. The arguments are those of `hidden`.

        A sequence is classified by its first hidden state. With a soft prompt that is the prompt's, as in Hugging Face PEFT.
        """
        if self.config.head != "sequence_classification":
            states = self.hidden(tokens, mask, token_types)
            return states if self.config.head == "none" else self.classifier(self.head_dropout(states))
        first = self._states(tokens, mask, token_types)[:, 0]  # [B, D]
        return self.classifier(self.head_dropout(self.pooled(first)) if self.config.pooler else first)

    def hidden(
        self, tokens: jax.Array, mask: jax.Array | None = None, token_types: jax.Array | None = None
    ) -> jax.Array:
        """Return the last hidden states [B, T, D], without those of a soft prompt.

        Args:
            tokens: int [B, T].
            mask: bool [B, T], true for real tokens; default: all.
            token_types: int [B, T]; default: 0.
        """
        return self._states(tokens, mask, token_types)[:, self.embed.adapters.virtual :]

    def sentence_vectors(
        self, tokens: jax.Array, mask: jax.Array | None = None, token_types: jax.Array | None = None
    ) -> jax.Array:
        """Return one vector for each row, float32 [B, D]. The arguments are those of `hidden`.

        It is the mean of the real tokens' last hidden states, or with pooling "cls" the first hidden state; normalized to
        length 1 if `config.normalize`.
        """
        states = self.hidden(tokens, mask, token_types).astype(jnp.float32)
        if self.config.pooling == "cls":
            vectors = states[:, 0]
        else:
            weights = (jnp.ones(tokens.shape) if mask is None else mask.astype(jnp.float32))[..., None]
            vectors = jnp.sum(states * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1e-9)
        if not self.config.normalize:
            return vectors
        return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)

    def embedded(self, tokens: jax.Array, token_types: jax.Array | None = None) -> jax.Array:
        """norm(tokens + positions + token types), after a soft prompt: the first block's input, [B, P + T, D]."""
        soft = self.embed.adapters.virtual
        x = self.embed(tokens)
        if soft:
            x = jnp.concatenate([self.embed.prompt(len(x)), x], axis=1)
        token_types = jnp.zeros_like(tokens) if token_types is None else token_types
        types = jnp.pad(token_types, ((0, 0), (soft, 0)))
        positions = self.positions(self._positions(tokens, soft))  # [B or 1, P + T, D]
        return self.embed_dropout(self.embed_norm(x + self.token_types(types) + jnp.broadcast_to(positions, x.shape)))

    def _positions(self, tokens: jax.Array, soft: int) -> jax.Array:
        """Positions, int [B or 1, P + T].

        RoBERTa's begin at pad_id + 1. Its padding, identified by the token id, is at pad_id and not counted. With a soft
        prompt, transformers has no token ids to identify padding by and counts all positions.
        """
        config, prefix, length = self.config, self.virtual - soft, soft + tokens.shape[1]
        if prefix + length > config.max_positions:
            raise UserError(
                f"{tokens.shape[1]} tokens and {self.virtual} virtual ones exceed the model's {config.max_positions} "
                "positions; shorten the text"
            )
        if config.kind == "bert" or soft:
            first = prefix + (0 if config.kind == "bert" else config.pad_id + 1)
            return first + jnp.arange(length)[None]
        real = (tokens != config.pad_id).astype(jnp.int32)
        return (jnp.cumsum(real, axis=1) + prefix) * real + config.pad_id

    def _states(self, tokens: jax.Array, mask: jax.Array | None, token_types: jax.Array | None) -> jax.Array:
        """The last hidden states, those of a soft prompt included: [B, P + T, D]."""
        x = sharding.constrain(self.embedded(tokens, token_types), "batch", "length", None)
        valid = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        valid = jnp.pad(valid, ((0, 0), (self.embed.adapters.virtual, 0)), constant_values=True)
        seen = valid[:, None, None, :]  # [B, 1, 1, P + T]
        x, _ = scan_stack(self.blocks, lambda block, x, _: (block(x, seen), None), x, None, self.config.remat)
        return x

    @property
    def virtual(self) -> int:
        return self.embed.adapters.virtual + self.blocks.attention.adapters.virtual

    # --- Hugging Face: names of our modules, and which checkpoint tensors are used ---

    @property
    def hf_modules(self) -> dict[str, str]:
        return self._prefixed(_BASE) | _HEADS[self.config.kind]

    @property
    def hf_ignored(self) -> tuple[str, ...]:
        """Buffers, the heads of pretraining, and parts that only another head needs."""
        config, parts = self.config, [r"cls\..*" if self.config.kind == "bert" else r"lm_head\..*"]
        if not config.pooler:
            parts.append(rf"{config.kind}\.pooler\..*")
        if config.head != config.stored_head:
            parts += [r"classifier\..*"] if config.stored_head != "none" else []
        return (r"(.*\.)?embeddings\.(position_ids|token_type_ids)", *parts)

    @property
    def hf_fresh(self) -> tuple[str, ...]:
        """A head that the checkpoint does not have, and the pooler, which pretraining without sentence pairs lacks."""
        if self.config.head == "none":
            return ("pooler",)
        return () if self.config.head == self.config.stored_head else ("pooler", "classifier")

    def hf_stored(self, name: str) -> str:
        """Return our name for a checkpoint tensor.

        Checkpoints may lack the prefix "bert.", and may use TensorFlow's names for LayerNorm parameters.
        """
        bare = name.removeprefix(f"{self.config.kind}.")
        bare = bare.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        return self.hf_prefix + bare if bare.split(".")[0] in ("embeddings", "encoder", "pooler") else bare

    @property
    def hf_task(self) -> str:
        return dict(zip(HEADS, ("FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS"), strict=True))[self.config.head]


_BASE = {
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
_HEADS = {
    "bert": {"classifier": "classifier"},
    "roberta": {
        "classifier": "classifier",  # for tokens; the one for sequences has two layers
        "classifier.dense": "classifier.dense",
        "classifier.out": "classifier.out_proj",
    },
}
# The transformers class that wrote a checkpoint -> its head; of the classes with one head, the first is written.
_ARCHITECTURES = {
    "bert": {
        "BertModel": "none",
        "BertForMaskedLM": "none",
        "BertForPreTraining": "none",
        "BertForSequenceClassification": "sequence_classification",
        "BertForTokenClassification": "token_classification",
    },
    "roberta": {
        "RobertaModel": "none",
        "RobertaForMaskedLM": "none",
        "RobertaForSequenceClassification": "sequence_classification",
        "RobertaForTokenClassification": "token_classification",
    },
}
# Defaults of transformers for fields that config.json omits, by model_type.
_DEFAULTS: dict[str, dict[str, Any]] = {"bert": {"pad_token_id": 0}, "roberta": {"pad_token_id": 1}}
# Fields that do not affect the computation, or are read elsewhere.
_HARMLESS = LABELS | {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id",
    "eos_token_id", "_name_or_path", "tokenizer_class", "_attn_implementation_autoset", "return_dict",
    "output_attentions", "output_hidden_states", "is_encoder_decoder", "torchscript", "chunk_size_feed_forward",
    "gradient_checkpointing", "tie_word_embeddings", "finetuning_task", "_commit_hash", "peftjax_version",
    # in BERT's first checkpoints; they describe the pooler that every BERT has
    "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head",
    "pooler_type", "output_past",
}  # fmt: skip
# Fields of which only one value is supported.
_FIXED = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False, "pruned_heads": {}}


def from_hf(
    config: dict[str, Any],
    *,
    head: str | None = None,
    labels: int | Sequence[str] | None = None,
    problem_type: str | None = None,
    new_head: bool = False,
    pooling: str | None = None,
    normalize: bool = False,
    **options: Unpack[ComputeOptions],
) -> BertConfig:
    """Read a config.json of model_type bert or roberta, in the format of transformers 4 or 5.

    The head options are those of `read_head`, with the head one of `HEADS`.

    Raises:
        UserError: A field is missing or unknown, or its value is not supported.
    """
    kind = config["model_type"]
    fields = Fields(config, defaults=_DEFAULTS[kind], harmless=_HARMLESS)
    for field, value in _FIXED.items():
        fields.only(field, value)
    if pooling not in (None, *POOLINGS):
        raise UserError(f"pooling {pooling!r} is not supported; supported: {', '.join(POOLINGS)}")
    shared = read_shared(
        fields, read_head(config, _ARCHITECTURES[kind], HEADS, head, labels, problem_type, new_head), dropout=0.1
    )
    positions, pad_id = fields.take("max_position_embeddings", 512), fields.take("pad_token_id")
    result = BertConfig(
        vocab=fields.take("vocab_size"),
        positions=positions,
        max_positions=positions if kind == "bert" else positions - pad_id - 1,  # RoBERTa's first is at pad_id + 1
        token_types=fields.take("type_vocab_size", 2),
        pad_id=pad_id,
        head_dropout=fields.take("classifier_dropout", shared["dropout"]),
        pooling=pooling,
        normalize=normalize,
        **shared,
        **options,
    )
    fields.done()
    return result
