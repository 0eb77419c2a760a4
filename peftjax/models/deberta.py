"""DeBERTa v2 and v3: post-norm encoders with disentangled attention, and, in the larger v2 models, a convolution.

He et al. 2020 (arXiv:2006.03654), section 3; He et al. 2021 (arXiv:2111.09543).
"""

import dataclasses
from typing import ClassVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax import sharding
from peftjax.core.errors import UserError
from peftjax.models.bert import Bert
from peftjax.models.encoder import linear, read_shared
from peftjax.models.fields import Fields
from peftjax.models.text_encoder import TextEncoder, TextEncoderConfig, TextOptions, read_text_head
from peftjax.nn.convolution import Convolution
from peftjax.nn.disentangled import DisentangledAttention, rows_of_positions
from peftjax.nn.dropout import Dropout
from peftjax.nn.feedforward import ACTIVATIONS
from peftjax.nn.residual import NormedResidual
from peftjax.nn.stack import scan_stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class DebertaConfig(TextEncoderConfig):
    """Adds what distinguishes DeBERTa v2 and v3.

    Attributes:
        relative: Whether there are embeddings of relative positions.
        terms: The attention terms that use them, out of "c2p" and "p2c".
        shared: Whether the layers of keys and queries also project relative positions.
        buckets: Number of buckets of relative positions on each side; 0: one for each distance.
        max_distance: Distance from which all relative positions are the same.
        norm_positions: Whether the embeddings of relative positions are normalized.
        convolution: Kernel size of the convolution parallel to the first layer; 0: there is none.
        groups: Number of feature groups of the convolution.
        convolution_activation: Activation of the convolution.
        pooler_dropout: Dropout rate of the pooler's input.
        pooler_activation: Activation of the pooler.
    """

    relative: bool
    terms: tuple[str, ...]
    shared: bool
    buckets: int
    max_distance: int
    norm_positions: bool
    convolution: int
    groups: int
    convolution_activation: str
    pooler_dropout: float
    pooler_activation: str

    @property
    def span(self) -> int:
        """Half of the number of embeddings of relative positions."""
        return self.buckets or self.max_distance


