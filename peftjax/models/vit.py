"""ViT: a pre-norm encoder over the patches of an image, and its head for classification.

Dosovitskiy et al. 2020 (arXiv:2010.11929), section 3.1.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax import sharding
from peftjax.models.fields import HARMLESS, Fields
from peftjax.models.heads import LABELS, EncoderConfig, read_head
from peftjax.nn.attention import Attention
from peftjax.nn.dropout import Dropout
from peftjax.nn.feedforward import ACTIVATIONS, FeedForward
from peftjax.nn.linear import Linear
from peftjax.nn.norm import LayerNorm
from peftjax.nn.slot import Slot
from peftjax.nn.stack import Residual, make_stack, scan_stack
from peftjax.quant.matmul import matmul

HEADS = ("none", "image_classification")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig(EncoderConfig):
    """Sizes and options of one model.

    image, patch: height and width in pixels; pooled: width of the pooler's output; head: one of `HEADS`; stored_head:
    the one that the checkpoint has.
    """

    image: tuple[int, int]
    patch: tuple[int, int]
    channels: int
    embed: int
    mlp: int
    layers: int
    heads: int
    pooled: int
    qkv_bias: bool
    norm_eps: float
    activation: str
    dropout: float
    attention_dropout: float
    head: str
    stored_head: str
    labels: tuple[str, ...]
    problem_type: str | None
    init_stddev: float
    dtype: str
    param_dtype: str
    remat: str
    hf: str  # the config.json that this was read from, with the labels that were asked for

    @property
    def architectures(self) -> dict[str, str]:
        return _ARCHITECTURES

    @property
    def patches(self) -> int:
        """How many patches an image is cut into."""
        return (self.image[0] // self.patch[0]) * (self.image[1] // self.patch[1])

    def make(self, rngs: nnx.Rngs) -> "Vit":
        """A model with random weights."""
        return Vit(self, rngs)


class PatchEmbedding(nnx.Module):
    """x W + b of each patch, in the order of reading: [B, H, W, C] -> [B, N, D] in the dtype of x.

    kernel: [P, P, C, D], which checkpoints keep as that of a convolution, [D, C, P, P]; for them it is one, so it is no
    Linear that "all-linear" would mean or that low-rank updates fit.
    """

    hf_leaves: ClassVar = {"kernel": ("weight", (3, 2, 0, 1)), "bias": ("bias", None)}

    def __init__(self, config: VitConfig, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(config.param_dtype)
        shape = (*config.patch, config.channels, config.embed)
        value = config.init_stddev * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(value.astype(dtype), axes=(None, None, None, "embed"))
        self.bias = nnx.Param(jnp.zeros((config.embed,), dtype), axes=("embed",))
        self.adapters = Slot()

    def __call__(self, pixels: jax.Array) -> jax.Array:
        return self.adapters(self, self.project, pixels)

    def project(self, pixels: jax.Array, kernel: jax.Array | None = None, bias: jax.Array | None = None) -> jax.Array:
        """The base computation; `kernel` and `bias` stand in for the layer's own."""
        kernel = self.kernel.get_value() if kernel is None else kernel
        bias = self.bias.get_value() if bias is None else bias
        tall, wide, channels, features = kernel.shape
        batch, height, width, _ = pixels.shape
        grid = pixels.reshape(batch, height // tall, tall, width // wide, wide, channels)
        patches = grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, tall * wide * channels)  # [B, N, P * P * C]
        y = matmul(patches, kernel.reshape(-1, features))
        return y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)


