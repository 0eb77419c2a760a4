"""BERT and RoBERTa: post-norm encoders with learned positions, and their heads for classification and embeddings.

Devlin et al. 2018 (arXiv:1810.04805), section 3; Liu et al. 2019 (arXiv:1907.11692). Mean pooling over the words for
sentence vectors: Reimers and Gurevych 2019 (arXiv:1908.10084), section 3.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax import sharding
from peftjax.models.fields import Fields
from peftjax.models.heads import LABELS, EncoderConfig, read_head
from peftjax.nn.attention import Attention
from peftjax.nn.dropout import Dropout
from peftjax.nn.embedding import Embedding
from peftjax.nn.feedforward import ACTIVATIONS, FeedForward
from peftjax.nn.linear import Linear
from peftjax.nn.norm import LayerNorm
from peftjax.nn.stack import NormedResidual, make_stack, scan_stack

HEADS = ("none", "sequence_classification", "token_classification")
POOLINGS = ("mean", "cls")


@dataclasses.dataclass(frozen=True)
class BertConfig(EncoderConfig):
    """Sizes and options of one model.

    kind: the model_type. head: one of `HEADS`; stored_head: the one that the checkpoint has. positions: rows of the
    table of positions. pooling ("mean" or "cls"; None: nothing was said, mean), normalize: how `sentence_vectors` makes
    one vector of many.
    """

    kind: str
    vocab: int
    embed: int
    mlp: int
    layers: int
    heads: int
    positions: int
    token_types: int
    pad_id: int
    norm_eps: float
    activation: str
    dropout: float
    attention_dropout: float
    head_dropout: float
    head: str
    stored_head: str
    labels: tuple[str, ...]
    problem_type: str | None
    pooling: str | None
    normalize: bool
    init_stddev: float
    dtype: str
    param_dtype: str
    remat: str
    hf: str  # the config.json that this was read from, with the labels that were asked for

    @property
    def architectures(self) -> dict[str, str]:
        return _ARCHITECTURES[self.kind]

    @property
    def max_positions(self) -> int:
        """How many tokens there may be; RoBERTa's first is at position pad_id + 1."""
        return self.positions if self.kind == "bert" else self.positions - self.pad_id - 1

    @property
    def pooler(self) -> bool:
        """Whether there is a pooler: where transformers' class of that name has one."""
        return self.head == "none" or (self.kind, self.head) == ("bert", "sequence_classification")

    def make(self, rngs: nnx.Rngs) -> "Bert":
        """A model with random weights."""
        return Bert(self, rngs)


