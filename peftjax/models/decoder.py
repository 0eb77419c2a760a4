"""What the decoder families share: the walk from tokens to logits, the cache, the tied head, and their configs' fields.

A family gives the parts (`make_block`, `make_norm`) and overrides the few steps in which it differs: `embedded`, `placed`,
`rotations`, `layer_rotations`, `logits`.
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
from peftjax.models.tied import TiedHead
from peftjax.nn.attention import Attention, Cache, attention_mask, extend_valid, key_distances, within_window
from peftjax.nn.embedding import Embedding
from peftjax.nn.feedforward import FeedForward, FusedGatedFeedForward, GatedFeedForward
from peftjax.nn.linear import Linear
from peftjax.nn.norm import LayerNorm, RMSNorm
from peftjax.nn.rope import Rope
from peftjax.nn.rope import from_hf as rope_from_hf
from peftjax.nn.stack import Residual, make_stack, scan_stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and options that every family has. `windows`: per layer, how far back a query sees (0: everything)."""

    vocab: int
    embed: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    activation: str
    tied: bool
    windows: tuple[int, ...]
    init_stddev: float
    hf: str  # the config.json that this was read from
    dtype: str = "float32"
    param_dtype: str = ""  # none: dtype
    remat: str = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "param_dtype", self.param_dtype or self.dtype)

    def make(self, rngs: nnx.Rngs) -> "Decoder":
        """A model with random weights."""
        raise NotImplementedError

    def to_hf(self) -> dict[str, Any]:
        """config.json for a directory that transformers loads."""
        fields = json.loads(self.hf)
        fields.pop("torch_dtype", None)
        return fields | {"dtype": self.param_dtype, "tie_word_embeddings": self.tied}


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)). [B, T, D] -> [B, T, D]."""

    def __init__(
        self,
        *,
        attention_norm: RMSNorm | LayerNorm,
        attention: Attention,
        feedforward_norm: RMSNorm | LayerNorm,
        feedforward: FeedForward | GatedFeedForward | FusedGatedFeedForward,
    ) -> None:
        self.attention_norm, self.attention = attention_norm, attention
        self.attention_residual = Residual()
        self.feedforward_norm, self.feedforward = feedforward_norm, feedforward
        self.feedforward_residual = Residual()

    def __call__(
        self, x: jax.Array, rope: Any, mask: jax.Array | None, cache: Any, offset: jax.Array | int
    ) -> tuple[jax.Array, Any]:
        new_cache = cache

        def attend(x: jax.Array) -> jax.Array:
            nonlocal new_cache
            y, new_cache = self.attention(self.attention_norm(x), rope, mask, cache, offset)
            return self.attended(y)

        x = self.attention_residual(x, attend)
        x = self.feedforward_residual(x, lambda x: self.transformed(self.feedforward(self.feedforward_norm(x))))
        return sharding.constrain(x, "batch", "length", None), new_cache

    def attended(self, y: jax.Array) -> jax.Array:
        """What is added to x of attention's output."""
        return y

    def transformed(self, y: jax.Array) -> jax.Array:
        """What is added to x of the feed-forward layer's output."""
        return y


