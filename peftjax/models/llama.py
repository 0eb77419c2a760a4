"""Llama 1 to 3, and its variations Mistral (sliding window), Qwen2 (q, k, v bias) and Qwen3 (q and k norm).

Touvron et al. 2023 (arXiv:2302.13971), section 2.2; Jiang et al. 2023 (arXiv:2310.06825); Qwen2 (arXiv:2407.10671);
Qwen3 (arXiv:2505.09388).
"""

import dataclasses
import json
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax import sharding
from peftjax.core.paths import suggest
from peftjax.nn.attention import Attention, Cache, attention_mask, extend_valid, key_distances, within_window
from peftjax.nn.embedding import Embedding
from peftjax.nn.feedforward import ACTIVATIONS, GatedFeedForward
from peftjax.nn.linear import Linear
from peftjax.nn.norm import RMSNorm
from peftjax.nn.rope import Rope
from peftjax.nn.rope import from_hf as rope_from_hf
from peftjax.nn.stack import Residual, make_stack, scan_stack


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and options of one model. `windows`: per layer, how far back a query sees (0: everything)."""

    vocab: int
    embed: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    rope: Rope
    norm_eps: float
    activation: str
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]
    init_stddev: float
    dtype: str
    param_dtype: str
    remat: str
    hf: str  # the config.json that this was read from

    def make(self, rngs: nnx.Rngs) -> "Llama":
        """A model with random weights."""
        return Llama(self, rngs)

    def to_hf(self) -> dict[str, Any]:
        """config.json for a directory that transformers loads."""
        fields = json.loads(self.hf)
        fields.pop("torch_dtype", None)
        return fields | {"dtype": self.param_dtype, "tie_word_embeddings": self.tied}


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)). [B, T, D] -> [B, T, D]."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(config.param_dtype)
        self.attention_norm = RMSNorm(config.embed, eps=config.norm_eps, dtype=dtype)
        self.attention = Attention(
            config.embed,
            config.heads,
            config.kv_heads,
            config.head_dim,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
            stddev=config.init_stddev,
            dtype=dtype,
            rngs=rngs,
        )
        self.attention_residual = Residual()
        self.feedforward_norm = RMSNorm(config.embed, eps=config.norm_eps, dtype=dtype)
        self.feedforward = GatedFeedForward(
            config.embed,
            config.mlp,
            activation=ACTIVATIONS[config.activation],
            use_bias=config.mlp_bias,
            stddev=config.init_stddev,
            dtype=dtype,
            rngs=rngs,
        )
        self.feedforward_residual = Residual()

    def __call__(
        self, x: jax.Array, rope: Any, mask: jax.Array | None, cache: Any, offset: jax.Array | int
    ) -> tuple[jax.Array, Any]:
        new_cache = cache

        def attend(x: jax.Array) -> jax.Array:
            nonlocal new_cache
            y, new_cache = self.attention(self.attention_norm(x), rope, mask, cache, offset)
            return y

        x = self.attention_residual(x, attend)
        x = self.feedforward_residual(x, lambda x: self.feedforward(self.feedforward_norm(x)))
        return sharding.constrain(x, "batch", "length", None), new_cache


class Llama(nnx.Module):
    """A decoder. tokens: int [B, T] -> logits [B, T, V] in the computation dtype."""

    hf_modules: ClassVar[dict[str, str]]
    hf_ignored: ClassVar[tuple[str, ...]]
    hf_tied: ClassVar[dict[str, str]]
    output_layers: ClassVar = ("head",)  # what "all-linear" leaves out

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        self.embed = Embedding(
            config.vocab, config.embed, stddev=config.init_stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.blocks = make_stack(lambda rngs: Block(config, rngs), config.layers, rngs)
        self.norm = RMSNorm(config.embed, eps=config.norm_eps, dtype=param_dtype)
        self.head = Linear(
            config.embed,
            config.vocab,
            axes=("embed", "vocab"),
            tied=config.tied,
            stddev=config.init_stddev,
            dtype=param_dtype,
            rngs=rngs,
        )

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
        x = self.embed(tokens)
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
        rope = self.config.rope.tables(positions)
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
            return block(x, rope, limited, layer_cache, offset)

        x = sharding.constrain(x, "batch", "length", None)
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

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The head: [B, T, D] -> [B, T, V]."""
        if self.tied:
            return self.head(hidden, kernel=self.embed.embedding.get_value().T)
        return self.head(hidden)

    @property
    def tied(self) -> bool:
        """Whether the head borrows the embedding's table."""
        return self.head.kernel is None

    def untie(self) -> None:
        """Give the head a kernel of its own, a copy of the embedding's table."""
        self.head.kernel = nnx.data(nnx.Param(jnp.array(self.embed.embedding.get_value().T), axes=self.head.axes))
        self.config = dataclasses.replace(self.config, tied=False)

    def tie(self) -> None:
        """Let the head borrow the embedding's table again."""
        self.head.kernel = nnx.data(None)
        self.config = dataclasses.replace(self.config, tied=True)

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


# --- Hugging Face: what its config.json says, and what it calls our modules ---