class Block(nnx.Module):
    """x <- norm(x + attention(x)), then x <- norm(x + feedforward(x)). [B, T, D] -> [B, T, D]."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(config.param_dtype)
        self.attention = Attention(
            config.embed,
            config.heads,
            config.kv_heads,
            config.head_dim,
            qkv_bias=True,
            out_bias=True,
            qk_norm_eps=None,
            dropout=config.attention_dropout,
            stddev=config.init_stddev,
            dtype=dtype,
            rngs=rngs,
        )
        self.attention_dropout = Dropout(config.dropout)
        self.attention_residual = NormedResidual(LayerNorm(config.embed, eps=config.norm_eps, dtype=dtype))
        self.feedforward = FeedForward(
            config.embed,
            config.mlp,
            activation=ACTIVATIONS[config.activation],
            use_bias=True,
            stddev=config.init_stddev,
            dtype=dtype,
            rngs=rngs,
        )
        self.feedforward_dropout = Dropout(config.dropout)
        self.feedforward_residual = NormedResidual(LayerNorm(config.embed, eps=config.norm_eps, dtype=dtype))

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.attention_residual(x, lambda x: self.attention_dropout(self.attention(x, None, mask)[0]))
        x = self.feedforward_residual(x, lambda x: self.feedforward_dropout(self.feedforward(x)))
        return sharding.constrain(x, "batch", "length", None)


class ClassificationHead(nnx.Module):
    """tanh(x W + b) W_out + b_out, with dropout before each: RoBERTa's for sequences. [B, D] -> [B, labels]."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs) -> None:
        self.dropouts = nnx.data([Dropout(config.head_dropout) for _ in range(2)])
        self.dense = _linear(config, config.embed, rngs)
        self.out = _linear(config, len(config.labels), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        before, between = self.dropouts
        return self.out(between(jnp.tanh(self.dense(before(x)))))


class Bert(nnx.Module):
    """An encoder and its head. tokens: int [B, T] -> [B, labels] for sequences, [B, T, labels] for tokens, or without a
    head the last states, [B, T, D]; in the computation dtype."""

    output_layers: ClassVar = ("classifier", "classifier.dense", "classifier.out")  # what "all-linear" leaves out
    task_head: ClassVar = output_layers  # what every method trains whole

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
            self.pooler = _linear(config, config.embed, rngs)
        if (config.kind, config.head) == ("roberta", "sequence_classification"):
            self.classifier: Any = ClassificationHead(config, rngs)
        elif config.head != "none":
            self.head_dropout = Dropout(config.head_dropout)
            self.classifier = _linear(config, len(config.labels), rngs)

    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, token_types: jax.Array | None = None
    ) -> jax.Array:
        """The head's logits, or without a head the last states. Inputs as for `hidden`.

        A sequence is classified by its first state: with a soft prompt that of the prompt, as peft has it.
        """
        if self.config.head != "sequence_classification":
            states = self.hidden(tokens, mask, token_types)
            return states if self.config.head == "none" else self.classifier(self.head_dropout(states))
        first = self._states(tokens, mask, token_types)[:, 0]  # [B, D]
        return self.classifier(self.head_dropout(self.pooled(first)) if self.config.pooler else first)

    def hidden(
        self, tokens: jax.Array, mask: jax.Array | None = None, token_types: jax.Array | None = None
    ) -> jax.Array:
        """The last states, [B, T, D]; those of a soft prompt are left out.

        tokens: int [B, T]; mask: bool [B, T], true for real tokens; token_types: int [B, T], 0 by default.
        """
        return self._states(tokens, mask, token_types)[:, self.embed.adapters.virtual :]

    def pooled(self, first: jax.Array) -> jax.Array:
        """tanh(x W + b) of first states: [B, D] -> [B, D]."""
        return jnp.tanh(self.pooler(first))

    def sentence_vectors(
        self, tokens: jax.Array, mask: jax.Array | None = None, token_types: jax.Array | None = None
    ) -> jax.Array:
        """One vector for each row, float32 [B, D]: the mean of its real tokens' last states, or with pooling "cls" the
        first state; of length 1 if `config.normalize`."""
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
        """What the first block reads, [B, P + T, D]: norm(tokens + positions + token types), a soft prompt before them."""
        soft = self.embed.adapters.virtual
        x = self.embed(tokens)
        if soft:
            prompt = self.embed.prompt()
            x = jnp.concatenate([jnp.broadcast_to(prompt, (len(x), *prompt.shape)), x], axis=1)
        token_types = jnp.zeros_like(tokens) if token_types is None else token_types
        types = jnp.pad(token_types, ((0, 0), (soft, 0)))
        positions = self.positions(self._positions(tokens, soft))  # [B or 1, P + T, D]
        return self.embed_dropout(self.embed_norm(x + self.token_types(types) + jnp.broadcast_to(positions, x.shape)))

    def _positions(self, tokens: jax.Array, soft: int) -> jax.Array:
        """int [B or 1, P + T]. RoBERTa's begin at pad_id + 1, and padding, told by its token, is at pad_id and not
        counted; where there is a soft prompt transformers cannot tell it and counts all."""
        config, prefix, length = self.config, self.virtual - soft, soft + tokens.shape[1]
        if prefix + length > config.max_positions:
            raise ValueError(
                f"{tokens.shape[1]} tokens and {self.virtual} virtual ones exceed the model's {config.max_positions} "
                "positions; cut the text"
            )
        if config.kind == "bert" or soft:
            first = prefix + (0 if config.kind == "bert" else config.pad_id + 1)
            return first + jnp.arange(length)[None]
        real = (tokens != config.pad_id).astype(jnp.int32)
        return (jnp.cumsum(real, axis=1) + prefix) * real + config.pad_id

    def _states(self, tokens: jax.Array, mask: jax.Array | None, token_types: jax.Array | None) -> jax.Array:
        """The last states, those of a soft prompt too, [B, P + T, D]."""
        x = sharding.constrain(self.embedded(tokens, token_types), "batch", "length", None)
        valid = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        valid = jnp.pad(valid, ((0, 0), (self.embed.adapters.virtual, 0)), constant_values=True)
        seen = valid[:, None, None, :]  # [B, 1, 1, P + T]
        x, _ = scan_stack(self.blocks, lambda block, x, _: (block(x, seen), None), x, None, self.config.remat)
        return x

    @property
    def virtual(self) -> int:
        """How many positions a soft prompt and a prefix take before the first token."""
        return self.embed.adapters.virtual + self.blocks.attention.adapters.virtual

    # --- Hugging Face: what it calls our modules, and which tensors of a checkpoint are ours ---

    @property
    def hf_modules(self) -> dict[str, str]:
        """Our modules' names in transformers' class for this head."""
        prefix = "" if self.config.head == "none" else f"{self.config.kind}."
        return {path: prefix + name for path, name in _BASE.items()} | _HEADS[self.config.kind]

    @property
    def hf_tied(self) -> dict[str, str]:
        """Nothing is tied here; the masked language model's head, which is, is not read."""
        return {}

    @property
    def hf_ignored(self) -> tuple[str, ...]:
        """Tensors of a checkpoint that are not read: buffers, the heads of pretraining, and parts that only another
        head needs."""
        config, parts = self.config, [r"cls\..*" if self.config.kind == "bert" else r"lm_head\..*"]
        if not config.pooler:
            parts.append(rf"{config.kind}\.pooler\..*")
        if config.head != config.stored_head:
            parts += [r"classifier\..*"] if config.stored_head != "none" else []
        return (r"(.*\.)?embeddings\.(position_ids|token_type_ids)", *parts)

    @property
    def hf_fresh(self) -> tuple[str, ...]:
        """Parts that a checkpoint may lack as a whole, which then begin at random: the head that was asked for where
        it has another, and without a head the pooler, which pretraining without sentence pairs does not have."""
        if self.config.head == "none":
            return ("pooler",)
        return () if self.config.head == self.config.stored_head else ("pooler", "classifier")

    def hf_stored(self, name: str) -> str:
        """Our key for a tensor of a checkpoint: with or without the prefix "bert.", and with the names that LayerNorm's
        parameters had in TensorFlow."""
        bare = name.removeprefix(f"{self.config.kind}.")
        bare = bare.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        prefix = "" if self.config.head == "none" else f"{self.config.kind}."
        return prefix + bare if bare.split(".")[0] in ("embeddings", "encoder", "pooler") else bare

    @property
    def hf_task(self) -> str:
        """What peft calls the task of this head."""
        return dict(zip(HEADS, ("FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS"), strict=True))[self.config.head]