class Embeddings(nnx.Module):
    """dropout([class token; patches] + positions): [B, H, W, C] -> [B, 1 + N, D] (equation 1).

    class_token: [1, 1, D]; positions: [1, 1 + N, D].
    """

    hf_leaves: ClassVar = {"class_token": ("cls_token", None), "positions": ("position_embeddings", None)}

    def __init__(self, config: VitConfig, rngs: nnx.Rngs) -> None:
        def parameter(rows: int) -> nnx.Param:
            value = config.init_stddev * jax.random.normal(rngs.params(), (1, rows, config.embed), jnp.float32)
            return nnx.Param(value.astype(config.param_dtype), axes=(None, None, "embed"))

        self.patches = PatchEmbedding(config, rngs)
        self.class_token = parameter(1)
        self.positions = parameter(1 + config.patches)
        self.dropout = Dropout(config.dropout)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = self.patches(pixels)
        first = jnp.broadcast_to(self.class_token.get_value().astype(x.dtype), (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1)
        return self.dropout(x + jnp.broadcast_to(self.positions.get_value().astype(x.dtype), x.shape))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)) (equations 2 and 3). [B, T, D] -> [B, T, D]."""

    def __init__(self, config: VitConfig, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(config.param_dtype)
        self.attention_norm = LayerNorm(config.embed, eps=config.norm_eps, dtype=dtype)
        self.attention = Attention(
            config.embed,
            config.heads,
            config.kv_heads,
            config.head_dim,
            qkv_bias=config.qkv_bias,
            out_bias=True,
            qk_norm_eps=None,
            dropout=config.attention_dropout,
            stddev=config.init_stddev,
            dtype=dtype,
            rngs=rngs,
        )
        self.attention_dropout = Dropout(config.dropout)
        self.attention_residual = Residual()
        self.feedforward_norm = LayerNorm(config.embed, eps=config.norm_eps, dtype=dtype)
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
        self.feedforward_residual = Residual()

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.attention_residual(x, self._attended)
        x = self.feedforward_residual(x, lambda x: self.feedforward_dropout(self.feedforward(self.feedforward_norm(x))))
        return sharding.constrain(x, "batch", "length", None)

    def _attended(self, x: jax.Array) -> jax.Array:
        everything = jnp.ones((1, 1, 1, x.shape[1]), bool)  # no mask would mean causal
        return self.attention_dropout(self.attention(self.attention_norm(x), None, everything)[0])


class Vit(nnx.Module):
    """An encoder and its head. pixels: [B, H, W, C] -> [B, labels], or without a head the last states, [B, 1 + N, D]; in
    the computation dtype."""

    output_layers: ClassVar = ("classifier",)  # what "all-linear" leaves out
    task_head: ClassVar = output_layers  # what every method trains whole

    def __init__(self, config: VitConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        dtype = jnp.dtype(config.param_dtype)

        def linear(features: int) -> Linear:
            axes = ("embed", "label")
            return Linear(
                config.embed, features, axes=axes, use_bias=True, stddev=config.init_stddev, dtype=dtype, rngs=rngs
            )

        self.embeddings = Embeddings(config, rngs)
        self.blocks = make_stack(lambda rngs: Block(config, rngs), config.layers, rngs)
        self.norm = LayerNorm(config.embed, eps=config.norm_eps, dtype=dtype)
        if config.head == "none":
            self.pooler = linear(config.pooled)
        else:
            self.classifier = linear(len(config.labels))

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """The head's logits, from the class token's state, or without a head the last states. Input as for `hidden`."""
        states = self.hidden(pixels)
        return states if self.config.head == "none" else self.classifier(states[:, 0])

    def hidden(self, pixels: jax.Array) -> jax.Array:
        """The states after the last norm, [B, 1 + N, D], the class token's first. pixels: [B, H, W, C], normalised as the
        checkpoint's preprocessor_config.json says."""
        x = sharding.constrain(self.embedded(pixels), "batch", "length", None)
        x, _ = scan_stack(self.blocks, lambda block, x, _: (block(x), None), x, None, self.config.remat)
        return self.norm(x)

    def embedded(self, pixels: jax.Array) -> jax.Array:
        """What the first block reads, [B, 1 + N, D]."""
        asked = (*self.config.image, self.config.channels)
        if pixels.ndim != 4 or pixels.shape[1:] != asked:
            raise ValueError(
                f"pixels of shape {pixels.shape}: this model needs [B, {', '.join(map(str, asked))}], height, width and "
                "channels last (image_size, num_channels); resize the images, for positions are not interpolated"
            )
        return self.embeddings(pixels.astype(self.config.dtype))

    def pooled(self, first: jax.Array) -> jax.Array:
        """tanh(x W + b) of the class token's states: [B, D] -> [B, pooled], where there is no head."""
        return jnp.tanh(self.pooler(first))

    # --- Hugging Face: what it calls our modules, and which tensors of a checkpoint are ours ---

    @property
    def hf_modules(self) -> dict[str, str]:
        """Our modules' names in transformers' class for this head."""
        return {path: self._prefix + name for path, name in _BASE.items()} | {"classifier": "classifier"}

    @property
    def hf_renamed(self) -> dict[str, str]:
        """Those that checkpoints, from the time of transformers 4, call otherwise."""
        return {path: self._prefix + name for path, name in _STORED.items()}

    @property
    def hf_tied(self) -> dict[str, str]:
        """Nothing is tied."""
        return {}

    @property
    def hf_ignored(self) -> tuple[str, ...]:
        """Tensors of a checkpoint that only another head or pretraining needs."""
        parts = [r"(.*\.)?embeddings\.mask_token", r"decoder\..*"]
        if self.config.head != "none":
            parts.append(r"vit\.pooler\..*")
        if self.config.head != self.config.stored_head:
            parts.append(r"classifier\..*")
        return tuple(parts)

    @property
    def hf_fresh(self) -> tuple[str, ...]:
        """Parts that a checkpoint may lack as a whole, which then begin at random: a head that was asked for, and without
        a head the pooler, which a classifier does not have."""
        if self.config.head == "none":
            return ("pooler",)
        return () if self.config.head == self.config.stored_head else ("classifier",)

    def hf_stored(self, name: str) -> str:
        """Our key for a tensor of a checkpoint: with or without the prefix "vit."."""
        bare = name.removeprefix("vit.")
        return self._prefix + bare if bare.split(".")[0] in ("embeddings", "encoder", "layernorm", "pooler") else bare

    @property
    def hf_task(self) -> None:
        """What peft calls the task: it has no word for images."""
        return None

    @property
    def _prefix(self) -> str:
        return "" if self.config.head == "none" else "vit."


