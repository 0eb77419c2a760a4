"""T5 v1.0 and v1.1, and mT5: an encoder-decoder with relative positions (Raffel et al. 2020, arXiv:1910.10683).

v1.0 has ReLU, a head tied to the embedding, and scales the head's input by 1/sqrt(D). v1.1 and mT5 (Xue et al. 2021,
arXiv:2010.11934) have gated GELU and a separate head without scaling.
"""

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax import sharding
from peftjax.core.errors import UserError
from peftjax.models.base import ComputeOptions
from peftjax.models.encoder_decoder import DecoderCache, EncoderDecoder, EncoderDecoderConfig
from peftjax.models.fields import Fields
from peftjax.nn.cache import Carry, KeysValues, LayerCache
from peftjax.nn.dropout import Dropout
from peftjax.nn.feedforward import ACTIVATIONS, FeedForward, GatedFeedForward
from peftjax.nn.layer import SlottedLayer
from peftjax.nn.linear import Linear
from peftjax.nn.norm import RMSNorm
from peftjax.nn.recompute import recomputed
from peftjax.nn.relative_bias import RelativeBias
from peftjax.nn.residual import Residual
from peftjax.nn.slot import Slot
from peftjax.nn.stack import make_stack, scan_stack

UNLIMITED = 2**31 - 1  # relative positions have no maximum


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(EncoderDecoderConfig):
    """Adds what distinguishes the T5s. `init_stddev` is the embedding's; the others are multiples of it.

    Attributes:
        buckets: Number of relative position buckets.
        max_distance: Distances from here on share a bucket.
        gated: Whether the feed-forward layers are gated.
        scaled: Whether the head's input is scaled by 1/sqrt(D).
        dropout: Dropout rate of the embedded tokens, the attention probabilities, each sublayer's output, the hidden
            feed-forward activations and the last hidden states.
    """

    buckets: int
    max_distance: int
    gated: bool
    scaled: bool
    dropout: float

    # As in transformers, whatever config.json says.
    tied_if_equal: ClassVar = ("lm_head.weight", "shared.weight")

    def norm(self) -> RMSNorm:
        """Build a norm of the hidden states."""
        return RMSNorm(self.embed, eps=self.norm_eps, dtype=jnp.dtype(self.param_dtype))

    def to_hf(self) -> dict[str, Any]:
        fields = super().to_hf()
        if fields["model_type"] == "mt5":
            return fields | {"tie_word_embeddings": self.tied}
        # transformers 4 reads the first field for both, transformers 5 the second for the scaling
        return fields | {"tie_word_embeddings": self.scaled, "scale_decoder_outputs": self.scaled}


class T5Attention(SlottedLayer):
    """softmax(q k^T + bias) v W_out, for self-attention and for a decoder's attention to the encoder's hidden states.

    Scores are not scaled by 1/sqrt(H); the random query kernel's standard deviation includes it. Kernels are
    two-dimensional, with heads flattened into one axis. The slot wraps the core (q, k, v, mask, bias) -> [B, T, N, H],
    where prefix tuning sits.
    """

    def __init__(self, config: T5Config, rngs: nnx.Rngs) -> None:
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        features, inner = config.embed, config.heads * config.head_dim

        def linear(inputs: int, outputs: int, axes: tuple[str, str], variance: float) -> Linear:
            return Linear(inputs, outputs, axes=axes, **config.weights(rngs, variance**0.5))

        self.query = linear(features, inner, ("embed", "heads"), 1 / (features * config.head_dim))
        self.key = linear(features, inner, ("embed", "kv_heads"), 1 / features)
        self.value = linear(features, inner, ("embed", "kv_heads"), 1 / features)
        self.out = linear(inner, features, ("heads", "embed"), 1 / inner)
        self.dropout = Dropout(config.dropout)
        self.adapters = Slot()

    def keys_values(self, states: jax.Array) -> KeysValues:
        """Project what is attended to: [B, S, D] -> keys and values, [B, S, N, H] each."""
        k, v = self._heads(self.key(states)), self._heads(self.value(states))
        return sharding.whole_length(k), sharding.whole_length(v)

    def __call__(
        self, x: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, bias: jax.Array | None
    ) -> jax.Array:
        """x [B, T, D] -> [B, T, D]; mask: bool [B or 1, 1, T or 1, S], None: all keys; bias: [1, N, T, S]."""
        attended = self.adapters(self, self.core, self._heads(self.query(x)), k, v, mask, bias)
        return self.out(attended.reshape(*x.shape[:2], -1))

    def core(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, bias: jax.Array | None
    ) -> jax.Array:
        """The base computation: q [B, T, N, H], k and v [B, S, N, H] -> [B, T, N, H]."""
        return recomputed(self._attend)(q, k, v, mask, bias)

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, bias: jax.Array | None
    ) -> jax.Array:
        if self.dropout.idle:
            return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=1.0)
        scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
        scores = scores if bias is None else scores + jnp.broadcast_to(bias, scores.shape)
        scores = scores if mask is None else jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        return jnp.einsum("bnts,bsnh->btnh", self.dropout(jax.nn.softmax(scores)).astype(v.dtype), v)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.heads, self.head_dim)