def _linear(config: BertConfig, features: int, rngs: nnx.Rngs) -> Linear:
    return Linear(
        config.embed,
        features,
        axes=("embed", "label"),
        use_bias=True,
        stddev=config.init_stddev,
        dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


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
    "blocks.attention_residual": "encoder.layer.{}.attention.output",  # where AdapterHub has its adapters
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
        "classifier": "classifier",  # of tokens; a sequence's is two layers
        "classifier.dense": "classifier.dense",
        "classifier.out": "classifier.out_proj",
    },
}
# The class that wrote a checkpoint -> its head here; the first of each head is the one that is written.
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
# What transformers fills in for a field that config.json leaves out, by model_type.
_DEFAULTS: dict[str, dict[str, Any]] = {"bert": {"pad_token_id": 0}, "roberta": {"pad_token_id": 1}}
# Fields that say nothing about the computation, or what was said of it is read elsewhere.
_HARMLESS = LABELS | {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id",
    "eos_token_id", "_name_or_path", "tokenizer_class", "_attn_implementation_autoset", "return_dict",
    "output_attentions", "output_hidden_states", "is_encoder_decoder", "torchscript", "chunk_size_feed_forward",
    "gradient_checkpointing", "tie_word_embeddings", "finetuning_task", "_commit_hash", "peftjax_version",
    # of BERT's first checkpoints; they describe the pooler that every BERT has
    "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head",
    "pooler_type", "output_past",
}  # fmt: skip
# Fields that only one value is supported of.
_FIXED = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False, "pruned_heads": {}}


def from_hf(
    config: dict[str, Any],
    *,
    dtype: str = "float32",
    param_dtype: str = "",
    remat: str = "none",
    head: str | None = None,
    labels: int | Sequence[str] | None = None,
    problem_type: str | None = None,
    new_head: bool = False,
    pooling: str | None = None,
    normalize: bool = False,
) -> BertConfig:
    """Read a config.json of model_type bert or roberta, in the spelling of transformers 4 or 5.

    head: one of `HEADS`; by default the one that `architectures` names. labels: how many or their names, if not as config.json
    says. problem_type: of the head, where config.json does not say. new_head: in place of the checkpoint's own.

    Raises:
        ValueError: a field is missing, unknown, or has a value that this family cannot honour.
    """
    kind = config["model_type"]
    fields = Fields(config, defaults=_DEFAULTS[kind], harmless=_HARMLESS)
    for field, value in _FIXED.items():
        fields.only(field, value)
    chosen = read_head(config, _ARCHITECTURES[kind], HEADS, head, labels, problem_type, new_head)
    dropout = fields.take("hidden_dropout_prob", 0.1)
    result = BertConfig(
        kind=kind,
        vocab=fields.take("vocab_size"),
        embed=fields.take("hidden_size"),
        mlp=fields.take("intermediate_size"),
        layers=fields.take("num_hidden_layers"),
        heads=fields.take("num_attention_heads"),
        positions=fields.take("max_position_embeddings", 512),
        token_types=fields.take("type_vocab_size", 2),
        pad_id=fields.take("pad_token_id"),
        norm_eps=fields.take("layer_norm_eps", 1e-12),
        activation=fields.activation("hidden_act", "gelu"),
        dropout=dropout,
        attention_dropout=fields.take("attention_probs_dropout_prob", 0.1),
        head_dropout=fields.take("classifier_dropout", dropout),
        head=chosen.name,
        stored_head=chosen.stored,
        labels=chosen.labels,
        problem_type=chosen.problem_type,
        pooling=pooling,
        normalize=normalize,
        init_stddev=fields.take("initializer_range", 0.02),
        dtype=dtype,
        param_dtype=param_dtype or dtype,
        remat=remat,
        hf=json.dumps(chosen.config),
    )
    fields.done()
    return _checked(result)


def _checked(config: BertConfig) -> BertConfig:
    if config.embed % config.heads:
        raise ValueError(
            f"config.json: hidden_size={config.embed} is no multiple of num_attention_heads={config.heads}"
        )
    if config.pooling not in (None, *POOLINGS):
        raise ValueError(f"pooling {config.pooling!r} is not supported; supported: {', '.join(POOLINGS)}")
    return config
