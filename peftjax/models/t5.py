"""T5, v1.0 and v1.1, and mT5: an encoder-decoder with relative positions (Raffel et al. 2020, arXiv:1910.10683).

v1.0: feed-forward with ReLU, the head tied to the embedding and its input scaled by 1/sqrt(D). v1.1 and mT5 (Xue et al.
2021, arXiv:2010.11934): gated GELU, a head of its own, no scaling.
"""

import dataclasses
import json
import math
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax import sharding
from peftjax.models.fields import Fields
from peftjax.models.tied import TiedHead
from peftjax.nn.dropout import Dropout
from peftjax.nn.embedding import Embedding
from peftjax.nn.feedforward import ACTIVATIONS, FeedForward, GatedFeedForward
from peftjax.nn.linear import Linear
from peftjax.nn.norm import RMSNorm
from peftjax.nn.slot import Slot
from peftjax.nn.stack import Residual, make_stack, scan_stack


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and options of one model. scaled: the head reads h / sqrt(D); start: the token that every target begins with.

    dropout: the rate in training, of the embedded tokens, attention's probabilities, every sublayer's output, the middle of
    feed-forward and the last states. init_factor: times the standard deviations that the random weights begin with.
    """

    vocab: int
    embed: int
    mlp: int
    layers: int  # of the encoder
    decoder_layers: int
    heads: int
    head_dim: int
    buckets: int
    max_distance: int
    norm_eps: float
    activation: str
    gated: bool
    tied: bool
    scaled: bool
    dropout: float
    init_factor: float
    start: int
    dtype: str
    param_dtype: str
    remat: str
    hf: str  # the config.json that this was read from

    max_positions: ClassVar[int] = 2**31 - 1  # relative positions have no end
    # transformers ties the one to the other unless a checkpoint has both and they differ, whatever config.json says
    tied_if_equal: ClassVar = ("lm_head.weight", "shared.weight")

    @property
    def kv_heads(self) -> int:
        return self.heads

    def make(self, rngs: nnx.Rngs) -> "T5":
        """A model with random weights."""
        return (GatedT5 if self.gated else T5)(self, rngs)

    def to_hf(self) -> dict[str, Any]:
        """config.json for a directory that transformers loads."""
        fields = json.loads(self.hf)
        fields.pop("torch_dtype", None)
        if fields["model_type"] == "mt5":
            heads = {"tie_word_embeddings": self.tied}
        else:  # transformers 4 has the first field for both, and 5 for the scaling where the second is not there
            heads = {"tie_word_embeddings": self.scaled, "scale_decoder_outputs": self.scaled}
        return fields | heads | {"dtype": self.param_dtype}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "value", "length", "memory_key", "memory_value", "memory_mask"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class DecoderCache:
    """Keys and values of the target's tokens so far, and those that cross-attention has of the encoder's states.

    key, value: [L, B, S, N, H], `length` slots of them in use (int32 []); memory_key, memory_value: [L, B, M, N, H];
    memory_mask: bool [B, M], true for real tokens.
    """

    key: jax.Array
    value: jax.Array
    length: jax.Array
    memory_key: jax.Array
    memory_value: jax.Array
    memory_mask: jax.Array


def buckets_of_distances(buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each distance from 0 to max_distance, which stands for all beyond: int32 [max_distance + 1].

    With e = buckets / 2: d itself below e; from there e + floor(log(d / e) / log(max_distance / e) * (buckets - e)), at
    most buckets - 1 (section 2.1). In float32, the rounding of which decides at the powers of two.
    """
    exact, distance = buckets // 2, np.arange(max_distance + 1)
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / exact) / np.float32(math.log(max_distance / exact))
    far = exact + (ratio * (buckets - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(far, buckets - 1)).astype(np.int32)


class RelativeBias(nnx.Module):
    """What is added to the score of a query for a key as far away. embedding: [buckets, N].

    With `both_sides` half of the buckets are for keys that come later; without, those have the bucket of distance 0.
    """

    hf_leaves: ClassVar = {"embedding": ("weight", None)}

    def __init__(self, config: T5Config, *, both_sides: bool, rngs: nnx.Rngs) -> None:
        self.both_sides, self.max_distance, self.buckets = both_sides, config.max_distance, config.buckets
        value = jax.random.normal(rngs.params(), (config.buckets, config.heads), jnp.float32)
        value = config.init_factor * config.embed**-0.5 * value
        self.embedding = nnx.Param(value.astype(config.param_dtype), axes=(None, "heads"))

    def __call__(self, queries: jax.Array, keys: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Positions of queries, int [T], and of keys, int [S] -> [1, N, T, S]."""
        later = keys[None, :] - queries[:, None]  # [T, S]
        one_side = self.buckets // 2 if self.both_sides else self.buckets
        distance = jnp.abs(later) if self.both_sides else jnp.maximum(-later, 0)
        table = jnp.asarray(buckets_of_distances(one_side, self.max_distance))
        bucket = table[jnp.minimum(distance, self.max_distance)]
        if self.both_sides:
            bucket = bucket + jnp.where(later > 0, one_side, 0)
        return jnp.moveaxis(self.embedding.get_value().astype(dtype)[bucket], -1, 0)[None]


class T5Attention(nnx.Module):
    """softmax(q k^T + bias) v W_out, of states among themselves or of a decoder's to an encoder's.

    No 1/sqrt(H): it is in the standard deviation that the queries' kernel begins with. Kernels are two-dimensional,
    heads flattened into one axis. The slot wraps the core (q, k, v, mask, bias) -> [B, T, N, H]: prefix tuning sits
    there.
    """

    def __init__(self, config: T5Config, rngs: nnx.Rngs) -> None:
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        features, inner = config.embed, config.heads * config.head_dim

        def linear(inputs: int, outputs: int, axes: tuple[str, str], variance: float) -> Linear:
            stddev = config.init_factor * variance**0.5
            return Linear(inputs, outputs, axes=axes, stddev=stddev, dtype=jnp.dtype(config.param_dtype), rngs=rngs)

        self.query = linear(features, inner, ("embed", "heads"), 1 / (features * config.head_dim))
        self.key = linear(features, inner, ("embed", "kv_heads"), 1 / features)
        self.value = linear(features, inner, ("embed", "kv_heads"), 1 / features)
        self.out = linear(inner, features, ("heads", "embed"), 1 / inner)
        self.dropout = Dropout(config.dropout)
        self.adapters = Slot()

    def keys_values(self, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What is attended to: [B, S, D] -> keys and values, [B, S, N, H] each."""
        k, v = self._heads(self.key(states)), self._heads(self.value(states))
        return sharding.whole_length(k), sharding.whole_length(v)

    def __call__(
        self, x: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, bias: jax.Array | None
    ) -> jax.Array:
        """x [B, T, D] -> [B, T, D]; mask: bool [B or 1, 1, T or 1, S], None: every key; bias: [1, N, T, S]."""
        attended = self.adapters(self, self.core, self._heads(self.query(x)), k, v, mask, bias)
        return self.out(attended.reshape(*x.shape[:2], -1))

    def core(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, bias: jax.Array | None
    ) -> jax.Array:
        """The base computation: q [B, T, N, H], k and v [B, S, N, H] -> [B, T, N, H]."""
        if self.dropout.idle:
            return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=1.0)
        scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
        scores = scores if bias is None else scores + jnp.broadcast_to(bias, scores.shape)
        scores = scores if mask is None else jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        return jnp.einsum("bnts,bsnh->btnh", self.dropout(jax.nn.softmax(scores)).astype(v.dtype), v)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.heads, self.head_dim)