class T5Block(nnx.Module):
    """What the blocks of both stacks share: norms, self-attention and a feed-forward layer."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs) -> None:
        self.attention_norm = config.norm()
        self.attention = T5Attention(config, rngs)
        self.attention_residual, self.attention_dropout = Residual(), Dropout(config.dropout)
        self.feedforward_norm = config.norm()
        self.feedforward = (GatedFeedForward if config.gated else FeedForward)(
            config.embed,
            config.mlp,
            activation=ACTIVATIONS[config.activation],
            dropout=config.dropout,
            **config.weights(rngs, config.embed**-0.5),
        )
        self.feedforward_residual, self.feedforward_dropout = Residual(), Dropout(config.dropout)

    def feed_forward(self, x: jax.Array) -> jax.Array:
        """x + feedforward(norm(x)): [B, T, D] -> [B, T, D]."""
        x = self.feedforward_residual(x, lambda x: self.feedforward_dropout(self.feedforward(self.feedforward_norm(x))))
        return sharding.constrain(x, "batch", "length", None)


class T5EncoderBlock(T5Block):
    """x + attention(norm(x)), then x + feedforward(norm(x)): [B, T, D] -> [B, T, D]."""

    def __call__(self, x: jax.Array, mask: jax.Array | None, bias: jax.Array) -> jax.Array:
        def attend(x: jax.Array) -> jax.Array:
            x = self.attention_norm(x)
            return self.attention_dropout(self.attention(x, *self.attention.keys_values(x), mask, bias))

        return self.feed_forward(self.attention_residual(x, attend))


class T5DecoderBlock(T5Block):
    """x + attention(norm(x)), then x + cross(norm(x), memory), then x + feedforward(norm(x))."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs)
        self.cross_norm = config.norm()
        self.cross, self.cross_dropout = T5Attention(config, rngs), Dropout(config.dropout)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        bias: jax.Array,
        memory: KeysValues,
        memory_mask: jax.Array | None,
        cache: LayerCache | None,
        offset: jax.Array | int,
    ) -> tuple[jax.Array, LayerCache | None]:
        """[B, T, D] -> ([B, T, D], the cache extended by T tokens).

        Args:
            x: [B, T, D].
            mask: bool [1, 1, T, S].
            bias: [1, N, T, S].
            memory: Keys and values of the encoder's hidden states, from `cross.keys_values`.
            memory_mask: bool [B, 1, 1, M]; None: all keys.
            cache: The keys and values of earlier tokens.
            offset: Number of tokens in the cache.
        """
        new_cache = cache

        def attend(x: jax.Array) -> jax.Array:
            nonlocal new_cache
            x = self.attention_norm(x)
            k, v = self.attention.keys_values(x)
            if cache is not None:
                (k, v), new_cache = cache.extend(k, v, offset)
            return self.attention_dropout(self.attention(x, k, v, mask, bias))

        x = self.attention_residual(x, attend)
        x = x + self.cross_dropout(self.cross(self.cross_norm(x), *memory, memory_mask, None))
        return self.feed_forward(x), new_cache