Llama.hf_modules = {
    "embed": "model.embed_tokens",
    "blocks.attention_norm": "model.layers.{}.input_layernorm",
    "blocks.attention.query": "model.layers.{}.self_attn.q_proj",
    "blocks.attention.key": "model.layers.{}.self_attn.k_proj",
    "blocks.attention.value": "model.layers.{}.self_attn.v_proj",
    "blocks.attention.out": "model.layers.{}.self_attn.o_proj",
    "blocks.attention.query_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.attention.key_norm": "model.layers.{}.self_attn.k_norm",
    "blocks.attention": "model.layers.{}.self_attn",
    "blocks.feedforward_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.feedforward.gate": "model.layers.{}.mlp.gate_proj",
    "blocks.feedforward.up": "model.layers.{}.mlp.up_proj",
    "blocks.feedforward.down": "model.layers.{}.mlp.down_proj",
    "blocks.attention_residual": "model.layers.{}.attention_adapters",  # where AdapterHub has its adapters
    "blocks.feedforward_residual": "model.layers.{}.output_adapters",
    "norm": "model.norm",
    "head": "lm_head",
}
# Where the embedding is tied, a checkpoint may hold the first name in place of the second, or both.
Llama.hf_tied = {"lm_head.weight": "model.embed_tokens.weight"}
Llama.hf_ignored = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")

# What transformers fills in for a field that config.json leaves out, by model_type.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
# Fields that say nothing about the computation of logits.
_HARMLESS = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "unk_token_id", "pretraining_tp", "_name_or_path", "tokenizer_class",
    "_attn_implementation_autoset", "keys_to_ignore_at_inference", "return_dict", "output_attentions",
    "output_hidden_states", "is_encoder_decoder", "is_decoder", "id2label", "label2id", "problem_type", "torchscript",
    "chunk_size_feed_forward", "max_length", "temperature", "top_k", "top_p", "do_sample", "unsloth_version",
    "unsloth_fixed", "_commit_hash", "peftjax_version",
}  # fmt: skip


def from_hf(
    config: dict[str, Any], *, dtype: str = "float32", param_dtype: str = "", remat: str = "none"
) -> LlamaConfig:
    """Read a config.json of model_type llama, mistral, qwen2 or qwen3, in the spelling of transformers 4 or 5.

    Raises:
        ValueError: a field is missing, unknown, or has a value that this family cannot honour.
    """
    kind = config["model_type"]
    left = _DEFAULTS[kind] | {k: v for k, v in config.items() if v is not None and k not in _HARMLESS}

    def take(name: str, default: Any = None) -> Any:
        value = left.pop(name, default)
        if value is None:
            raise ValueError(f"config.json: field {name!r} is missing.{suggest(name, config)}")
        return value

    layers, heads, embed = take("num_hidden_layers"), take("num_attention_heads"), take("hidden_size")
    kv_heads, max_positions = take("num_key_value_heads", heads), take("max_position_embeddings")
    head_dim = take("head_dim", embed // heads)
    if heads % kv_heads:
        raise ValueError(f"config.json: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}")
    if take("attention_dropout", 0.0) != 0.0:
        raise ValueError("config.json: attention_dropout is not supported; it matters in training only: set it to 0.0")
    attention_bias = take("attention_bias", False) if kind in ("llama", "qwen3") else False
    result = LlamaConfig(
        vocab=take("vocab_size"),
        embed=embed,
        mlp=take("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=max_positions,
        rope=_rope(left, head_dim, max_positions),
        norm_eps=take("rms_norm_eps", 1e-6),
        activation=take("hidden_act", "silu"),
        tied=take("tie_word_embeddings", False),
        qkv_bias=attention_bias or kind == "qwen2",
        out_bias=attention_bias,
        mlp_bias=take("mlp_bias", False) if kind == "llama" else False,
        qk_norm=kind == "qwen3",
        windows=_windows(kind, config, left, layers),
        init_stddev=take("initializer_range", 0.02),
        dtype=dtype,
        param_dtype=param_dtype or dtype,
        remat=remat,
        hf=json.dumps(config),
    )
    if result.activation not in ACTIVATIONS:
        raise ValueError(
            f"config.json: hidden_act {result.activation!r} is not known; supported: {sorted(ACTIVATIONS)}"
        )
    if left:
        raise ValueError(
            f"config.json: {', '.join(sorted(left))}: not known for model_type {kind!r}, so the model might compute "
            "something else; take the field out of config.json if it does not matter"
        )
    return result


def _rope(left: dict[str, Any], head_dim: int, max_positions: int) -> Rope:
    parameters = dict(left.pop("rope_scaling", None) or {}) | dict(left.pop("rope_parameters", None) or {})
    for name in ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor"):
        if (value := left.pop(name, None)) is not None:
            parameters.setdefault(name, value)
    return rope_from_hf(parameters, head_dim=head_dim, max_positions=max_positions)


def _windows(kind: str, config: dict[str, Any], left: dict[str, Any], layers: int) -> tuple[int, ...]:
    """Mistral: every layer; Qwen: the layers from max_window_layers on, if use_sliding_window, or as layer_types says."""
    window = left.pop("sliding_window", 0) or 0
    if kind == "llama":
        if window:
            raise ValueError(
                f"config.json: sliding_window={window} is not a field of model_type 'llama'; mistral has it"
            )
        return (0,) * layers
    if kind == "mistral":
        # null is how a Mistral without a window is written; a config that leaves the field out means 4096
        return (0 if "sliding_window" in config and config["sliding_window"] is None else window,) * layers
    first, used = left.pop("max_window_layers", 28), left.pop("use_sliding_window", False)
    types = left.pop("layer_types", None)
    if types is None:
        types = ["sliding_attention" if used and i >= first else "full_attention" for i in range(layers)]
    if len(types) != layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise ValueError(
            f"config.json: layer_types must name sliding_attention or full_attention for {layers} layers: {types}"
        )
    window = (window or 4096) if used else 0
    if "sliding_attention" in types and not window:
        raise ValueError("config.json: layer_types has sliding_attention, but use_sliding_window is false")
    return tuple(window if name == "sliding_attention" else 0 for name in types)