class EncoderBlock(nnx.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)). [B, T, D] -> [B, T, D]."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(config.param_dtype)
        norm = partial(RMSNorm, config.embed, eps=config.norm_eps, dtype=dtype)
        self.attention_norm = norm()
        self.attention = T5Attention(config, rngs)
        self.attention_residual, self.attention_dropout = Residual(), Dropout(config.dropout)
        self.feedforward_norm = norm()
        self.feedforward = (GatedFeedForward if config.gated else FeedForward)(
            config.embed,
            config.mlp,
            activation=ACTIVATIONS[config.activation],
            use_bias=False,
            stddev=config.init_factor * config.embed**-0.5,
            dropout=config.dropout,
            dtype=dtype,
            rngs=rngs,
        )
        self.feedforward_residual, self.feedforward_dropout = Residual(), Dropout(config.dropout)

    def __call__(self, x: jax.Array, mask: jax.Array | None, bias: jax.Array) -> jax.Array:
        def attend(x: jax.Array) -> jax.Array:
            x = self.attention_norm(x)
            return self.attention_dropout(self.attention(x, *self.attention.keys_values(x), mask, bias))

        x = self.attention_residual(x, attend)
        return self.feed_forward(x)

    def feed_forward(self, x: jax.Array) -> jax.Array:
        """The second half."""
        x = self.feedforward_residual(x, lambda x: self.feedforward_dropout(self.feedforward(self.feedforward_norm(x))))
        return sharding.constrain(x, "batch", "length", None)


