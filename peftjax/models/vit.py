"""ViT: a pre-norm encoder over the patches of an image, and its head for image classification.

Dosovitskiy et al. 2020 (arXiv:2010.11929), section 3.1.
"""

import dataclasses
from typing import ClassVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax import sharding
from peftjax.core.errors import UserError
from peftjax.models.eager import compiled
from peftjax.models.encoder import Encoder, EncoderBlock, EncoderConfig, EncoderOptions, linear, read_shared
from peftjax.models.fields import Fields
from peftjax.models.heads import read_head
from peftjax.nn.dropout import Dropout
from peftjax.nn.layer import HfLeaves, Layer
from peftjax.nn.patches import PatchEmbedding
from peftjax.nn.residual import Residual
from peftjax.nn.stack import make_stack, scan_stack

HEADS = ("none", "image_classification")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig(EncoderConfig):
    """Adds the geometry of images.

    Attributes:
        image: Height and width of an image in pixels.
        patch: Height and width of a patch in pixels.
        channels: Color channels, C.
        pooled: Width of the pooler's output.
        qkv_bias: Whether the query, key and value layers have biases.
    """

    image: tuple[int, int]
    patch: tuple[int, int]
    channels: int
    pooled: int
    qkv_bias: bool

    @property
    def patches(self) -> int:
        """Number of patches in an image."""
        return self.max_positions - 1