class T5(EncoderDecoder):
    """An encoder-decoder: tokens int [B, S], decoder_tokens int [B, T] -> logits [B, T, V] in the compute dtype."""

    config: T5Config
    encoder: T5EncoderBlock
    decoder: T5DecoderBlock
    hf_modules: ClassVar[Mapping[str, str]]
    hf_ignored: ClassVar[tuple[str, ...]]
    hf_tied: ClassVar[Mapping[str, str]]
    prefix_layers: ClassVar = ("decoder.attention",)  # neither in the encoder nor in `cross`
    hf_dense: ClassVar = ("wo",)  # kept in float32, because its outputs are large

    def __init__(self, config: T5Config, rngs: nnx.Rngs) -> None:
        self.config = config
        weights = config.weights(rngs, config.embed**-0.5)
        bias = partial(RelativeBias, config.buckets, config.max_distance, config.heads, **weights)
        self.embed = config.make_table(config.vocab, rngs)
        self.encoder_bias = bias(both_sides=True)
        self.encoder = make_stack(lambda rngs: T5EncoderBlock(config, rngs), config.layers, rngs)
        self.encoder_norm = config.norm()
        self.encoder_dropouts = nnx.data([Dropout(config.dropout) for _ in ("embedded", "last")])
        self.decoder_bias = bias(both_sides=False)
        self.decoder = make_stack(lambda rngs: T5DecoderBlock(config, rngs), config.decoder_layers, rngs)
        self.decoder_norm = config.norm()
        self.decoder_dropouts = nnx.data([Dropout(config.dropout) for _ in ("embedded", "last")])
        self.head = config.make_head(rngs)

    def hidden(self, tokens: jax.Array, *, mask: jax.Array | None = None, decoder_tokens: jax.Array) -> jax.Array:
        states, mask = self.encode(tokens, mask=mask)
        return self._decode(decoder_tokens, states, mask, None)[0]

    def encode(self, tokens: jax.Array, *, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
        """Return the encoder's hidden states [B, P + S, D], soft-prompt positions first, and their mask [B, P + S]."""
        x = self.embed(tokens)
        if soft := self.embed.adapters.virtual:
            x = jnp.concatenate([self.embed.prompt(len(x)), x], axis=1)
            mask = None if mask is None else jnp.pad(mask, ((0, 0), (soft, 0)), constant_values=True)
        places = jnp.arange(x.shape[1])
        bias = self.encoder_bias(places, places, x.dtype)

        def layer(block: T5EncoderBlock, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return block(x, _over_keys(mask), bias), None

        embedded, last = self.encoder_dropouts
        x = sharding.constrain(embedded(x), "batch", "length", None)
        x, _ = scan_stack(self.encoder, layer, x, None, self.config.remat)
        return last(self.encoder_norm(x)), mask

    def decode(self, decoder_tokens: jax.Array, cache: DecoderCache) -> tuple[jax.Array, DecoderCache]:
        hidden, new = self._decode(decoder_tokens, None, cache.memory_mask, cache)
        assert new is not None
        return hidden, new

    def make_cache(self, tokens: jax.Array, mask: jax.Array, length: int) -> DecoderCache:
        config = self.config
        states, memory_mask = self.encode(tokens, mask=mask)
        assert memory_mask is not None

        def layer(block: T5DecoderBlock, states: jax.Array, _: None) -> tuple[jax.Array, KeysValues]:
            return states, block.cross.keys_values(states)

        _, (key, value) = scan_stack(self.decoder, layer, states, None, config.remat)
        empty = jnp.zeros((config.decoder_layers, len(tokens), length, config.heads, config.head_dim), config.dtype)
        return DecoderCache(empty, empty, jnp.zeros((), jnp.int32), key, value, memory_mask)

    def _decode(
        self,
        tokens: jax.Array,
        states: jax.Array | None,
        memory_mask: jax.Array | None,
        cache: DecoderCache | None,
    ) -> tuple[jax.Array, DecoderCache | None]:
        """Decode with the encoder's hidden states, or with a cache that has their keys and values."""
        x = self.embed(tokens)
        length = tokens.shape[1]
        offset, slots = (0, length) if cache is None else (cache.length, cache.key.shape[2])
        prefix = self.decoder.attention.adapters.virtual  # its keys come before slot 0
        queries = offset + jnp.arange(length)
        mask = (jnp.arange(slots)[None] <= queries[:, None])[None, None]  # [1, 1, T, S]
        bias = self.decoder_bias(prefix + queries, jnp.arange(prefix + slots), x.dtype)

        def layer(
            block: T5DecoderBlock, carry: Carry, cached: tuple[jax.Array, KeysValues] | None
        ) -> tuple[Carry, None]:
            x, stored = carry
            if cached is None or stored is None:
                assert states is not None
                memory = block.cross.keys_values(states)
                return (block(x, mask, bias, memory, _over_keys(memory_mask), None, offset)[0], None), None
            index, memory = cached
            x, own = block(x, mask, bias, memory, _over_keys(memory_mask), LayerCache(*stored, index), offset)
            assert own is not None
            return (x, (own.key, own.value)), None

        embedded, last = self.decoder_dropouts
        x = sharding.constrain(embedded(x), "batch", "length", None)
        stored, per_layer = None, None
        if cache is not None:
            stored = (cache.key, cache.value)
            per_layer = (jnp.arange(self.config.decoder_layers), (cache.memory_key, cache.memory_value))
        (x, stored), _ = scan_stack(self.decoder, layer, (x, stored), per_layer, self.config.remat)
        if cache is not None and stored is not None:
            cache = dataclasses.replace(cache, key=stored[0], value=stored[1], length=cache.length + length)
        return last(self.decoder_norm(x)), cache

    @property
    def virtual(self) -> int:
        """Virtual positions: a soft prompt's before the encoder's first token, and a prefix's before the decoder's."""
        return self.embed.adapters.virtual + self.decoder.attention.adapters.virtual

    def logits(self, hidden: jax.Array) -> jax.Array:
        return super().logits(hidden * self.config.embed**-0.5 if self.config.scaled else hidden)


class GatedT5(T5):
    """T5 v1.1: gated feed-forward layers, whose input kernels have two names in Hugging Face."""


def _over_keys(mask: jax.Array | None) -> jax.Array | None:
    """Broadcast a mask of keys, [B, S], over heads and queries: [B, 1, 1, S]."""
    return None if mask is None else mask.astype(bool)[:, None, None, :]


# --- Hugging Face: names of our modules, and config.json ---


def _names(feedforward: dict[str, str]) -> dict[str, str]:
    projections = {"query": "q", "key": "k", "value": "v", "out": "o"}
    names = {"embed": "shared", "head": "lm_head"}
    for stack, last in (("encoder", 1), ("decoder", 2)):  # `last`: the feed-forward sublayer
        block = f"{stack}.block.{{}}.layer"
        parts = {
            "attention_norm": "0.layer_norm",
            "attention": "0.SelfAttention",
            "attention_residual": "0",  # where AdapterHub puts its adapters
            "feedforward_norm": f"{last}.layer_norm",
            "feedforward_residual": f"{last}",
        }
        parts |= {f"attention.{ours}": f"0.SelfAttention.{theirs}" for ours, theirs in projections.items()}
        parts |= {f"feedforward.{ours}": f"{last}.DenseReluDense.{theirs}" for ours, theirs in feedforward.items()}
        if stack == "decoder":
            parts |= {"cross_norm": "1.layer_norm", "cross": "1.EncDecAttention"}
            parts |= {f"cross.{ours}": f"1.EncDecAttention.{theirs}" for ours, theirs in projections.items()}
        names |= {f"{stack}.{ours}": f"{block}.{theirs}" for ours, theirs in parts.items()}
        # All blocks share the table, which block 0 holds.
        names[f"{stack}_bias"] = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
        names[f"{stack}_norm"] = f"{stack}.final_layer_norm"
    return names


T5.hf_modules = _names({"up": "wi", "down": "wo"})
GatedT5.hf_modules = _names({"gate": "wi_0", "up": "wi_1", "down": "wo"})
# Checkpoints may store each of them beside `shared` or in its place; the head only if it is tied.
T5.hf_tied = {
    "lm_head.weight": "shared.weight",
    "encoder.embed_tokens.weight": "shared.weight",
    "decoder.embed_tokens.weight": "shared.weight",
}
# Unused, in old checkpoints.
T5.hf_ignored = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)

# Defaults of transformers for fields that config.json omits, by model_type.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "t5": {
        "vocab_size": 32128, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "feed_forward_proj": "relu",
    },
    "mt5": {
        "vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu",
    },
}  # fmt: skip


