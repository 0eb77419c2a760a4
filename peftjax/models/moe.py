"""What the mixture-of-experts families have in common: a Llama whose feed-forward layers are mixtures of experts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.models.fields import Fields
from peftjax.models.llama import Llama, LlamaConfig
from peftjax.nn.feedforward import ACTIVATIONS
from peftjax.nn.moe import MixtureOfExperts, balance


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig(LlamaConfig):
    """Sizes and options of a Llama with experts.

    Attributes:
        experts: Number of experts, E.
        choices: Number of experts per token, K.
        normalized: Whether the weights of a token's experts sum to 1.
        expert_mlp: Hidden width of an expert.
        shared_mlp: Hidden width of the shared expert; 0: there is none.
    """

    experts: int
    choices: int
    normalized: bool
    expert_mlp: int
    shared_mlp: int = 0

    def make(self, rngs: nnx.Rngs) -> "MoeLlama":
        raise NotImplementedError


class MoeLlama(Llama):
    """A Llama with a mixture of experts in every layer."""

    config: MoeConfig

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
        hidden, _, loads = self._hidden(tokens, None, positions, segments, None, counted)
        assert loads is not None
        return hidden, balance(loads)

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
            stddev=config.init_stddev,
            dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
            **options,
        )


MOE_NAMES = {path: name for path, name in Llama.hf_names.items() if not path.startswith("blocks.feedforward.")} | {
    "blocks.feedforward.router": "model.layers.{}.mlp.gate",
    "blocks.feedforward.experts.gate_up": "model.layers.{}.mlp.experts.gate_up_proj",
    "blocks.feedforward.experts.down": "model.layers.{}.mlp.experts.down_proj",
}
# Fields of the load-balancing loss, which do not affect the logits.
BALANCING = frozenset({"output_router_logits", "router_aux_loss_coef"})


def read_experts(fields: Fields, experts: int, choices: int) -> dict[str, Any]:
    """Read the numbers of experts, by the name that transformers 4 or 5 gives the field.

    Args:
        fields: The fields of config.json.
        experts: Default of the number of experts.
        choices: Default of the number of experts per token.
    """
    old, new = fields.maybe("num_experts"), fields.maybe("num_local_experts")
    return {"experts": new or old or experts, "choices": fields.take("num_experts_per_tok", choices)}
