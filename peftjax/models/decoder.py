"""What the decoder families share: the path from tokens to logits, the key/value cache and common config.json fields.

A family provides its layers (`make_block`) and overrides the few steps in which it differs: `embedded`,
`with_positions`, `query_factors`, `logits`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax import sharding
from peftjax.models import multimodal
from peftjax.models.base import LanguageModel, LanguageModelConfig, PromptState
from peftjax.models.eager import compiled
from peftjax.nn.attention import Attention
from peftjax.nn.attention_mask import AttentionMask
from peftjax.nn.cache import Cache, LayerCache, extend_valid
from peftjax.nn.feedforward import FeedForward
from peftjax.nn.moe import MixtureOfExperts
from peftjax.nn.norm import LayerNorm, RMSNorm
from peftjax.nn.residual import Residual
from peftjax.nn.rope import Rope, RopeTables
from peftjax.nn.routing import Load
from peftjax.nn.stack import make_stack, scan_stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(LanguageModelConfig):
    """Adds what all decoders share.

    Attributes:
        rope: Rotary embedding; None for a family without one.
        local_rope: Rotary embedding of the layers with a window; None: `rope`.
        rotated: For each layer, whether queries and keys are rotated; empty: in all layers.
        windows: For each layer, how many positions back a query sees; 0: all.
        chunked: Whether `windows` are sizes of chunks. A query sees only the keys of its own chunk.
    """

    rope: Rope | None = None
    local_rope: Rope | None = None
    rotated: tuple[bool, ...] = ()
    windows: tuple[int, ...]
    chunked: bool = False

    def to_hf(self) -> dict[str, Any]:
        changed = {"dtype": self.param_dtype, "tie_word_embeddings": self.tied}
        if self.whole:
            return multimodal.with_text(self.whole, changed | {"vocab_size": self.vocab})
        return super().to_hf() | changed


class LayerOptions(NamedTuple):
    """What differs between layers, as arrays that are scanned with the blocks.

    Attributes:
        window: int32 [], as in `DecoderConfig.windows`.
        rotated: bool [], as in `DecoderConfig.rotated`; None: all layers are.
    """

    window: jax.Array
    rotated: jax.Array | None


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)): [B, T, D] -> [B, T, D].

    Args:
        make_norm: Builds a norm.
        attention: The first sublayer.
        feedforward: The second sublayer. None: `models.moe.MoeLlama.through_layers` sets it for each layer.
        norm_in: Whether the inputs of the sublayers are normalized.
        norm_out: Whether the outputs of the sublayers are normalized before they are added.
        make_residual: Builds a residual connection.
    """

    def __init__(
        self,
        make_norm: Callable[[], RMSNorm | LayerNorm],
        attention: Attention,
        feedforward: FeedForward | MixtureOfExperts | None,
        *,
        norm_in: bool = True,
        norm_out: bool = False,
        make_residual: Callable[[], Residual] = Residual,
    ) -> None:
        self.norm_in, self.norm_out = norm_in, norm_out
        self.attention, self.attention_residual = attention, make_residual()
        self.feedforward: Any = nnx.data(feedforward)
        self.feedforward_residual = make_residual()
        if norm_in:
            self.attention_norm, self.feedforward_norm = make_norm(), make_norm()
        if norm_out:
            self.attention_out_norm, self.feedforward_out_norm = make_norm(), make_norm()

    def __call__(
        self,
        x: jax.Array,
        rope: RopeTables | None,
        mask: AttentionMask | jax.Array | None,
        cache: LayerCache | None,
        offset: jax.Array | int,
        query_factors: jax.Array | None = None,
        rotated: jax.Array | None = None,
        load: Load | None = None,
    ) -> tuple[jax.Array, LayerCache | None, Load | None]:
        """Return the output, the cache, and the load of the experts up to this layer."""
        new_cache = cache

        def attend(x: jax.Array) -> jax.Array:
            nonlocal new_cache
            x = self.attention_norm(x) if self.norm_in else x
            y, new_cache = self.attention(x, rope, mask, cache, offset, query_factors, rotated)
            return self.attention_out_norm(y) if self.norm_out else y

        def transform(x: jax.Array) -> jax.Array:
            nonlocal load
            x = self.feedforward_norm(x) if self.norm_in else x
            if load is not None and isinstance(self.feedforward, MixtureOfExperts):
                y, logits = self.feedforward.with_logits(x)
                load = load.after(logits, self.feedforward.choices)
            else:
                y = self.feedforward(x)
            return self.feedforward_out_norm(y) if self.norm_out else y

        x = self.attention_residual(x, attend)
        x = self.feedforward_residual(x, transform)
        return sharding.constrain(x, "batch", "length", None), new_cache, load


