"""ModernBERT: a pre-norm encoder with rotary embedding, GeGLU and alternating global and local attention.

Warner et al. 2024 (arXiv:2412.13663), section 2.1.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax import sharding
from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.models.decoder_fields import read_ropes, read_windows
from peftjax.models.encoder import linear, read_sizes
from peftjax.models.fields import Fields
from peftjax.models.text_encoder import TextEncoder, TextEncoderConfig, TextOptions, masked_mean, read_text_head
from peftjax.nn.attention import FusedAttention
from peftjax.nn.dropout import Dropout
from peftjax.nn.feedforward import ACTIVATIONS, FusedGatedFeedForward
from peftjax.nn.norm import LayerNorm
from peftjax.nn.residual import Residual
from peftjax.nn.rope import Rope, RopeTables
from peftjax.nn.stack import make_stack, open_stack, scan_stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModernBertConfig(TextEncoderConfig):
    """Adds what distinguishes ModernBERT.

    Attributes:
        local: For each layer, whether its attention is local.
        reach: Number of positions on each side that local attention sees.
        rope: Rotary embedding of the layers with global attention.
        local_rope: Rotary embedding of the layers with local attention.
        mlp_dropout: Dropout rate of the hidden activations of the feed-forward layers.
        norm_bias: Whether the norms have biases.
        attention_bias: Whether the attention layers have biases.
        mlp_bias: Whether the feed-forward layers have biases.
        head_bias: Whether the head's first layer has a bias.
        head_activation: Activation of the head.
        head_pooling: What the head for sequences reads, one of `text_encoder.POOLINGS`.
    """

    local: tuple[bool, ...]
    reach: int
    rope: Rope
    local_rope: Rope
    mlp_dropout: float
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    head_bias: bool
    head_activation: str
    head_pooling: str

    def norm(self) -> LayerNorm:
        return LayerNorm(self.embed, eps=self.norm_eps, use_bias=self.norm_bias, dtype=jnp.dtype(self.param_dtype))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)), without the first norm in the first layer: [B, T, D] -> [B, T, D]."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs) -> None:
        bias = config.attention_bias
        self.attention = config.make_attention(
            rngs, FusedAttention, qkv_bias=bias, out_bias=bias, dropout=config.attention_dropout
        )
        self.attention_dropout, self.attention_residual = Dropout(config.attention_dropout), Residual()
        self.feedforward = config.make_feedforward(
            rngs, FusedGatedFeedForward, use_bias=config.mlp_bias, dropout=config.mlp_dropout
        )
        self.feedforward_norm, self.feedforward_residual = config.norm(), Residual()

    def __call__(self, x: jax.Array, norm: LayerNorm, first: jax.Array, rope: RopeTables, mask: jax.Array) -> jax.Array:
        def attend(x: jax.Array) -> jax.Array:
            x = jnp.where(first, x, norm(x))  # the first layer's input has been normalized already
            return self.attention_dropout(self.attention(x, rope, mask)[0])

        x = self.attention_residual(x, attend)
        x = self.feedforward_residual(x, lambda x: self.feedforward(self.feedforward_norm(x)))
        return sharding.constrain(x, "batch", "length", None)


class PredictionHead(nnx.Module):
    """norm(act(x W)), the first layers of the pretraining head and the task heads: [..., D] -> [..., D]."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs) -> None:
        self.dense = linear(config, config.embed, rngs, use_bias=config.head_bias)
        self.activation, self.norm = ACTIVATIONS[config.head_activation], config.norm()

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.activation(self.dense(x)))