class Decoder(TiedHead):
    """A decoder. tokens: int [B, T] -> logits [B, T, V] in the computation dtype.

    The names that Hugging Face gives to its parts are at the foot of each family's file. `hf_prefix`: what a checkpoint
    saved without the head leaves out before them; `hf_ignored`: patterns of tensors that say nothing; `hf_tied`: where
    the head borrows the embedding, a checkpoint may hold the first name in place of the second, or both.
    """

    hf_modules: ClassVar[dict[str, str]]
    hf_prefix: ClassVar[str] = "model."
    hf_ignored: ClassVar[tuple[str, ...]] = ()
    hf_tied: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    output_layers: ClassVar = ("head",)  # what "all-linear" leaves out

    def __init__(self, config: Any, rngs: nnx.Rngs) -> None:
        self.config = config
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        self.embed = Embedding(
            config.vocab, config.embed, stddev=config.init_stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.blocks = make_stack(lambda rngs: self.make_block(config, rngs), config.layers, rngs)
        self.norm = self.make_norm(config)
        self.head = Linear(
            config.embed,
            config.vocab,
            axes=("embed", "vocab"),
            tied=config.tied,
            stddev=config.init_stddev,
            dtype=param_dtype,
            rngs=rngs,
        )

    # --- What a family gives, and where it may differ ---

    @staticmethod
    def make_block(config: Any, rngs: nnx.Rngs) -> Block:
        """One layer."""
        raise NotImplementedError

    @staticmethod
    def make_norm(config: Any) -> RMSNorm | LayerNorm:
        """The norm after the last layer."""
        raise NotImplementedError

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """The embedded tokens, int [B, T] -> [B, T, D], as a soft prompt is put before them."""
        return self.embed(tokens)

    def placed(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """What the first layer reads: x [B, T, D], a soft prompt included, at positions [B or 1, T]."""
        del positions
        return x

    def rotations(self, positions: jax.Array) -> Any:
        """cos and sin of the rotary embedding at positions [B or 1, T]; None where there is none."""
        return self.config.rope.tables(positions)

    def layer_rotations(self, rotations: Any, window: jax.Array) -> Any:
        """Those of one layer, from its window."""
        del window
        return rotations

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The head: [B, T, D] -> [B, T, V]."""
        if self.tied:
            return self.head(hidden, kernel=self.embed.embedding.get_value().T)
        return self.head(hidden)

    # --- What is the same in all of them ---

    def __call__(self, tokens: jax.Array, **inputs: Any) -> Any:
        """Logits [B, T, V]; with `cache=`: (logits, the cache with T more tokens). Inputs as for `hidden`."""
        hidden, cache = self.hidden(tokens, **inputs)
        logits = self.logits(hidden)
        return logits if cache is None else (logits, cache)

    def hidden(
        self,
        tokens: jax.Array,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """The states after the last norm, [B, T, D], and the cache if there is one.

        tokens: int [B, T]; mask: bool [B, T], true for real tokens; positions: int [B, T], by default counted from the
        first token (in the cache); segments: int [B, T], packed documents see only themselves. A soft prompt and a
        prefix, if active, come before every document; here they are not counted, and of their states none is given.
        """
        soft, virtual = self.embed.adapters.virtual, self.virtual
        x = self.embedded(tokens)
        if positions is None:
            start = 0 if cache is None else cache.length - soft
            positions = start + jnp.arange(tokens.shape[1])[None]  # [1, T]
        positions = positions + virtual
        if cache is not None or not soft:
            return self._through_blocks(x, positions, mask, segments, cache)
        x = jnp.concatenate([self._prompt(len(x)), x], axis=1)
        before = jnp.broadcast_to(virtual - soft + jnp.arange(soft)[None], (len(positions), soft))
        positions = jnp.concatenate([before, positions], axis=1)
        mask, segments = (
            None if array is None else jnp.pad(array, ((0, 0), (soft, 0)), constant_values=value)
            for array, value in ((mask, True), (segments, -1))
        )
        x, _ = self._through_blocks(x, positions, mask, segments, None)
        return x[:, soft:], None

    def _through_blocks(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array | None,
        segments: jax.Array | None,
        cache: Cache | None,
    ) -> tuple[jax.Array, Cache | None]:
        """`hidden` from the embedded tokens [B, T, D] on, a soft prompt among them or in the cache."""
        length, soft = x.shape[1], self.embed.adapters.virtual
        offset = 0 if cache is None else cache.length
        rope = self.rotations(positions)
        valid, allowed, distances = None, None, None  # None: causal
        if mask is not None or cache is not None:
            valid = extend_valid(cache, jnp.ones(x.shape[:2], bool) if mask is None else mask)
        if valid is not None or segments is not None or any(self.config.windows):
            allowed = attention_mask(length, valid=valid, segments=segments, offset=offset, shared=soft)
        if allowed is not None and any(self.config.windows):
            counted = positions - self.virtual + soft  # from the soft prompt's first key
            distances = key_distances(counted, allowed.shape[3], offset, soft)

        def layer(block: Block, x: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
            layer_cache, window = inputs
            limited = allowed if allowed is None or distances is None else within_window(allowed, window, distances)
            return block(x, self.layer_rotations(rope, window), limited, layer_cache, offset)

        x = sharding.constrain(self.placed(x, positions), "batch", "length", None)
        per_layer = (None if cache is None else (cache.key, cache.value), jnp.asarray(self.config.windows, jnp.int32))
        x, new = scan_stack(self.blocks, layer, x, per_layer, self.config.remat)
        if cache is not None and valid is not None:
            cache = Cache(key=new[0], value=new[1], valid=valid, length=cache.length + length)
        return self.norm(x), cache

    @property
    def virtual(self) -> int:
        """How many positions a soft prompt and a prefix take before the first token."""
        return self.embed.adapters.virtual + self.blocks.attention.adapters.virtual

    def _prompt(self, batch: int) -> jax.Array:
        """The active soft prompts for each row, [B, P, D]."""
        prompt = self.embed.prompt()
        return jnp.broadcast_to(prompt[None], (batch, *prompt.shape))

    def hf_stored(self, name: str) -> str:
        """Our key for a tensor of a checkpoint: one that was saved without the head has no prefix."""
        whole = (self.hf_prefix, f"{self.hf_modules['head']}.")
        return name if name.startswith(whole) else self.hf_prefix + name

    def make_cache(self, batch: int, length: int) -> Cache:
        """A cache for `length` tokens in each of `batch` rows, in the computation dtype; it holds the soft prompt."""
        config, soft = self.config, self.embed.adapters.virtual
        length += soft
        shape = (config.layers, batch, length, config.kv_heads, config.head_dim)
        empty = jnp.zeros(shape, config.dtype)
        cache = Cache(key=empty, value=empty, valid=jnp.zeros((batch, length), bool), length=jnp.zeros((), jnp.int32))
        if not soft:
            return cache
        places = self.virtual - soft + jnp.arange(soft)[None]
        _, filled = self._through_blocks(self._prompt(batch), places, None, None, cache)
        assert filled is not None
        return filled


# --- Fields of config.json that several families have ---


def rope_fields(fields: Fields) -> dict[str, Any]:
    """What config.json says of the rotary embedding, in the spelling of transformers 4 or 5."""
    parameters = dict(fields.maybe("rope_scaling") or {}) | dict(fields.maybe("rope_parameters") or {})
    for name in ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor"):
        if (value := fields.maybe(name)) is not None:
            parameters.setdefault(name, value)
    return parameters


def read_rope(fields: Fields, head_dim: int, max_positions: int) -> Rope:
    """The rotary embedding of a model that has one for all of its layers."""
    return rope_from_hf(rope_fields(fields), head_dim=head_dim, max_positions=max_positions)


def read_heads(fields: Fields) -> tuple[int, int]:
    """The numbers of query heads and of key/value heads."""
    heads = fields.take("num_attention_heads")
    kv_heads = fields.take("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(f"config.json: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}")
    return heads, kv_heads


def windows_by_type(types: Sequence[str], layers: int, window: int) -> tuple[int, ...]:
    """`window` in the layers whose type is sliding_attention."""
    if len(types) != layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise ValueError(
            f"config.json: layer_types must name sliding_attention or full_attention for {layers} layers: {types}"
        )
    if "sliding_attention" in types and not window:
        raise ValueError(
            "config.json: layer_types has sliding_attention, but no window is in use: set sliding_window (and "
            "use_sliding_window, where the family has it)"
        )
    return tuple(window if name == "sliding_attention" else 0 for name in types)
