"""What text encoders share: embeddings, soft prompts, task heads, sentence vectors, and their Hugging Face names.

Mean pooling of token states into sentence vectors: Reimers and Gurevych 2019 (arXiv:1908.10084), section 3.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax import sharding
from peftjax.core.errors import UserError
from peftjax.models.eager import compiled
from peftjax.models.encoder import Encoder, EncoderConfig, EncoderOptions, linear
from peftjax.models.fields import Fields
from peftjax.models.heads import read_head
from peftjax.nn.dropout import Dropout
from peftjax.nn.embedding import Embedding
from peftjax.nn.stack import make_stack

HEADS = ("none", "sequence_classification", "token_classification")
POOLINGS = ("mean", "cls")
# The suffixes of transformers' class names in all families, and the head of each class.
CLASSES = {
    "Model": "none",
    "ForMaskedLM": "none",
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
}


class TextOptions(EncoderOptions, total=False):
    """The options of a configuration that config.json does not decide; see `EncoderOptions` and `TextEncoderConfig`."""

    pooling: str | None
    normalize: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoderConfig(EncoderConfig):
    """Adds what all text encoders share.

    Attributes:
        vocab: Vocabulary size, V.
        positions: Rows of the position table; 0: there is none.
        token_types: Rows of the token type table; 0: there is none, and token types are ignored.
        head_dropout: Dropout rate of the task head's input.
        pooling: How `TextEncoder.sentence_vectors` pools, one of `POOLINGS`; None: not specified, the mean.
        normalize: Whether `TextEncoder.sentence_vectors` normalizes to length 1.
    """

    vocab: int
    positions: int
    token_types: int
    head_dropout: float
    pooling: str | None = None
    normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pooling not in (None, *POOLINGS):
            raise UserError(f"pooling {self.pooling!r} is not supported; supported: {', '.join(POOLINGS)}")


class TextEncoder(Encoder):
    """A text encoder and its head, from token ids int [B, T].

    Returns logits [B, labels] for sequence classification and [B, T, labels] for token classification, or without a head
    the last hidden states [B, T, D], in the compute dtype.

    Attributes:
        hf_base: The names of the encoder's modules in transformers, without the prefix of classes with a head.
        hf_heads: The names of the task heads' modules.
        hf_pretraining: Regular expressions for the tensors of the pretraining heads.
        head_modules: The modules that belong only to the task head.
        block_type: Class of the layers, called with the configuration and the source of random weights.
    """

    config: TextEncoderConfig
    positions: Embedding
    token_types: Embedding
    output_layers: ClassVar[tuple[str, ...]] = ("classifier",)
    task_head: ClassVar[tuple[str, ...]] = output_layers
    classifier: Any  # a Linear, or a head of several layers
    hf_base: ClassVar[Mapping[str, str]]
    hf_heads: ClassVar[Mapping[str, str]] = {"classifier": "classifier"}
    hf_pretraining: ClassVar[tuple[str, ...]] = ()
    head_modules: ClassVar[tuple[str, ...]] = ("classifier",)
    block_type: ClassVar[type[Any]]

    def __init__(self, config: TextEncoderConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = config.make_table(config.vocab, rngs)
        if config.positions:
            self.positions = config.make_table(config.positions, rngs)
        if config.token_types:
            self.token_types = config.make_table(config.token_types, rngs)
        self.embed_norm = config.norm()
        self.embed_dropout = Dropout(config.dropout)
        self.blocks = make_stack(lambda rngs: self.block_type(config, rngs), config.layers, rngs)
        self.make_head(rngs)

    @property
    def embedding_rows(self) -> int:
        return self.embed.in_features

    # --- What a family provides or overrides ---

    def make_head(self, rngs: nnx.Rngs) -> None:
        """Build the task head. A family adds further layers, and the pooler that transformers has without a task head."""
        if self.config.head != "none":
            self.head_dropout = Dropout(self.config.head_dropout)
            self.classifier = linear(self.config, len(self.config.labels), rngs)

    def states(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """Run the blocks: embedded tokens [B, P + T, D], and which of them are real, bool [B, P + T] -> [B, P + T, D]."""
        raise NotImplementedError

    def pool(self, states: jax.Array, valid: jax.Array) -> jax.Array:
        """Return the input of the head for sequences, [B, D]: the first hidden state.

        With a soft prompt, it is the prompt's first state, as in Hugging Face PEFT.
        """
        del valid
        return states[:, 0]

    def classify(self, x: jax.Array) -> jax.Array:
        """Apply the task head: [..., D] -> [..., labels]."""
        return self.classifier(self.head_dropout(x))

    def position_ids(self, tokens: jax.Array, first: int, soft: int) -> jax.Array:
        """Return the positions of `soft` prompt vectors and of the tokens, int [B or 1, P + T]; the first one is `first`."""
        return first + jnp.arange(soft + tokens.shape[1])[None]

    # --- Shared by all families ---

    @compiled
    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, token_types: jax.Array | None = None
    ) -> jax.Array:
        """Return the head's logits, or without a head the last hidden states. Takes the arguments of `hidden`."""
        states, valid = self._all_states(tokens, mask, token_types)
        if self.config.head == "sequence_classification":
            return self.classify(self.pool(states, valid))
        states = states[:, self.embed.adapters.virtual :]
        return states if self.config.head == "none" else self.classify(states)

    def hidden(
        self, tokens: jax.Array, mask: jax.Array | None = None, token_types: jax.Array | None = None
    ) -> jax.Array:
        """Return the last hidden states [B, T, D], without soft-prompt positions.

        Args:
            tokens: int [B, T].
            mask: bool [B, T], true for real tokens; default: all.
            token_types: int [B, T]; default: 0. Ignored by models without a token type table.
        """
        return self._all_states(tokens, mask, token_types)[0][:, self.embed.adapters.virtual :]

    def sentence_vectors(
        self, tokens: jax.Array, mask: jax.Array | None = None, token_types: jax.Array | None = None
    ) -> jax.Array:
        """Return one vector for each row, float32 [B, D]. Takes the arguments of `hidden`.

        It is the mean of the real tokens' last hidden states, or with pooling "cls" the first hidden state; normalized to
        length 1 if `config.normalize`.
        """
        states = self.hidden(tokens, mask, token_types).astype(jnp.float32)
        if self.config.pooling == "cls":
            vectors = states[:, 0]
        else:
            vectors = masked_mean(states, jnp.ones(tokens.shape, bool) if mask is None else mask)
        if not self.config.normalize:
            return vectors
        return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)

    def embedded(self, tokens: jax.Array, token_types: jax.Array | None = None) -> jax.Array:
        """norm(tokens + positions + token types), after a soft prompt: the first block's input, [B, P + T, D].

        Raises:
            UserError: There are more tokens than the position table has rows.
        """
        soft, config = self.embed.adapters.virtual, self.config
        x = self.embed(tokens)
        if soft:
            x = jnp.concatenate([self.embed.prompt(len(x)), x], axis=1)
        if config.token_types:
            token_types = jnp.zeros_like(tokens) if token_types is None else token_types
            x = x + self.token_types(jnp.pad(token_types, ((0, 0), (soft, 0))))
        if config.positions:
            self.check_length(tokens.shape[1])
            positions = self.positions(self.position_ids(tokens, self.virtual - soft, soft))  # [B or 1, P + T, D]
            x = x + jnp.broadcast_to(positions, x.shape)
        return self.embed_dropout(self.embed_norm(x))

    def _all_states(
        self, tokens: jax.Array, mask: jax.Array | None, token_types: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """The last hidden states [B, P + T, D], soft-prompt positions included, and a mask of real tokens."""
        x = sharding.constrain(self.embedded(tokens, token_types), "batch", "length", None)
        valid = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        valid = jnp.pad(valid, ((0, 0), (self.embed.adapters.virtual, 0)), constant_values=True)
        return self.states(x, valid), valid

    @property
    def virtual(self) -> int:
        return self.embed.adapters.virtual + self.blocks.attention.adapters.virtual

    # --- Hugging Face: names of our modules, and which checkpoint tensors are used ---

    @property
    def hf_modules(self) -> dict[str, str]:
        return self._prefixed(self.hf_base) | dict(self.hf_heads)

    @property
    def hf_ignored(self) -> tuple[str, ...]:
        """Buffers, the pretraining heads, and another task head."""
        other = self.config.stored_head not in ("none", self.config.head)
        heads = [rf"{self.hf_heads[name]}\..*" for name in self.head_modules] if other else []
        return (r"(.*\.)?embeddings\.(position_ids|token_type_ids)", *self.hf_pretraining, *heads)

    @property
    def hf_fresh(self) -> tuple[str, ...]:
        """A head that the checkpoint does not have."""
        return () if self.config.head in ("none", self.config.stored_head) else self.head_modules

    def hf_stored(self, name: str) -> str:
        """Return our name for a checkpoint tensor.

        Checkpoints may lack the prefix of the encoder, and may use TensorFlow's names for LayerNorm parameters.
        """
        bare = name.removeprefix(f"{self.hf_root}.")
        bare = bare.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        parts = {module.split(".")[0] for module in self.hf_base.values()}
        return self.hf_prefix + bare if bare.split(".")[0] in parts else bare

    @property
    def hf_task(self) -> str:
        return dict(zip(HEADS, ("FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS"), strict=True))[self.config.head]


def masked_mean(states: jax.Array, valid: jax.Array) -> jax.Array:
    """Average the states [B, T, D] of real tokens, bool [B, T] -> [B, D]."""
    weights = valid.astype(states.dtype)[..., None]
    return jnp.sum(states * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1e-9)


def read_text_head(fields: Fields, options: TextOptions, name: str, *others: str) -> dict[str, Any]:
    """Decide on the task head, with `read_head`, which returns the options of the configuration.

    Args:
        fields: The fields of config.json.
        options: What config.json does not decide.
        name: What the names of the family's transformers classes begin with.
        *others: Further transformers classes, without a supported head.
    """
    architectures = {name + ending: head for ending, head in CLASSES.items()} | dict.fromkeys(others, "none")
    return read_head(fields, options, architectures, HEADS)