class ModernBert(TextEncoder):
    """Pre-norm blocks and a final norm; token types are ignored.

    Attributes:
        attention_norms: The norms before attention, of all layers except the first, which has none.
    """

    config: ModernBertConfig
    blocks: Block
    block_type: ClassVar = Block

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs)
        self.attention_norms = make_stack(lambda rngs: config.norm(), config.layers - 1, rngs)
        self.norm = config.norm()

    def make_head(self, rngs: nnx.Rngs) -> None:
        if self.config.head != "none":
            self.head = PredictionHead(self.config, rngs)
        super().make_head(rngs)

    def states(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        prefix, length = self.virtual - self.embed.adapters.virtual, x.shape[1]
        positions, keys = prefix + jnp.arange(length), jnp.arange(prefix + length)
        near = (jnp.abs(positions[:, None] - keys[None, :]) <= self.config.reach)[None, None]  # [1, 1, T, S]
        seen = jnp.pad(valid, ((0, 0), (prefix, 0)), constant_values=True)[:, None, None, :]  # [B, 1, 1, S]
        both = [rope.tables(positions[None]) for rope in (self.config.local_rope, self.config.rope)]
        norms, stacked, shared = open_stack(self.attention_norms)
        # The first layer has no such norm; zeros take its place.
        padded = {path: jnp.pad(leaf, [(1, 0)] + [(0, 0)] * (leaf.ndim - 1)) for path, leaf in stacked.items()}

        def layer(block: Block, x: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
            number, local, own = inputs
            rope = jax.tree.map(lambda here, everywhere: jnp.where(local, here, everywhere), *both)
            norm = variables.join(norms, own, shared)
            return block(x, norm, number == 0, rope, seen & (near | ~local)), None

        per_layer = (jnp.arange(self.config.layers), jnp.asarray(self.config.local), padded)
        x, _ = scan_stack(self.blocks, layer, x, per_layer, self.config.remat)
        return self.norm(x)

    def pool(self, states: jax.Array, valid: jax.Array) -> jax.Array:
        return masked_mean(states, valid) if self.config.head_pooling == "mean" else super().pool(states, valid)

    def classify(self, x: jax.Array) -> jax.Array:
        return super().classify(self.head(x))

    # --- Hugging Face: names of our modules, and config.json ---

    hf_root = "model"
    hf_heads: ClassVar = {
        "head": "head",
        "head.dense": "head.dense",
        "head.norm": "head.norm",
        "classifier": "classifier",
    }

    @property
    def partial_stacks(self) -> Mapping[str, tuple[int, ...]]:
        return {"attention_norms": tuple(range(1, self.config.layers))}

    @property
    def hf_ignored(self) -> tuple[str, ...]:
        """The pretraining head; its first layers only if no task head uses them."""
        return (*super().hf_ignored, r"decoder\..*", *([r"head\..*"] if self.config.head == "none" else []))

    @property
    def hf_fresh(self) -> tuple[str, ...]:
        return ("head", *super().hf_fresh) if super().hf_fresh else ()


ModernBert.hf_base = {
    "embed": "embeddings.tok_embeddings",
    "embed_norm": "embeddings.norm",
    "attention_norms": "layers.{}.attn_norm",
    "blocks.attention": "layers.{}.attn",
    "blocks.attention.qkv": "layers.{}.attn.Wqkv",
    "blocks.attention.out": "layers.{}.attn.Wo",
    "blocks.attention_residual": "layers.{}.attention_adapters",
    "blocks.feedforward_norm": "layers.{}.mlp_norm",
    "blocks.feedforward.gate_up": "layers.{}.mlp.Wi",
    "blocks.feedforward.down": "layers.{}.mlp.Wo",
    "blocks.feedforward_residual": "layers.{}.output_adapters",
    "norm": "final_norm",
}
# Fields of the pretraining head, of initialization and of other implementations, and two that no version reads.
_HARMLESS = (
    "decoder_bias", "sparse_prediction", "sparse_pred_ignore_index", "initializer_cutoff_factor", "cls_token_id",
    "sep_token_id", "deterministic_flash_attn", "reference_compile", "repad_logits_with_grad", "layer_norm_eps",
    "position_embedding_type",
)  # fmt: skip


def from_hf(fields: Fields, **options: Unpack[TextOptions]) -> ModernBertConfig:
    """Read a config.json of model_type modernbert, in the format of transformers 4 or 5."""
    chosen = read_text_head(fields, options, "ModernBert")
    fields.skip(*_HARMLESS)
    sizes, max_positions = read_sizes(fields), fields.take("max_position_embeddings", 8192)
    theta, local_theta = fields.take("global_rope_theta", 160000.0), fields.take("local_rope_theta", 10000.0)
    rope, local_rope = read_ropes(
        fields, sizes["head_dim"], max_positions, theta=theta, local_theta=local_theta, scale_local=True
    )
    reach, every = fields.take("local_attention", 128) // 2, fields.take("global_attn_every_n_layers", 3)
    types = ["sliding_attention" if layer % every else "full_attention" for layer in range(sizes["layers"])]
    fields.implied("sliding_window", reach)
    fields.implied("head_dim", sizes["head_dim"])
    pooling = fields.take("classifier_pooling", "cls")
    if pooling not in ("cls", "mean"):
        raise UserError(f"config.json: classifier_pooling={pooling!r} is neither 'cls' nor 'mean'")
    return ModernBertConfig(
        model=ModernBert,
        **sizes,
        vocab=fields.take("vocab_size"),
        positions=0,
        max_positions=max_positions,
        token_types=0,
        local=tuple(window > 0 for window in read_windows(fields, types, window=1)),
        reach=reach,
        rope=rope,
        local_rope=local_rope,
        norm_eps=fields.take("norm_eps", 1e-5),
        activation=fields.activation("hidden_activation", "gelu"),
        dropout=fields.take("embedding_dropout", 0.0),
        attention_dropout=fields.take("attention_dropout", 0.0),
        mlp_dropout=fields.take("mlp_dropout", 0.0),
        head_dropout=fields.take("classifier_dropout", 0.0),
        norm_bias=fields.take("norm_bias", False),
        attention_bias=fields.take("attention_bias", False),
        mlp_bias=fields.take("mlp_bias", False),
        head_bias=fields.take("classifier_bias", False),
        head_activation=fields.activation("classifier_activation", "gelu"),
        head_pooling=pooling,
        **chosen,
    )
