"""What the mixture-of-experts families have in common: a Llama whose feed-forward layers are mixtures of experts."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.core.errors import UserError
from peftjax.models.decoder import Block, LayerStep, State
from peftjax.models.fields import Fields
from peftjax.models.llama import Llama, LlamaConfig
from peftjax.nn.feedforward import ACTIVATIONS
from peftjax.nn.moe import MixtureOfExperts
from peftjax.nn.routing import Load, balance
from peftjax.nn.stack import make_stack, scan_variants


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig(LlamaConfig):
    """Sizes and options of a Llama with experts.

    Attributes:
        experts: Number of experts, E.
        choices: Number of experts per token, K.
        normalized: Whether the weights of a token's experts sum to 1.
        expert_mlp: Hidden width of an expert.
        shared_mlp: Hidden width of the shared expert; 0: there is none.
        dense_layers: The numbers of the layers with one feed-forward layer, of width `mlp`, in place of experts.
    """

    experts: int
    choices: int
    normalized: bool
    expert_mlp: int
    shared_mlp: int = 0
    dense_layers: tuple[int, ...] = ()


class MoeLlama(Llama):
    """A Llama with a mixture of experts in every layer except `dense_layers`.

    Attributes:
        sparse: The mixtures of experts, stacked. They are in `blocks` instead if there are no dense layers.
        dense: The feed-forward layers of `dense_layers`, stacked, if there are any.
        balanced: Whether transformers defines a load-balancing loss for the family.
    """

    config: MoeConfig
    balanced: ClassVar[bool] = True

    def __init__(self, config: MoeConfig, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs)
        if config.dense_layers:
            self.sparse = make_stack(self.make_feedforward, config.layers - len(config.dense_layers), rngs)
            self.dense = make_stack(super().make_feedforward, len(config.dense_layers), rngs)

    def make_block(self, rngs: nnx.Rngs) -> Block:
        feedforward = None if self.config.dense_layers else self.make_feedforward(rngs)
        return Block(self.make_norm, self.make_attention(rngs), feedforward)

    def through_layers(self, layer: LayerStep, carry: State, per_layer: Any) -> State:
        config = self.config
        if not config.dense_layers:
            return super().through_layers(layer, carry, per_layer)

        def complete(block: Block, feedforward: Any, carry: State, inputs: Any) -> State:
            block.feedforward = feedforward
            return layer(block, carry, inputs)[0]

        kinds = [int(number in config.dense_layers) for number in range(config.layers)]
        stacks = (self.sparse, self.dense)
        return scan_variants(self.blocks, stacks, kinds, complete, carry, per_layer, config.remat)

    @property
    def partial_stacks(self) -> Mapping[str, tuple[int, ...]]:
        dense = self.config.dense_layers
        return {"dense": dense, "sparse": tuple(i for i in range(self.config.layers) if i not in dense)}

    def hidden_and_balance(
        self,
        tokens: jax.Array,
        counted: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the hidden states as `hidden` does, [B, T, D], and the load-balancing loss, float32 [].

        Args:
            tokens: int [B, T].
            counted: bool [B, T], the tokens that the load-balancing loss counts, which are those that are not padding. An
                active soft prompt counts too.
            positions: As in `hidden`.
            segments: As in `hidden`.
        """
        empty = Load(counted, jnp.zeros((2, self.config.experts)))
        hidden, _, load = self._hidden(tokens, None, positions, segments, None, empty)
        assert load is not None
        return hidden, balance(load.sums / (self.config.layers - len(self.config.dense_layers)))

    def make_feedforward(self, rngs: nnx.Rngs, **options: Any) -> MixtureOfExperts:
        """Build the feed-forward layer of one block, with further options of `MixtureOfExperts`."""
        config = self.config
        return MixtureOfExperts(
            config.experts,
            config.choices,
            config.normalized,
            config.embed,
            config.expert_mlp,
            shared=config.shared_mlp,
            activation=ACTIVATIONS[config.activation],
            **config.weights(rngs),
            **options,
        )


# The names in most families. With dense layers, the experts are in `sparse` instead of `blocks.feedforward`.
_EXPERTS = {
    "router": "gate",
    "experts.gate_up": "experts.gate_up_proj",
    "experts.down": "experts.down_proj",
    "shared.gate": "shared_expert.gate_proj",
    "shared.up": "shared_expert.up_proj",
    "shared.down": "shared_expert.down_proj",
    "shared_gate": "shared_expert_gate",
}
_DENSE = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MoeLlama.hf_names = {
    **Llama.hf_names,
    **{
        f"{module}.{path}": f"model.layers.{{}}.mlp.{name}"
        for module, names in (("blocks.feedforward", _EXPERTS), ("sparse", _EXPERTS), ("dense", _DENSE))
        for path, name in names.items()
    },
}


def read_experts(fields: Fields, experts: int, choices: int) -> dict[str, Any]:
    """Read the numbers of experts, by the name that transformers 4 or 5 gives the field.

    Args:
        fields: The fields of config.json.
        experts: Default of the number of experts.
        choices: Default of the number of experts per token.
    """
    fields.skip("output_router_logits", "router_aux_loss_coef")  # which only the load-balancing loss reads
    old, new = fields.maybe("num_experts"), fields.maybe("num_local_experts")
    experts, choices = new or old or experts, fields.take("num_experts_per_tok", choices)
    if choices > experts:
        raise UserError(f"config.json: num_experts_per_tok={choices} exceeds the number of experts, {experts}")
    return {"experts": experts, "choices": choices}
