"""What prompt tuning, P-tuning and prefix tuning share: virtual tokens before the text, and layers that make them."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, MethodAdapter
from peftjax.adapters.method import Method
from peftjax.adapters.options import positive_integer
from peftjax.adapters.sites import Site, token_tables
from peftjax.core.errors import UserError
from peftjax.core.variables import PeftParam
from peftjax.models.base import Model
from peftjax.nn.slot import Base


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftPrompt(Method):
    """Options of virtual tokens. In an encoder-decoder a soft prompt only precedes the encoder's tokens.

    Attributes:
        tokens (int, default 20): Number P of virtual tokens.
    """

    tokens: int = 20

    hf_fields: ClassVar = {"tokens": ("num_virtual_tokens", 20)}
    # the sizes of the base, which peft stores beside the options, and where a classification head is
    hf_ignored: ClassVar = frozenset({"token_dim", "num_attention_heads", "num_layers", "modules_to_save"})

    def __post_init__(self) -> None:
        positive_integer(tokens=self.tokens)

    @property
    def neutral(self) -> bool:
        return False

    def site(self, model: nnx.Module) -> Site:
        """The token embedding, in whose slot soft prompts sit.

        Raises:
            UserError: There is none, or the model has too few positions.
        """
        found = token_tables(model)
        if len(found) != 1:
            raise UserError(
                f"method.name={self.method!r} needs one token embedding with a slot, and this model has {len(found)}"
            )
        if isinstance(model, Model) and self.tokens >= (limit := model.config.max_positions):
            raise UserError(
                f"method.tokens={self.tokens} leaves no room for text: the model has {limit} positions; use fewer"
            )
        return found[0]

    def base(self, model: nnx.Module) -> Model:
        """The model, if an adapter file can state its sizes.

        Raises:
            UserError: It is an adopted model.
        """
        if not isinstance(model, Model):
            raise UserError(
                f"{self.method} has no adapter file for an adopted model: the file would have to state the base's sizes"
            )
        return model

    def to_hf(self, model: nnx.Module, name: str) -> dict[str, Any]:
        base = self.base(model).config
        sizes = {"token_dim": base.embed, "num_attention_heads": base.heads, "num_layers": base.layers}
        return super().to_hf(model, name) | sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputPrompt(SoftPrompt):
    """Options of soft prompts at the model's input.

    Attributes:
        submodules (int, default 1): 2 if the adapter file has P more vectors, which are not used; peft writes them for an
            encoder-decoder.
    """

    submodules: int = 1

    hf_fields: ClassVar = SoftPrompt.hf_fields | {"submodules": ("num_transformer_submodules", 1)}

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_integer(submodules=self.submodules)

    @property
    def vectors(self) -> int:
        """The number of vectors in the adapter file, P or 2 P."""
        return self.tokens * self.submodules


class PromptAdapter(MethodAdapter):
    """[p_1 ... p_P; E(x)]: vectors before the embedded tokens.

    Attributes:
        embeddings: [P or more, D], of which the first P are used.
    """

    def __init__(self, embeddings: jax.Array, tokens: int) -> None:
        self.virtual = tokens
        self.embeddings = PeftParam(embeddings, axes=(None, "embed"))

    def vectors(self) -> jax.Array:
        """All vectors, [P or more, D]."""
        return self.embeddings.get_value()

    def prompt(self) -> jax.Array:
        """The vectors to put before the text, [P, D]."""
        return self.vectors()[: self.virtual]

    def apply(self, base: Base, x: jax.Array) -> jax.Array:
        return base(x)  # the model itself asks for `prompt()`

    def hf_shared(self) -> dict[str, HfLeaf]:
        return {"prompt_embeddings": HfLeaf("embeddings")}


class Dense(nnx.Module):
    """x W + b, [..., in] -> [..., out], trained; both initialized uniformly within +-1/sqrt(in), as in torch.nn.Linear."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> None:
        self.kernel = PeftParam(uniform((inputs, outputs), inputs, rngs), axes=(None, None))
        self.bias = PeftParam(uniform((outputs,), inputs, rngs), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel.get_value()
        return y + jnp.broadcast_to(self.bias.get_value(), y.shape)


def uniform(shape: tuple[int, ...], fan_in: int, rngs: nnx.Rngs) -> jax.Array:
    """Uniform within +-1/sqrt(fan_in), float32."""
    return jax.random.uniform(rngs.params(), shape, jnp.float32, -(fan_in**-0.5), fan_in**-0.5)