class Embeddings(Layer):
    """dropout([class token; patches] + positions): [B, H, W, C] -> [B, 1 + N, D] (equation 1).

    Attributes:
        class_token: [1, 1, D].
        positions: [1, 1 + N, D].
    """

    hf_leaves: ClassVar[HfLeaves] = {"class_token": ("cls_token", None), "positions": ("position_embeddings", None)}

    def __init__(self, config: VitConfig, rngs: nnx.Rngs) -> None:
        def parameter(rows: int) -> nnx.Param:
            value = config.init_stddev * jax.random.normal(rngs.params(), (1, rows, config.embed), jnp.float32)
            return nnx.Param(value.astype(config.param_dtype), axes=(None, None, "embed"))

        self.patches = PatchEmbedding(config.patch, config.channels, config.embed, **config.weights(rngs))
        self.class_token = parameter(1)
        self.positions = parameter(config.max_positions)
        self.dropout = Dropout(config.dropout)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = self.patches(pixels)
        first = jnp.broadcast_to(self.class_token.get_value().astype(x.dtype), (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1)
        return self.dropout(x + jnp.broadcast_to(self.positions.get_value().astype(x.dtype), x.shape))


class Block(EncoderBlock):
    """x + attention(norm(x)), then x + feedforward(norm(x)) (equations 2 and 3): [B, T, D] -> [B, T, D]."""

    def __init__(self, config: VitConfig, rngs: nnx.Rngs) -> None:
        super().__init__(config, qkv_bias=config.qkv_bias, rngs=rngs)
        self.attention_norm, self.attention_residual = config.norm(), Residual()
        self.feedforward_norm, self.feedforward_residual = config.norm(), Residual()

    def __call__(self, x: jax.Array) -> jax.Array:
        everything = jnp.ones((1, 1, 1, x.shape[1]), bool)  # without a mask attention would be causal
        x = self.attention_residual(x, lambda x: self.attend(self.attention_norm(x), everything))
        x = self.feedforward_residual(x, lambda x: self.transform(self.feedforward_norm(x)))
        return sharding.constrain(x, "batch", "length", None)


class Vit(Encoder):
    """An encoder and its head, from pixels [B, H, W, C].

    Returns logits [B, labels], or without a head the last hidden states [B, 1 + N, D], in the compute dtype.
    """

    config: VitConfig
    blocks: Block
    output_layers: ClassVar = ("classifier",)
    task_head: ClassVar = output_layers

    def __init__(self, config: VitConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embeddings = Embeddings(config, rngs)
        self.blocks = make_stack(lambda rngs: Block(config, rngs), config.layers, rngs)
        self.norm = config.norm()
        if config.head == "none":
            self.pooler = linear(config, config.pooled, rngs)
        else:
            self.classifier = linear(config, len(config.labels), rngs)

    @compiled
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Return the head's logits, from the class token's state, or without a head the last hidden states."""
        states = self.hidden(pixels)
        return states if self.config.head == "none" else self.classifier(states[:, 0])

    def hidden(self, pixels: jax.Array) -> jax.Array:
        """Return the hidden states after the last norm, [B, 1 + N, D], the class token's first.

        Args:
            pixels: [B, H, W, C], normalized as the checkpoint's preprocessor_config.json says.
        """
        x = sharding.constrain(self.embedded(pixels), "batch", "length", None)
        x, _ = scan_stack(self.blocks, lambda block, x, _: (block(x), None), x, None, self.config.remat)
        return self.norm(x)

    def embedded(self, pixels: jax.Array) -> jax.Array:
        """The first block's input, [B, 1 + N, D]."""
        needed = (*self.config.image, self.config.channels)
        if pixels.ndim != 4 or pixels.shape[1:] != needed:
            raise UserError(
                f"pixels of shape {pixels.shape}: this model needs [B, {', '.join(map(str, needed))}], height, width and "
                "channels last (image_size, num_channels); resize the images, since positions are not interpolated"
            )
        return self.embeddings(pixels.astype(self.config.dtype))

    # --- Hugging Face: names of our modules, and which checkpoint tensors are used ---

    @property
    def hf_modules(self) -> dict[str, str]:
        return self._prefixed(_BASE) | {"classifier": "classifier"}

    @property
    def hf_renamed(self) -> dict[str, str]:
        """Checkpoints keep the names of transformers 4."""
        return self._prefixed(_STORED)

    @property
    def hf_ignored(self) -> tuple[str, ...]:
        """Parts that only another head, or pretraining, needs."""
        parts = [r"(.*\.)?embeddings\.mask_token", r"decoder\..*"]
        if self.config.head != "none":
            parts.append(r"vit\.pooler\..*")
        if self.config.head != self.config.stored_head:
            parts.append(r"classifier\..*")
        return tuple(parts)

    @property
    def hf_fresh(self) -> tuple[str, ...]:
        """A head that the checkpoint does not have, and without a head the pooler, which classifiers lack."""
        if self.config.head == "none":
            return ("pooler",)
        return () if self.config.head == self.config.stored_head else ("classifier",)

    def hf_stored(self, name: str) -> str:
        """Return our name for a checkpoint tensor; checkpoints may lack the prefix "vit."."""
        bare = name.removeprefix("vit.")
        return self.hf_prefix + bare if bare.split(".")[0] in ("embeddings", "encoder", "layernorm", "pooler") else bare


_BASE = {
    "embeddings": "embeddings",
    "embeddings.patches": "embeddings.patch_embeddings.projection",
    "blocks.attention": "layers.{}.attention",
    "blocks.attention_norm": "layers.{}.layernorm_before",
    "blocks.attention.query": "layers.{}.attention.q_proj",
    "blocks.attention.key": "layers.{}.attention.k_proj",
    "blocks.attention.value": "layers.{}.attention.v_proj",
    "blocks.attention.out": "layers.{}.attention.o_proj",
    "blocks.attention_residual": "encoder.layer.{}.attention_adapters",  # where AdapterHub puts its adapters
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
_ARCHITECTURES = {
    "ViTModel": "none",
    "ViTForMaskedImageModeling": "none",
    "ViTForImageClassification": "image_classification",
}


def from_hf(fields: Fields, **options: Unpack[EncoderOptions]) -> VitConfig:
    """Read a config.json of model_type vit. The head is one of `HEADS`."""
    fields.skip("encoder_stride")  # of the decoder of masked image modeling, which is not read
    chosen = read_head(fields, options, _ARCHITECTURES, HEADS)
    fields.only("pooler_act", "tanh")
    image, patch = (_both(fields, name, default) for name, default in (("image_size", 224), ("patch_size", 16)))
    if any(side % part for side, part in zip(image, patch, strict=True)):
        raise UserError(f"config.json: image_size={list(image)} is not a multiple of patch_size={list(patch)}")
    shared = read_shared(fields, dropout=0.0)
    return VitConfig(
        model=Vit,
        image=image,
        patch=patch,
        max_positions=1 + (image[0] // patch[0]) * (image[1] // patch[1]),  # the class token and the patches
        channels=fields.take("num_channels", 3),
        pooled=fields.maybe("pooler_output_size") or shared["embed"],
        qkv_bias=fields.take("qkv_bias", True),
        **shared,
        **chosen,
    )


def _both(fields: Fields, name: str, default: int) -> tuple[int, int]:
    """Read height and width from a field that may hold one number for both."""
    value = fields.take(name, default)
    sides = [value, value] if isinstance(value, int) else value
    if not isinstance(sides, list | tuple) or [type(side) for side in sides] != [int, int] or min(sides) < 1:
        raise UserError(f"config.json: {name}={value!r} is neither a number above 0 nor [height, width]")
    return sides[0], sides[1]