def from_hf(fields: Fields, **options: Unpack[ComputeOptions]) -> T5Config:
    """Read a config.json of model_type t5 or mt5, in the format of transformers 4 or 5."""
    fields.assume(**_DEFAULTS[fields.kind])
    fields.skip("task_specific_params", "n_positions", "output_past", "classifier_dropout")
    take = fields.take
    if not take("is_encoder_decoder", True) or take("is_decoder", False):
        raise UserError(
            "config.json: is_encoder_decoder=false or is_decoder=true: an encoder or a decoder alone is not supported"
        )
    layers = take("num_layers")
    projection = take("feed_forward_proj")
    gated, activation = projection.startswith("gated-"), projection.removeprefix("gated-")
    activation = "gelu_new" if projection == "gated-gelu" else activation
    given = (take("is_gated_act", gated), take("dense_act_fn", activation))
    if given != (gated, activation):
        raise UserError(
            f"config.json: is_gated_act={given[0]} and dense_act_fn={given[1]!r} contradict feed_forward_proj="
            f"{projection!r}; remove both"
        )
    tied = take("tie_word_embeddings", True)
    scaled = take("scale_decoder_outputs", tied)
    pad = take("pad_token_id", 0)
    heads = take("num_heads")
    result = T5Config(
        model=GatedT5 if gated else T5,
        vocab=take("vocab_size"),
        embed=take("d_model", 512),
        mlp=take("d_ff"),
        layers=layers,
        decoder_layers=take("num_decoder_layers", layers),
        heads=heads,
        kv_heads=heads,
        head_dim=take("d_kv", 64),
        max_positions=UNLIMITED,
        buckets=take("relative_attention_num_buckets", 32),
        max_distance=take("relative_attention_max_distance", 128),
        norm_eps=take("layer_norm_epsilon", 1e-6),
        activation=activation,
        gated=gated,
        tied=tied and scaled,
        scaled=scaled and fields.kind == "t5",
        dropout=take("dropout_rate", 0.1),
        init_stddev=take("initializer_factor", 1.0),
        start=take("decoder_start_token_id", pad),
        hf=json.dumps(fields.config),
        **options,
    )
    if result.activation not in ACTIVATIONS:
        raise UserError(
            f"config.json: unknown feed_forward_proj {projection!r}; supported, also after 'gated-': "
            f"{', '.join(sorted(ACTIVATIONS))}"
        )
    if result.buckets < 4 or result.max_distance <= result.buckets // 2:
        raise UserError(
            f"config.json: relative_attention_num_buckets={result.buckets} must be 4 or more, and "
            f"relative_attention_max_distance={result.max_distance} more than half of it"
        )
    return result