_BASE = {
    "embeddings": "embeddings",
    "embeddings.patches": "embeddings.patch_embeddings.projection",
    "blocks.attention": "layers.{}.attention",
    "blocks.attention_norm": "layers.{}.layernorm_before",
    "blocks.attention.query": "layers.{}.attention.q_proj",
    "blocks.attention.key": "layers.{}.attention.k_proj",
    "blocks.attention.value": "layers.{}.attention.v_proj",
    "blocks.attention.out": "layers.{}.attention.o_proj",
    "blocks.attention_residual": "encoder.layer.{}.attention_adapters",  # where AdapterHub has its adapters
    "blocks.feedforward_norm": "layers.{}.layernorm_after",
    "blocks.feedforward.up": "layers.{}.mlp.fc1",
    "blocks.feedforward.down": "layers.{}.mlp.fc2",
    "blocks.feedforward_residual": "encoder.layer.{}.output.output_adapters",
    "norm": "layernorm",
    "pooler": "pooler.dense",
}
_STORED = {
    "blocks.attention_norm": "encoder.layer.{}.layernorm_before",
    "blocks.attention.query": "encoder.layer.{}.attention.attention.query",
    "blocks.attention.key": "encoder.layer.{}.attention.attention.key",
    "blocks.attention.value": "encoder.layer.{}.attention.attention.value",
    "blocks.attention.out": "encoder.layer.{}.attention.output.dense",
    "blocks.feedforward_norm": "encoder.layer.{}.layernorm_after",
    "blocks.feedforward.up": "encoder.layer.{}.intermediate.dense",
    "blocks.feedforward.down": "encoder.layer.{}.output.dense",
}
# The class that wrote a checkpoint -> its head here; the first of each head is the one that is written.
_ARCHITECTURES = {
    "ViTModel": "none",
    "ViTForMaskedImageModeling": "none",
    "ViTForImageClassification": "image_classification",
}
# encoder_stride: of the decoder of masked image modelling, which is not read.
_HARMLESS = LABELS | {"encoder_stride", "tie_word_embeddings", "finetuning_task"}


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
) -> VitConfig:
    """Read a config.json of model_type vit.

    head: one of `HEADS`; by default the one that `architectures` names. labels: how many or their names, if not as config.json
    says. problem_type: of the head, where config.json does not say. new_head: in place of the checkpoint's own.

    Raises:
        ValueError: a field is missing, unknown, or has a value that this family cannot honour.
    """
    fields = Fields(config, harmless=HARMLESS | _HARMLESS)
    chosen = read_head(config, _ARCHITECTURES, HEADS, head, labels, problem_type, new_head)
    fields.only("pooler_act", "tanh")
    image, patch = (_both(fields, name, default) for name, default in (("image_size", 224), ("patch_size", 16)))
    if any(side % part for side, part in zip(image, patch, strict=True)):
        raise ValueError(f"config.json: image_size={list(image)} is no multiple of patch_size={list(patch)}")
    embed, heads = fields.take("hidden_size"), fields.take("num_attention_heads")
    if embed % heads:
        raise ValueError(f"config.json: hidden_size={embed} is no multiple of num_attention_heads={heads}")
    result = VitConfig(
        image=image,
        patch=patch,
        channels=fields.take("num_channels", 3),
        embed=embed,
        mlp=fields.take("intermediate_size"),
        layers=fields.take("num_hidden_layers"),
        heads=heads,
        pooled=fields.maybe("pooler_output_size") or embed,
        qkv_bias=fields.take("qkv_bias", True),
        norm_eps=fields.take("layer_norm_eps", 1e-12),
        activation=fields.activation("hidden_act", "gelu"),
        dropout=fields.take("hidden_dropout_prob", 0.0),
        attention_dropout=fields.take("attention_probs_dropout_prob", 0.0),
        head=chosen.name,
        stored_head=chosen.stored,
        labels=chosen.labels,
        problem_type=chosen.problem_type,
        init_stddev=fields.take("initializer_range", 0.02),
        dtype=dtype,
        param_dtype=param_dtype or dtype,
        remat=remat,
        hf=json.dumps(chosen.config),
    )
    fields.done()
    return result


def _both(fields: Fields, name: str, default: int) -> tuple[int, int]:
    """Height and width, of a field that may say one number for both."""
    value = fields.take(name, default)
    sides = [value, value] if isinstance(value, int) else value
    if not isinstance(sides, list | tuple) or [type(side) for side in sides] != [int, int]:
        raise ValueError(f"config.json: {name}={value!r} is neither a number nor [height, width]")
    return sides[0], sides[1]