class Block(nnx.Module):
    """x <- norm(x + attention(x)), then x <- norm(x + feedforward(x)): [B, T, D] -> [B, T, D]."""

    def __init__(self, config: DebertaConfig, rngs: nnx.Rngs) -> None:
        self.attention = DisentangledAttention(
            config.embed,
            config.heads,
            terms=config.terms,
            shared=config.shared,
            relative=config.relative,
            dropout=config.attention_dropout,
            position_dropout=config.dropout,
            **config.weights(rngs),
        )
        self.attention_dropout, self.attention_residual = Dropout(config.dropout), NormedResidual(config.norm())
        self.feedforward = config.make_feedforward(rngs, use_bias=True)
        self.feedforward_dropout, self.feedforward_residual = Dropout(config.dropout), NormedResidual(config.norm())

    def __call__(self, x: jax.Array, positions: jax.Array | None, index: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.attention_residual(x, lambda x: self.attention_dropout(self.attention(x, positions, index, mask)))
        x = self.feedforward_residual(x, lambda x: self.feedforward_dropout(self.feedforward(x)))
        return sharding.constrain(x, "batch", "length", None)


class ConvolutionLayer(nnx.Module):
    """norm(y + act(convolution(x))), zero at padding: x and y [B, T, D] -> [B, T, D]."""

    def __init__(self, config: DebertaConfig, rngs: nnx.Rngs) -> None:
        self.convolution = Convolution(config.embed, config.convolution, config.groups, **config.weights(rngs))
        self.activation, self.norm = ACTIVATIONS[config.convolution_activation], config.norm()
        self.dropout = Dropout(config.dropout)

    def __call__(self, x: jax.Array, y: jax.Array, real: jax.Array) -> jax.Array:
        """`real`, [B, T, 1], is 1 for real tokens and 0 for padding."""
        return self.norm(y + self.activation(self.dropout(self.convolution(x) * real))) * real


class Deberta(TextEncoder):
    """Blocks that share the embeddings of relative positions; the head for sequences has a pooler.

    Attributes:
        relative: Embeddings of the relative positions, Embedding with the table [2 span, D].
    """

    config: DebertaConfig
    blocks: Block
    block_type: ClassVar = Block

    def __init__(self, config: DebertaConfig, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs)
        if config.relative:
            self.relative = config.make_table(2 * config.span, rngs)
        if config.norm_positions:
            self.relative_norm = config.norm()
        if config.convolution:
            self.convolution = ConvolutionLayer(config, rngs)

    def make_head(self, rngs: nnx.Rngs) -> None:
        config = self.config
        if config.head == "sequence_classification":
            self.pooler, self.pooler_dropout = linear(config, config.embed, rngs), Dropout(config.pooler_dropout)
        super().make_head(rngs)

    def states(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        config, length = self.config, x.shape[1]
        real = valid[..., None].astype(x.dtype)
        x = x * real
        mask = valid[:, None, :, None] & valid[:, None, None, :]  # [B, 1, T, T]
        index = rows_of_positions(length, config.span, config.buckets, config.max_distance)
        positions = self.relative(jnp.arange(2 * config.span)[None]) if config.relative else None  # [1, R, D]
        if positions is not None and config.norm_positions:
            positions = self.relative_norm(positions)

        def layer(block: Block, y: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
            y = block(y, positions, index, mask)
            if config.convolution:
                y = jax.lax.cond(first, lambda y: self.convolution(x, y, real), lambda y: y, y)
            return y, None

        return scan_stack(self.blocks, layer, x, jnp.arange(config.layers) == 0, config.remat)[0]

    @property
    def task_head(self) -> tuple[str, ...]:  # type: ignore[override]
        """The classifier and, for a new head, the pooler: checkpoints without a head for sequences have none."""
        new = self.config.head == "sequence_classification" and self.config.stored_head != self.config.head
        return ("pooler", "classifier") if new else ("classifier",)

    def pool(self, states: jax.Array, valid: jax.Array) -> jax.Array:
        first = self.pooler_dropout(super().pool(states, valid))
        return ACTIVATIONS[self.config.pooler_activation](self.pooler(first))

    @property
    def virtual(self) -> int:
        return self.embed.adapters.virtual  # its attention has no slot for prefixes

    # --- Hugging Face: names of our modules, and config.json ---

    hf_root = "deberta"
    hf_heads: ClassVar = {"pooler": "pooler.dense", "classifier": "classifier"}
    hf_pretraining: ClassVar = (r"(cls|lm_predictions|mask_predictions)\..*",)

    @property
    def hf_ignored(self) -> tuple[str, ...]:
        pooler = [] if self.config.head == "sequence_classification" else [r"pooler\..*"]
        positions = [] if self.config.positions else [r"(.*\.)?embeddings\.position_embeddings\..*"]
        return (*super().hf_ignored, *pooler, *positions)

    @property
    def hf_fresh(self) -> tuple[str, ...]:
        """A head that the checkpoint does not have, with its pooler."""
        return ("pooler", *super().hf_fresh) if super().hf_fresh else ()


Deberta.hf_base = {path: name for path, name in Bert.hf_base.items() if path != "pooler"} | {
    "relative": "encoder.rel_embeddings",
    "relative_norm": "encoder.LayerNorm",
    "convolution.convolution": "encoder.conv.conv",
    "convolution.norm": "encoder.conv.LayerNorm",
    "blocks.attention.query": "encoder.layer.{}.attention.self.query_proj",
    "blocks.attention.key": "encoder.layer.{}.attention.self.key_proj",
    "blocks.attention.value": "encoder.layer.{}.attention.self.value_proj",
    "blocks.attention.position_key": "encoder.layer.{}.attention.self.pos_key_proj",
    "blocks.attention.position_query": "encoder.layer.{}.attention.self.pos_query_proj",
}


def from_hf(fields: Fields, **options: Unpack[TextOptions]) -> DebertaConfig:
    """Read a config.json of model_type deberta-v2, which DeBERTa v3 also has."""
    chosen = read_text_head(fields, options, "DebertaV2")
    fields.skip("legacy")  # of the pretraining head
    shared = read_shared(fields, dropout=0.1, norm_eps=1e-7)
    rows = fields.take("max_position_embeddings", 512)
    for name, value in {
        "embedding_size": shared["embed"],
        "pooler_hidden_size": shared["embed"],
        "attention_head_size": shared["head_dim"],
    }.items():
        fields.implied(name, value)
    buckets, furthest = fields.take("position_buckets", -1), fields.take("max_relative_positions", -1)
    dropout = fields.take("cls_dropout", shared["dropout"])
    result = DebertaConfig(
        model=Deberta,
        vocab=fields.take("vocab_size"),
        positions=rows if fields.take("position_biased_input", True) else 0,
        max_positions=rows,
        token_types=fields.take("type_vocab_size", 0),
        relative=fields.take("relative_attention", False),
        terms=_terms(fields),
        shared=fields.take("share_att_key", False),
        buckets=max(buckets, 0),
        max_distance=furthest if furthest > 0 else rows,
        norm_positions="layer_norm" in map(str.strip, fields.take("norm_rel_ebd", "none").lower().split("|")),
        convolution=max(fields.take("conv_kernel_size", 0), 0),
        groups=fields.take("conv_groups", 1),
        convolution_activation=fields.activation("conv_act", "tanh"),
        head_dropout=dropout if chosen["head"] == "sequence_classification" else shared["dropout"],
        pooler_dropout=fields.take("pooler_dropout", 0.0),
        pooler_activation=fields.activation("pooler_hidden_act", "gelu"),
        **shared,
        **chosen,
    )
    if result.convolution and not result.convolution % 2:
        raise UserError(f"config.json: conv_kernel_size={result.convolution} is even; only odd sizes keep the length")
    return result


def _terms(fields: Fields) -> tuple[str, ...]:
    """Read pos_att_type, a list or names separated by "|", without those that transformers ignores."""
    given = fields.maybe("pos_att_type") or []
    names = [name.strip() for name in given.lower().split("|")] if isinstance(given, str) else given
    return tuple(name for name in ("c2p", "p2c") if name in names)