class DecoderBlock(EncoderBlock):
    """An encoder's block with x + cross(norm(x), memory) in its middle."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs)
        self.cross_norm = RMSNorm(config.embed, eps=config.norm_eps, dtype=jnp.dtype(config.param_dtype))
        self.cross, self.cross_dropout = T5Attention(config, rngs), Dropout(config.dropout)

    def __call__(  # type: ignore[override]
        self,
        x: jax.Array,
        mask: jax.Array,
        bias: jax.Array,
        memory: tuple[jax.Array, jax.Array],
        memory_mask: jax.Array | None,
        cache: tuple[jax.Array, jax.Array] | None,
        offset: jax.Array | int,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """memory: keys and values of the encoder's states, of `cross`; cache: this layer's, [B, S, N, H] each."""
        new_cache = cache

        def attend(x: jax.Array) -> jax.Array:
            nonlocal new_cache
            x = self.attention_norm(x)
            k, v = self.attention.keys_values(x)
            if cache is not None:
                k = jax.lax.dynamic_update_slice(cache[0], k.astype(cache[0].dtype), (0, offset, 0, 0))
                v = jax.lax.dynamic_update_slice(cache[1], v.astype(cache[1].dtype), (0, offset, 0, 0))
                new_cache = (k, v)
            return self.attention_dropout(self.attention(x, k, v, mask, bias))

        x = self.attention_residual(x, attend)
        x = x + self.cross_dropout(self.cross(self.cross_norm(x), *memory, memory_mask, None))
        return self.feed_forward(x), new_cache


class T5(TiedHead):
    """An encoder-decoder. tokens: int [B, S], decoder_tokens: int [B, T] -> logits [B, T, V] in the computation dtype."""

    hf_modules: ClassVar[dict[str, str]]
    hf_ignored: ClassVar[tuple[str, ...]]
    hf_tied: ClassVar[dict[str, str]]
    hf_task: ClassVar = "SEQ_2_SEQ_LM"
    output_layers: ClassVar = ("head",)  # what "all-linear" leaves out
    prefix_layers: ClassVar = ("decoder.attention",)  # where peft puts a prefix: not in the encoder nor in `cross`

    def __init__(self, config: T5Config, rngs: nnx.Rngs) -> None:
        self.config = config
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        norm = partial(RMSNorm, config.embed, eps=config.norm_eps, dtype=param_dtype)
        self.embed = Embedding(
            config.vocab, config.embed, stddev=config.init_factor, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.encoder_bias = RelativeBias(config, both_sides=True, rngs=rngs)
        self.encoder = make_stack(lambda rngs: EncoderBlock(config, rngs), config.layers, rngs)
        self.encoder_norm = norm()
        self.encoder_dropouts = nnx.data([Dropout(config.dropout) for _ in ("embedded", "last")])
        self.decoder_bias = RelativeBias(config, both_sides=False, rngs=rngs)
        self.decoder = make_stack(lambda rngs: DecoderBlock(config, rngs), config.decoder_layers, rngs)
        self.decoder_norm = norm()
        self.decoder_dropouts = nnx.data([Dropout(config.dropout) for _ in ("embedded", "last")])
        self.head = Linear(
            config.embed,
            config.vocab,
            axes=("embed", "vocab"),
            tied=config.tied,
            stddev=config.init_factor,
            dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, tokens: jax.Array, *, mask: jax.Array | None = None, decoder_tokens: jax.Array) -> jax.Array:
        """Logits [B, T, V]. mask: bool [B, S], true for real tokens; decoder_tokens: the target, from its start token
        on. Padding of the target stands on its right, where no token sees it."""
        return self.logits(self.hidden(tokens, mask=mask, decoder_tokens=decoder_tokens))

    def hidden(self, tokens: jax.Array, *, mask: jax.Array | None = None, decoder_tokens: jax.Array) -> jax.Array:
        """The decoder's states after the last norm, [B, T, D]; inputs as for a call."""
        states, mask = self.encode(tokens, mask=mask)
        return self._decode(decoder_tokens, states, mask, None)[0]

    def encode(self, tokens: jax.Array, *, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
        """The encoder's states after its norm, [B, P + S, D], those of an active soft prompt first, and the mask of
        them, [B, P + S]."""
        x = self.embed(tokens)
        if soft := self.embed.adapters.virtual:
            prompt = self.embed.prompt()
            x = jnp.concatenate([jnp.broadcast_to(prompt[None], (len(x), *prompt.shape)), x], axis=1)
            mask = None if mask is None else jnp.pad(mask, ((0, 0), (soft, 0)), constant_values=True)
        places = jnp.arange(x.shape[1])
        bias = self.encoder_bias(places, places, x.dtype)

        def layer(block: EncoderBlock, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return block(x, _over_keys(mask), bias), None

        embedded, last = self.encoder_dropouts
        x = sharding.constrain(embedded(x), "batch", "length", None)
        x, _ = scan_stack(self.encoder, layer, x, None, self.config.remat)
        return last(self.encoder_norm(x)), mask

    def decode(self, decoder_tokens: jax.Array, cache: DecoderCache) -> tuple[jax.Array, DecoderCache]:
        """The states of the next T tokens of the target, [B, T, D], and the cache with them in it."""
        hidden, new = self._decode(decoder_tokens, None, cache.memory_mask, cache)
        assert new is not None
        return hidden, new

    def make_cache(self, tokens: jax.Array, mask: jax.Array, length: int) -> DecoderCache:
        """Encodes tokens, int [B, S], and makes a cache for targets of `length` tokens, in the computation dtype."""
        config = self.config
        states, memory_mask = self.encode(tokens, mask=mask)
        assert memory_mask is not None

        def layer(block: DecoderBlock, states: jax.Array, _: None) -> tuple[jax.Array, Any]:
            return states, block.cross.keys_values(states)

        _, (key, value) = scan_stack(self.decoder, layer, states, None, config.remat)
        empty = jnp.zeros((config.decoder_layers, len(tokens), length, config.heads, config.head_dim), config.dtype)
        return DecoderCache(empty, empty, jnp.zeros((), jnp.int32), key, value, memory_mask)

    def _decode(
        self, tokens: jax.Array, states: Any, memory_mask: jax.Array | None, cache: DecoderCache | None
    ) -> tuple[jax.Array, DecoderCache | None]:
        """Either from the encoder's states, or from a cache that has their keys and values."""
        length = tokens.shape[1]
        offset, slots = (0, length) if cache is None else (cache.length, cache.key.shape[2])
        prefix = self.decoder.attention.adapters.virtual  # its keys come before slot 0
        queries = offset + jnp.arange(length)
        mask = (jnp.arange(slots)[None] <= queries[:, None])[None, None]  # [1, 1, T, S]
        x = self.embed(tokens)
        bias = self.decoder_bias(prefix + queries, jnp.arange(prefix + slots), x.dtype)

        def layer(block: DecoderBlock, x: jax.Array, cached: Any) -> tuple[jax.Array, Any]:
            own, memory = cached or (None, block.cross.keys_values(states))
            return block(x, mask, bias, memory, _over_keys(memory_mask), own, offset)

        embedded, last = self.decoder_dropouts
        x = sharding.constrain(embedded(x), "batch", "length", None)
        per_layer = None if cache is None else ((cache.key, cache.value), (cache.memory_key, cache.memory_value))
        x, new = scan_stack(self.decoder, layer, x, per_layer, self.config.remat)
        if cache is not None:
            cache = dataclasses.replace(cache, key=new[0], value=new[1], length=cache.length + length)
        return last(self.decoder_norm(x)), cache

    @property
    def virtual(self) -> int:
        """How many positions a soft prompt takes before the encoder's first token, and a prefix before the decoder's."""
        return self.embed.adapters.virtual + self.decoder.attention.adapters.virtual

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The head: [B, T, D] -> [B, T, V]."""
        if self.config.scaled:
            hidden = hidden * self.config.embed**-0.5
        if self.tied:
            return self.head(hidden, kernel=self.embed.embedding.get_value().T)
        return self.head(hidden)


class GatedT5(T5):
    """T5 v1.1: its feed-forward layers have two kernels that read x, and other names in Hugging Face."""


def _over_keys(mask: jax.Array | None) -> jax.Array | None:
    """A mask of keys, [B, S], for all heads and queries: [B, 1, 1, S]."""
    return None if mask is None else mask[:, None, None, :]


# --- Hugging Face: what its config.json says, and what it calls our modules ---


def _names(feedforward: dict[str, str]) -> dict[str, str]:
    projections = {"query": "q", "key": "k", "value": "v", "out": "o"}
    names = {"embed": "shared", "head": "lm_head"}
    for stack, last in (("encoder", 1), ("decoder", 2)):  # `last`: the sublayer that is feed-forward
        block = f"{stack}.block.{{}}.layer"
        parts = {
            "attention_norm": "0.layer_norm",
            "attention": "0.SelfAttention",
            "attention_residual": "0",  # where AdapterHub has its adapters
            "feedforward_norm": f"{last}.layer_norm",
            "feedforward_residual": f"{last}",
        }
        parts |= {f"attention.{ours}": f"0.SelfAttention.{theirs}" for ours, theirs in projections.items()}
        parts |= {f"feedforward.{ours}": f"{last}.DenseReluDense.{theirs}" for ours, theirs in feedforward.items()}
        if stack == "decoder":
            parts |= {"cross_norm": "1.layer_norm", "cross": "1.EncDecAttention"}
            parts |= {f"cross.{ours}": f"1.EncDecAttention.{theirs}" for ours, theirs in projections.items()}
        names |= {f"{stack}.{ours}": f"{block}.{theirs}" for ours, theirs in parts.items()}
        # Block 0 has the table of all blocks.
        names[f"{stack}_bias"] = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
        names[f"{stack}_norm"] = f"{stack}.final_layer_norm"
    return names


T5.hf_modules = _names({"up": "wi", "down": "wo"})
GatedT5.hf_modules = _names({"gate": "wi_0", "up": "wi_1", "down": "wo"})
# Each of them may be stored beside `shared` or in its place; the head only where it is tied.
T5.hf_tied = {
    "lm_head.weight": "shared.weight",
    "encoder.embed_tokens.weight": "shared.weight",
    "decoder.embed_tokens.weight": "shared.weight",
}
# In old checkpoints; nothing reads it.
T5.hf_ignored = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)

# What transformers fills in for a field that config.json leaves out, by model_type.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "t5": {
        "vocab_size": 32128, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "feed_forward_proj": "relu",
    },
    "mt5": {
        "vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu",
    },
}  # fmt: skip
# Fields that say nothing about the computation of logits.
_HARMLESS = frozenset({
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id",
    "eos_token_id", "unk_token_id", "_name_or_path", "tokenizer_class", "_attn_implementation_autoset",
    "keys_to_ignore_at_inference", "return_dict", "output_attentions", "output_hidden_states", "id2label", "label2id",
    "problem_type", "torchscript", "chunk_size_feed_forward", "max_length", "temperature", "top_k", "top_p",
    "do_sample", "_commit_hash", "peftjax_version", "task_specific_params", "n_positions", "output_past",
    "classifier_dropout", "gradient_checkpointing",
})  # fmt: skip


def from_hf(config: dict[str, Any], *, dtype: str = "float32", param_dtype: str = "", remat: str = "none") -> T5Config:
    """Read a config.json of model_type t5 or mt5, in the spelling of transformers 4 or 5.

    Raises:
        ValueError: a field is unknown, or has a value that this family cannot honour.
    """
    kind = config["model_type"]
    fields = Fields(config, defaults=_DEFAULTS[kind], harmless=_HARMLESS)
    take = fields.take
    if not take("is_encoder_decoder", True) or take("is_decoder", False):
        raise ValueError("config.json: is_encoder_decoder=false or is_decoder=true, half a T5, is not supported")
    layers = take("num_layers")
    projection = take("feed_forward_proj")
    gated, activation = projection.startswith("gated-"), projection.removeprefix("gated-")
    activation = "gelu_new" if projection == "gated-gelu" else activation
    said = (take("is_gated_act", gated), take("dense_act_fn", activation))
    if said != (gated, activation):
        raise ValueError(
            f"config.json: is_gated_act={said[0]} and dense_act_fn={said[1]!r} are not those of feed_forward_proj="
            f"{projection!r}; take both out"
        )
    tied = take("tie_word_embeddings", True)
    scaled = take("scale_decoder_outputs", tied)
    pad = take("pad_token_id", 0)
    result = T5Config(
        vocab=take("vocab_size"),
        embed=take("d_model", 512),
        mlp=take("d_ff"),
        layers=layers,
        decoder_layers=take("num_decoder_layers", layers),
        heads=take("num_heads"),
        head_dim=take("d_kv", 64),
        buckets=take("relative_attention_num_buckets", 32),
        max_distance=take("relative_attention_max_distance", 128),
        norm_eps=take("layer_norm_epsilon", 1e-6),
        activation=activation,
        gated=gated,
        tied=tied and scaled,
        scaled=scaled and kind == "t5",
        dropout=take("dropout_rate", 0.1),
        init_factor=take("initializer_factor", 1.0),
        start=take("decoder_start_token_id", pad),
        dtype=dtype,
        param_dtype=param_dtype or dtype,
        remat=remat,
        hf=json.dumps(config),
    )
    if result.activation not in ACTIVATIONS:
        raise ValueError(
            f"config.json: feed_forward_proj {projection!r} is not known; supported, also after 'gated-': "
            f"{sorted(ACTIVATIONS)}"
        )
    if result.buckets < 4 or result.max_distance <= result.buckets // 2:
        raise ValueError(
            f"config.json: relative_attention_num_buckets={result.buckets} must be 4 or more, and "
            f"relative_attention_max_distance={result.max_distance} more than half of it"
        )
    fields.done()
    return result
