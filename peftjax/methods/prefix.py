"""Prefix tuning: softmax(q [P_k; k]^T) [P_v; v], with P trained keys and values before the text's in every layer.

Li and Liang 2021 (arXiv:2101.00190), section 4. As in peft, the prefix's keys are not rotated and the text starts at
position P. A sliding window counts them too: query t sees key p of the prefix while P + t - p is below the window.

In an encoder-decoder, as in peft, only the decoder's self-attention has a prefix, and layer i of L reads keys and values
number 2i mod L: with an even L, two layers share each one that is read, and the others are unused.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, MethodAdapter
from peftjax.adapters.options import one_of
from peftjax.adapters.sites import insert, sites
from peftjax.adapters.soft_prompt import Dense, SoftPrompt, uniform
from peftjax.core.errors import UserError
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.models.encoder_decoder import EncoderDecoder
from peftjax.nn.attention import Attention
from peftjax.nn.attention_mask import AttentionMask
from peftjax.nn.slot import Base


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuning(SoftPrompt):
    """Options of prefix tuning.

    Attributes:
        init (str, default "random"): "random" (normal, standard deviation 1) or "zero".
        projection (bool, default False): Compute the prefix from smaller vectors by two Linear layers with tanh in
            between (section 4.3 of the paper), which makes training more stable. The adapter file holds only the result, so
            an adapter from a file has no projection.
        hidden (int, default 0): Width between the two layers; 0 is the width of a layer's keys.
    """

    init: str = "random"
    projection: bool = False
    hidden: int = 0

    method: ClassVar[str] = "prefix"
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    hf_ignored: ClassVar = SoftPrompt.hf_ignored | {"encoder_hidden_size", "num_transformer_submodules"}
    hf_training: ClassVar = {"prefix_projection": False, "init_weights": True}
    traced_options: ClassVar = SoftPrompt.traced_options | {"init"}

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(("random", "zero"), init=self.init)
        if not isinstance(self.hidden, int) or self.hidden < 0:
            raise UserError(f"method.hidden must be 0 (the width of the keys) or a positive integer, got {self.hidden}")
        if self.hidden and not self.projection:
            raise UserError(f"method.hidden={self.hidden} needs method.projection=True")

    def attach(self, model: nnx.Module, name: str, rngs: nnx.Rngs) -> None:
        self.site(model)  # checks the number of tokens
        paired = _encoder_decoder(model)
        found = [
            site
            for site in sites(model)
            if (site.path in paired.prefix_layers if paired else isinstance(site.module, Attention))
        ]
        if not found:
            raise UserError("method.name='prefix' needs attention layers with a slot, and this model has none")
        for site in found:
            attention = site.module
            shape = (*site.stack, 2, self.tokens, attention.kv_heads, attention.head_dim)
            axes = site.lead(None, None, "kv_heads", "head_dim")
            order = None
            if paired:
                order, axes = 2 * np.arange(paired.config.layers) % paired.config.layers, (None, *axes[1:])
            if self.projection:
                insert(site, name, ProjectedPrefix(shape, axes, order, self.hidden, self.init, rngs))
                continue
            draw = jax.random.normal(rngs.params(), shape, jnp.float32) if self.init == "random" else jnp.zeros(shape)
            insert(site, name, Prefix(draw, axes, order))

    def to_hf(self, model: nnx.Module, name: str) -> dict[str, Any]:
        base = self.base(model).config
        hidden = self.hidden or base.kv_heads * base.head_dim
        return super().to_hf(model, name) | {
            "prefix_projection": self.projection,
            "encoder_hidden_size": hidden if self.projection else None,
            "token_dim": base.kv_heads * base.head_dim,  # peft's count for grouped queries: the keys of one layer
            "num_attention_heads": base.kv_heads,
            "num_transformer_submodules": 2 if _encoder_decoder(model) else 1,
        }


def _encoder_decoder(model: nnx.Module) -> EncoderDecoder | None:
    """The model if it is an encoder-decoder, whose layers read their prefixes in peft's order.

    Raises:
        UserError: The encoder and the decoder have different numbers of layers.
    """
    if not isinstance(model, EncoderDecoder):
        return None
    config = model.config
    if config.layers != config.decoder_layers:
        raise UserError(
            f"method.name='prefix' needs as many layers in the encoder as in the decoder, as in peft; this model has "
            f"{config.layers} and {config.decoder_layers}"
        )
    return model


class Prefix(MethodAdapter):
    """softmax(q [P_k; k]^T) [P_v; v]: trained keys and values before the text's.

    Attributes:
        states: Keys and values, [*stack, 2, P, K, H].
        order: Which of the states each layer reads, [L], if it is not its own; the states are then not stacked but
            whole in every layer.
    """

    def __init__(self, states: jax.Array, axes: tuple, order: np.ndarray | None = None) -> None:
        self.states, self.virtual = PeftParam(states, axes=axes), states.shape[-3]
        self.order = _constant(order)

    def apply(
        self,
        base: Base,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: AttentionMask | jax.Array | None,
        *bias: jax.Array,
    ) -> jax.Array:
        states = self.layer_states().astype(key.dtype)  # [2, P, K, H]
        p_k, p_v = jnp.broadcast_to(states[:, None], (2, len(key), *states.shape[1:]))  # each [B, P, K, H]
        if mask is None:  # causal
            mask = jnp.tril(jnp.ones((1, 1, query.shape[1], key.shape[1]), bool))
        key, value = jnp.concatenate([p_k, key], axis=1), jnp.concatenate([p_v, value], axis=1)
        if isinstance(mask, AttentionMask):  # it already includes the prefix
            return base(query, key, value, mask, *bias)
        unmasked = max(key.shape[1] - mask.shape[-1], 0)  # 0 if the mask covers the prefix, as with a sliding window
        mask = jnp.pad(mask, ((0, 0),) * 3 + ((unmasked, 0),), constant_values=True)
        return base(query, key, value, mask, *bias)

    def layer_states(self) -> jax.Array:
        """The states of one layer, [2, P, K, H]."""
        return self._own(self.states)

    def _own(self, variable: nnx.Variable) -> jax.Array:
        value = variable.get_value()
        return value if self.order is None else value[self.order.get_value()]

    def hf_shared(self) -> dict[str, HfLeaf]:
        return {"prompt_embeddings": HfLeaf("states", axes=(2, 0, 1, 3, 4), shape=(self.virtual, -1))}


def _constant(order: np.ndarray | None) -> Any:
    return nnx.data(None if order is None else PeftConstant(jnp.asarray(order, jnp.int32), axes=("layers",)))


class ProjectedPrefix(Prefix):
    """A prefix computed as tanh(e W + b) kernel + bias.

    Attributes:
        pieces: e, [P, K*H], the same for all layers.
        dense: W [K*H, M] and b, the same for all layers.
        kernel: [*stack, M, 2*K*H].
        bias: [*stack, 2*K*H].
    """

    def __init__(
        self, shape: tuple[int, ...], axes: tuple, order: np.ndarray | None, hidden: int, init: str, rngs: nnx.Rngs
    ) -> None:
        *stack, _, self.virtual, self.heads, head_dim = shape
        width = self.heads * head_dim
        hidden = hidden or width
        self.axes, self.order = axes, _constant(order)
        pieces = jax.random.normal(rngs.params(), (self.virtual, width), jnp.float32)
        self.pieces = PeftParam(pieces, axes=(None, None))
        self.dense = Dense(width, hidden, rngs)
        zero = 0.0 if init == "zero" else 1.0
        lead = axes[:1] if stack else ()
        self.kernel = PeftParam(zero * uniform((*stack, hidden, 2 * width), hidden, rngs), axes=(*lead, None, None))
        self.bias = PeftParam(zero * uniform((*stack, 2 * width), hidden, rngs), axes=(*lead, None))

    def layer_states(self) -> jax.Array:
        return self._project(self._own(self.kernel), self._own(self.bias))

    def _project(self, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        middle = jnp.tanh(self.dense(self.pieces.get_value()))  # [P, M]
        flat = jnp.einsum("pm,...mw->...pw", middle, kernel)
        flat = flat + jnp.broadcast_to(bias[..., None, :], flat.shape)
        split = flat.reshape(*flat.shape[:-1], 2, self.heads, -1)  # [*stack, P, 2, K, H]
        return jnp.moveaxis(split, -3, -4)

    def exported(self) -> MethodAdapter:
        return Prefix(self._project(self.kernel.get_value(), self.bias.get_value()), self.axes)
