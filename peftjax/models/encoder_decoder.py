"""What encoder-decoders share: the configuration, the cache, and the interface that generation and the methods use."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from peftjax.models.base import LanguageModel, LanguageModelConfig, PromptState
from peftjax.models.eager import compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(LanguageModelConfig):
    """Adds what all encoder-decoders share.

    Attributes:
        decoder_layers: Number of blocks of the decoder.
        start: Token id that every target begins with.
    """

    decoder_layers: int
    start: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderCache:
    """Keys and values of the target tokens so far, and of the encoder's hidden states for cross-attention.

    Attributes:
        key: [L, B, S, N, H], of which `length` positions are in use.
        value: As `key`.
        length: int32 [].
        memory_key: [L, B, M, N, H].
        memory_value: As `memory_key`.
        memory_mask: bool [B, M], true for real tokens.
    """

    key: jax.Array
    value: jax.Array
    length: jax.Array
    memory_key: jax.Array
    memory_value: jax.Array
    memory_mask: jax.Array


class EncoderDecoder(LanguageModel):
    """A model that encodes one sequence and decodes another.

    Attributes:
        prefix_layers: Paths of the attention layers in which Hugging Face PEFT puts a prefix.
    """

    config: EncoderDecoderConfig
    prefix_layers: ClassVar[tuple[str, ...]]
    mixes_adapters: ClassVar[bool] = False
    hf_task: ClassVar[str | None] = "SEQ_2_SEQ_LM"

    @compiled
    def __call__(self, tokens: jax.Array, *, mask: jax.Array | None = None, decoder_tokens: jax.Array) -> jax.Array:
        """Return logits [B, T, V]. Takes the arguments of `hidden`."""
        return self.logits(self.hidden(tokens, mask=mask, decoder_tokens=decoder_tokens))

    def hidden(self, tokens: jax.Array, *, mask: jax.Array | None = None, decoder_tokens: jax.Array) -> jax.Array:
        """Return the decoder's hidden states after the last norm, [B, T, D].

        Args:
            tokens: int [B, S].
            mask: bool [B, S], true for real tokens; default: all.
            decoder_tokens: int [B, T], the target from its start token on. Its padding is on the right, where no real
                token attends to it.
        """
        raise NotImplementedError

    def make_cache(self, tokens: jax.Array, mask: jax.Array, length: int) -> DecoderCache:
        """Encode tokens, int [B, S], and make a cache for targets of `length` tokens, in the compute dtype."""
        raise NotImplementedError

    def read_prompts(self, tokens: jax.Array, mask: jax.Array, new: int) -> PromptState:
        order = jnp.argsort(~mask, axis=1, stable=True)  # padding goes right, so that a soft prompt is next to its text
        tokens, mask = (jnp.take_along_axis(array, order, axis=1) for array in (tokens, mask))
        cache = self.make_cache(tokens, mask, new + 1)
        start = jnp.full((len(tokens), 1), self.config.start, jnp.int32)
        return *self.decode(start, cache), lambda token, index, cache: self.decode(token, cache)

    def decode(self, decoder_tokens: jax.Array, cache: DecoderCache) -> tuple[jax.Array, DecoderCache]:
        """Return the hidden states of the next T target tokens, [B, T, D], and the cache extended by them."""
        raise NotImplementedError
