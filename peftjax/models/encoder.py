"""What the encoder families share: the sublayers of a block, the layers of heads, and common config.json fields."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.core.errors import UserError
from peftjax.models.base import ComputeOptions, Model, ModelConfig
from peftjax.models.fields import Fields
from peftjax.models.heads import HeadOptions
from peftjax.nn.dropout import Dropout
from peftjax.nn.linear import Linear
from peftjax.nn.norm import LayerNorm


class EncoderOptions(ComputeOptions, HeadOptions, total=False):
    """The options of a configuration that config.json does not decide; see `ModelConfig` and `HeadOptions`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(ModelConfig):
    """Adds what all encoders share.

    Attributes:
        kind: The model_type.
        architecture: The transformers class with this head.
        head: Kind of task head, or "none".
        stored_head: Kind of task head in the checkpoint, "none", or `heads.OTHER`.
        labels: Names of the head's outputs.
        problem_type: As in transformers, one of `heads.PROBLEMS`; None: not specified.
        dropout: Dropout rate of the embeddings and of each sublayer's output.
        attention_dropout: Dropout rate of the attention probabilities.
    """

    kind: str
    architecture: str
    head: str
    stored_head: str
    labels: tuple[str, ...]
    problem_type: str | None
    dropout: float
    attention_dropout: float

    def norm(self) -> LayerNorm:
        """Build a norm of the hidden states."""
        return LayerNorm(self.embed, eps=self.norm_eps, dtype=jnp.dtype(self.param_dtype))

    def to_hf(self) -> dict[str, Any]:
        return super().to_hf() | {"architectures": [self.architecture]}


class EncoderBlock(nnx.Module):
    """The sublayers of a block. A family adds its norms and residual connections."""

    def __init__(self, config: EncoderConfig, *, qkv_bias: bool, rngs: nnx.Rngs) -> None:
        self.attention = config.make_attention(rngs, qkv_bias=qkv_bias, out_bias=True, dropout=config.attention_dropout)
        self.attention_dropout = Dropout(config.dropout)
        self.feedforward = config.make_feedforward(rngs, use_bias=True)
        self.feedforward_dropout = Dropout(config.dropout)

    def attend(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Attention, then dropout: [B, T, D] -> [B, T, D]; mask: bool [B or 1, 1, T or 1, T]."""
        return self.attention_dropout(self.attention(x, None, mask)[0])

    def transform(self, x: jax.Array) -> jax.Array:
        """Feed-forward layer, then dropout: [B, T, D] -> [B, T, D]."""
        return self.feedforward_dropout(self.feedforward(x))


class Encoder(Model):
    """A bidirectional encoder with a task head or, without one, a pooler."""

    config: EncoderConfig
    pooler: Linear

    def pooled(self, first: jax.Array) -> jax.Array:
        """tanh(x W + b) of the first hidden states: [B, D] -> [B, pooler width]. For models that have a pooler."""
        return jnp.tanh(self.pooler(first))

    @property
    def hf_root(self) -> str:
        """The name of the encoder in transformers' classes with a head."""
        return self.config.kind

    @property
    def hf_prefix(self) -> str:
        """The prefix of all names but the head's; transformers' classes without a head have none."""
        return "" if self.config.head == "none" else f"{self.hf_root}."

    def _prefixed(self, names: Mapping[str, str]) -> dict[str, str]:
        return {path: self.hf_prefix + name for path, name in names.items()}


def linear(config: EncoderConfig, features: int, rngs: nnx.Rngs, *, use_bias: bool = True) -> Linear:
    """Build a linear layer [D, features] for a pooler or a task head."""
    return Linear(config.embed, features, axes=("embed", "label"), use_bias=use_bias, **config.weights(rngs))


def read_shared(fields: Fields, *, dropout: float, norm_eps: float = 1e-12) -> dict[str, Any]:
    """Read the options of `EncoderConfig`, for families that use BERT's field names.

    Args:
        fields: The fields of config.json.
        dropout: Default of the two dropout rates.
        norm_eps: Default of the norms' epsilon.

    Raises:
        UserError: A field is missing, or its value is not supported.
    """
    return read_sizes(fields) | {
        "norm_eps": fields.take("layer_norm_eps", norm_eps),
        "activation": fields.activation("hidden_act", "gelu"),
        "dropout": fields.take("hidden_dropout_prob", dropout),
        "attention_dropout": fields.take("attention_probs_dropout_prob", dropout),
    }


def read_sizes(fields: Fields, names: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """Read the options of `EncoderConfig` that all families have and `read_head` does not read.

    Args:
        fields: The fields of config.json.
        names: {BERT's name of a field: the family's name}.

    Raises:
        UserError: A field is missing, or its value is not supported.
    """
    width, mlp, layers, number = (
        names.get(name, name)
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    )
    embed, heads = fields.take(width), fields.take(number)
    if embed % heads:
        raise UserError(f"config.json: {width}={embed} is not a multiple of {number}={heads}")
    return {
        "kind": fields.kind,
        "embed": embed,
        "mlp": fields.take(mlp),
        "layers": fields.take(layers),
        "heads": heads,
        "kv_heads": heads,
        "head_dim": embed // heads,
        "init_stddev": fields.take("initializer_range", 0.02),
    }