# The carry of the scan over layers: hidden states, the stored keys and values, the sums of `Load`.
State = tuple[jax.Array, tuple[jax.Array, jax.Array] | None, jax.Array | None]
LayerStep = Callable[[Block, State, Any], tuple[State, None]]


class Decoder(LanguageModel):
    """Decoder-only language model: int [B, T] -> logits [B, T, V] in the compute dtype.

    Attributes:
        norm_type: Class of the norms.
        hf_names: The names of our modules in checkpoints. The transformers class has the same names, except in a
            multimodal model.
        hf_prefix: Prefix of all names but the head's; checkpoints saved without the head omit it.
    """

    config: DecoderConfig
    blocks: Block
    chooses_attention: ClassVar[bool] = True
    norm_type: ClassVar[type[RMSNorm | LayerNorm]] = RMSNorm
    hf_prefix: ClassVar[str] = "model."
    hf_names: ClassVar[Mapping[str, str]]
    hf_tied: ClassVar[Mapping[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    hf_ignored: ClassVar[tuple[str, ...]] = ()
    hf_task: ClassVar[str | None] = "CAUSAL_LM"

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = config.make_table(config.vocab, rngs)
        self.blocks = make_stack(self.make_block, config.layers, rngs)
        self.norm = self.make_norm()
        self.head = config.make_head(rngs)

    # --- What a family provides or overrides ---

    def make_block(self, rngs: nnx.Rngs) -> Block:
        """Build one layer."""
        raise NotImplementedError

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """Embed the tokens, int [B, T] -> [B, T, D], before a soft prompt is prepended."""
        return self.embed(tokens)

    def with_positions(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Add learned positions, if the family has them, to x [B, T, D] at positions [B or 1, T]; includes a soft prompt."""
        del positions
        return x

    def query_factors(self, positions: jax.Array) -> Callable[[LayerOptions], jax.Array | None]:
        """Return a function from a layer's options to the factors of its queries at positions [B or 1, T].

        The factors are float32 of the same shape; None: 1.
        """
        del positions
        return lambda layer: None

    def through_layers(self, layer: LayerStep, carry: State, per_layer: Any) -> State:
        """Run all layers, as `scan_stack` does, and return the last carry."""
        return scan_stack(self.blocks, layer, carry, per_layer, self.config.remat)[0]

    # --- The same for all families ---

    def make_norm(self) -> RMSNorm | LayerNorm:
        """Build a norm of the residual stream."""
        return self.norm_type(self.config.embed, eps=self.config.norm_eps, dtype=jnp.dtype(self.config.param_dtype))

    def rotations(self, positions: jax.Array) -> Callable[[LayerOptions], RopeTables | None]:
        """Return a function from a layer's options to its rotary tables for positions [B or 1, T]."""
        config = self.config
        if config.rope is None:
            return lambda layer: None
        tables = config.rope.tables(positions)
        local = None if config.local_rope is None else config.local_rope.tables(positions)

        def of_layer(layer: LayerOptions) -> RopeTables:
            cos, sin = tables
            if local is not None:
                cos, sin = (jnp.where(layer.window == 0, *both) for both in zip(tables, local, strict=True))
            if layer.rotated is not None:
                cos, sin = jnp.where(layer.rotated, cos, 1.0), jnp.where(layer.rotated, sin, 0.0)
            return cos, sin

        return of_layer

    @property
    def hf_modules(self) -> Mapping[str, str]:
        if not self.hf_part:
            return self.hf_names
        return {path: multimodal.class_name(self.config.whole, name) for path, name in self.hf_names.items()}

    @property
    def hf_renamed(self) -> Mapping[str, str]:
        return self.hf_names if self.hf_part else {}

    @compiled
    def __call__(
        self,
        tokens: jax.Array,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Return logits [B, T, V], or with `cache` a pair of logits and the cache extended by T tokens.

        Takes the arguments of `hidden`.
        """
        hidden, cache = self.hidden(tokens, mask=mask, positions=positions, segments=segments, cache=cache)
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
        """Return the hidden states after the last norm.

        An active soft prompt or prefix comes before every document. Its positions are not counted in the arguments, and
        its hidden states are not returned.

        Args:
            tokens: int [B, T].
            mask: bool [B, T], true for real tokens; default: all.
            positions: int [B, T]; default: counted from the first token (of the cache, if given).
            segments: int [B, T], document index; tokens attend only within their own document.
            cache: From `make_cache` or an earlier call.

        Returns:
            Hidden states [B, T, D], and the cache extended by T tokens, or None.
        """
        return self._hidden(tokens, mask, positions, segments, cache)[:2]

    def _hidden(
        self,
        tokens: jax.Array,
        mask: jax.Array | None,
        positions: jax.Array | None,
        segments: jax.Array | None,
        cache: Cache | None,
        load: Load | None = None,
    ) -> tuple[jax.Array, Cache | None, Load | None]:
        """Return what `hidden` does, and, if an empty load is given, the load of all layers, which counts a soft prompt too."""
        soft, virtual = self.embed.adapters.virtual, self.virtual
        x = self.embedded(tokens)
        if positions is None:
            start = 0 if cache is None else cache.length - soft
            positions = start + jnp.arange(tokens.shape[1])[None]  # [1, T]
        positions = positions + virtual
        if cache is not None or not soft:
            return self._through_blocks(x, positions, mask, segments, cache, load)
        x = jnp.concatenate([self.embed.prompt(len(x)), x], axis=1)
        before = jnp.broadcast_to(virtual - soft + jnp.arange(soft)[None], (len(positions), soft))
        positions = jnp.concatenate([before, positions], axis=1)
        mask, segments, counted = (
            None if array is None else jnp.pad(array, ((0, 0), (soft, 0)), constant_values=value)
            for array, value in ((mask, True), (segments, -1), (None if load is None else load.counted, True))
        )
        if load is not None and counted is not None:
            load = load._replace(counted=counted)
        x, _, load = self._through_blocks(x, positions, mask, segments, None, load)
        return x[:, soft:], None, load

    def _through_blocks(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array | None,
        segments: jax.Array | None,
        cache: Cache | None,
        load: Load | None = None,
    ) -> tuple[jax.Array, Cache | None, Load | None]:
        """`_hidden` for embedded tokens [B, T, D]. A soft prompt is among them, or in the cache."""
        length = x.shape[1]
        offset = 0 if cache is None else cache.length
        rotations, query_factors = self.rotations(positions), self.query_factors(positions)
        valid = None
        if mask is not None or cache is not None:
            valid = extend_valid(cache, jnp.ones(x.shape[:2], bool) if mask is None else mask.astype(bool))
        described = self.attention_mask(length, positions=positions, valid=valid, segments=segments, offset=offset)
        allowed = described.dense() if cache is not None else self.blocks.attention.prepared(described, x)

        def layer(block: Block, carry: State, inputs: tuple[jax.Array | None, LayerOptions]) -> tuple[State, None]:
            (x, stored, sums), (index, options) = carry, inputs
            own = None if stored is None or index is None else LayerCache(*stored, index)
            mask = allowed.of_layer(options.window)
            before = None if load is None or sums is None else load._replace(sums=sums)
            factors = query_factors(options)
            x, own, after = block(x, rotations(options), mask, own, offset, factors, options.rotated, before)
            return (x, None if own is None else (own.key, own.value), None if after is None else after.sums), None

        x = sharding.constrain(self.with_positions(x, positions), "batch", "length", None)
        options = LayerOptions(
            jnp.asarray(self.config.windows, jnp.int32),
            jnp.asarray(self.config.rotated) if self.config.rotated else None,
        )
        stored = None if cache is None else (cache.key, cache.value)
        index = None if cache is None else jnp.arange(self.config.layers)
        state = (x, stored, None if load is None else load.sums)
        x, stored, sums = self.through_layers(layer, state, (index, options))
        load = None if load is None or sums is None else load._replace(sums=sums)
        if cache is None or valid is None or stored is None:
            return self.norm(x), None, load
        extended = Cache(key=stored[0], value=stored[1], valid=valid, length=cache.length + length)
        return self.norm(x), extended, load

    def attention_mask(
        self,
        length: int,
        *,
        positions: jax.Array,
        valid: jax.Array | None = None,
        segments: jax.Array | None = None,
        offset: jax.Array | int = 0,
    ) -> AttentionMask:
        """Describe the attention of `length` queries; a soft prompt is among them, or among the keys of a cache.

        Args:
            length: Number of queries, T.
            positions: int [B or 1, T], of the queries.
            valid: bool [B, S], false for keys that are padding.
            segments: int [B, T], document index.
            offset: Number of keys in the cache.
        """
        soft, windows, chunked = self.embed.adapters.virtual, self.config.windows, self.config.chunked
        if chunked and (length if valid is None else valid.shape[1]) + self.virtual - soft <= max(windows):
            windows, chunked = (), False  # all keys are in the first chunk
        return AttentionMask(
            length=length,
            positions=positions - self.virtual + soft,  # from the soft prompt's first key
            valid=valid,
            segments=segments,
            offset=offset,
            shared=soft,
            prefix=self.virtual - soft,
            windows=tuple(sorted(set(windows))) if any(windows) else (),
            chunked=chunked,
        )

    @property
    def virtual(self) -> int:
        return self.embed.adapters.virtual + self.blocks.attention.adapters.virtual

    def read_prompts(self, tokens: jax.Array, mask: jax.Array, new: int) -> PromptState:
        return read_prompts(self, tokens, mask, new)

    def hf_stored(self, name: str) -> str:
        """Return our name for a checkpoint tensor; a checkpoint saved without the head lacks `hf_prefix`."""
        complete = (self.hf_prefix, f"{self.hf_names['head']}.")
        return name if name.startswith(complete) else self.hf_prefix + name

    def make_cache(self, batch: int, length: int) -> Cache:
        """Make a cache in the compute dtype for `length` tokens in each of `batch` rows.

        An active soft prompt is in it already.
        """
        config, soft = self.config, self.embed.adapters.virtual
        length += soft
        shape = (config.layers, batch, length, config.kv_heads, config.head_dim)
        empty = jnp.zeros(shape, config.dtype)
        cache = Cache(key=empty, value=empty, valid=jnp.zeros((batch, length), bool), length=jnp.zeros((), jnp.int32))
        if not soft:
            return cache
        positions = self.virtual - soft + jnp.arange(soft)[None]
        _, filled, _ = self._through_blocks(self.embed.prompt(batch), positions, None, None, cache)
        assert filled is not None
        return filled


class Cached(Protocol):
    """A decoder, or several that read one batch (`peftjax.rows`)."""

    def make_cache(self, batch: int, length: int) -> Cache:
        """A cache for `length` tokens in each of `batch` rows."""

    def hidden(
        self, tokens: jax.Array, *, cache: Cache, mask: jax.Array | None = None, positions: jax.Array | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """As `Decoder.hidden`."""


def read_prompts(model: Cached, tokens: jax.Array, mask: jax.Array, new: int) -> PromptState:
    """`LanguageModel.read_prompts` of a decoder."""
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    cache = model.make_cache(len(tokens), tokens.shape[1] + new)
    hidden, filled = model.hidden(tokens, mask=mask, positions=positions, cache=cache)

    def read(token: jax.Array, index: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        return model.hidden(token, positions=positions[:, -1:] + 1 + index, cache=cache)

    return hidden, filled, read
