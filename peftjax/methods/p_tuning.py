"""P-tuning: [p_1 ... p_P; E(x)] with p = f(e), where the encoder f and the vectors e are trained.

Liu et al. 2021 (arXiv:2103.10385), section 3.2. Only the output of f is stored; the encoder is discarded after training.
"""

import dataclasses
import itertools
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.adapters.options import one_of, positive_integer, probability
from peftjax.adapters.sites import insert
from peftjax.adapters.soft_prompt import Dense, InputPrompt, PromptAdapter, uniform
from peftjax.core.errors import UserError
from peftjax.core.variables import PeftParam
from peftjax.nn.dropout import Dropout


@dataclasses.dataclass(frozen=True, kw_only=True)
class PTuning(InputPrompt):
    """Options of P-tuning.

    Attributes:
        encoder (str, default "mlp"): "mlp" (three Linear layers with ReLU in between), "lstm" (bidirectional LSTMs, then
            two Linear layers with ReLU in between) or "none" (train the vectors themselves). An adapter file is read
            with "none", because it holds only the encoder's output.
        hidden (int, default 0): Width of the encoder; 0 is the width of the model.
        layers (int, default 2): Number of LSTMs.
        dropout (float, default 0.0): Dropout rate between LSTMs.
    """

    encoder: str = "mlp"
    hidden: int = 0
    layers: int = 2
    dropout: float = 0.0

    method: ClassVar[str] = "p_tuning"
    peft_type: ClassVar[str] = "P_TUNING"
    hf_fields: ClassVar = InputPrompt.hf_fields | {
        "hidden": ("encoder_hidden_size", None),
        "layers": ("encoder_num_layers", 2),
        "dropout": ("encoder_dropout", 0.0),
    }
    hf_training: ClassVar = {"encoder_reparameterization_type": "MLP"}

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_integer(layers=self.layers)
        probability(dropout=self.dropout)
        one_of(("mlp", "lstm", "none"), encoder=self.encoder)
        if not isinstance(self.hidden, int) or self.hidden < 0:
            raise UserError(f"method.hidden must be 0 (the model's width) or a positive integer, got {self.hidden}")

    def attach(self, model: nnx.Module, name: str, rngs: nnx.Rngs) -> None:
        site = self.site(model)
        features = site.module.out_features
        pieces = jax.random.normal(rngs.params(), (self.vectors, features), jnp.float32)
        hidden = self.hidden or features
        if self.encoder == "none":
            adapter = PromptAdapter(pieces, self.tokens)
        elif self.encoder == "mlp":
            adapter = EncodedPrompt(pieces, self.tokens, None, (features, hidden, hidden, features), rngs)
        else:
            lstm = Lstm(features, hidden, self.layers, self.dropout, rngs)
            adapter = EncodedPrompt(pieces, self.tokens, lstm, (2 * hidden, 2 * hidden, features), rngs)
        insert(site, name, adapter)

    def to_hf(self, model: nnx.Module, name: str) -> dict[str, Any]:
        return super().to_hf(model, name) | {
            "encoder_reparameterization_type": "LSTM" if self.encoder == "lstm" else "MLP",
            "encoder_hidden_size": self.hidden or self.base(model).config.embed,
        }

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        return dataclasses.replace(super().from_hf(config), encoder="none")


class EncodedPrompt(PromptAdapter):
    """A soft prompt computed from `embeddings` by LSTMs, if there are any, and a stack of Linear layers."""

    def __init__(
        self, pieces: jax.Array, tokens: int, lstm: "Lstm | None", sizes: tuple[int, ...], rngs: nnx.Rngs
    ) -> None:
        super().__init__(pieces, tokens)
        self.lstm = nnx.data(lstm)
        self.mlp = nnx.data([Dense(i, o, rngs) for i, o in itertools.pairwise(sizes)])

    def vectors(self) -> jax.Array:
        x = self.embeddings.get_value()
        if self.lstm is not None:
            x = self.lstm(x)
        for index, dense in enumerate(self.mlp):
            x = dense(jax.nn.relu(x) if index else x)
        return x

    def exported(self) -> PromptAdapter:
        return PromptAdapter(self.vectors(), self.virtual)


class Lstm(nnx.Module):
    """Stacked bidirectional LSTMs, [T, D] -> [T, 2H] (Hochreiter and Schmidhuber 1997, with a forget gate).

    i, f, o = sigmoid(.), g = tanh(.) of x W + h U + b; c <- f c + i g; h <- o tanh(c). The first axis of all parameters
    is the direction.

    Attributes:
        w: Of each layer, [2, in, 4H].
        u: Of each layer, [2, H, 4H].
        b: Of each layer, [2 * 2 * 4H]: two biases that are added, as in torch.nn.LSTM; flat, so that weight decay does
            not apply to them.
    """

    def __init__(self, features: int, hidden: int, layers: int, dropout: float, rngs: nnx.Rngs) -> None:
        widths = [features] + [2 * hidden] * (layers - 1)
        self.w = nnx.data(
            [PeftParam(uniform((2, width, 4 * hidden), hidden, rngs), axes=(None,) * 3) for width in widths]
        )
        self.u = nnx.data([PeftParam(uniform((2, hidden, 4 * hidden), hidden, rngs), axes=(None,) * 3) for _ in widths])
        self.b = nnx.data([PeftParam(uniform((2 * 2 * 4 * hidden,), hidden, rngs), axes=(None,)) for _ in widths])
        self.dropout = nnx.data([Dropout(dropout) for _ in widths[1:]])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer, (w, u, b) in enumerate(zip(self.w, self.u, self.b, strict=True)):
            x = self.dropout[layer - 1](x) if layer else x
            both = jax.vmap(_lstm)(
                jnp.stack([x, x[::-1]]), w.get_value(), u.get_value(), b.get_value().reshape(2, 2, -1).sum(1)
            )
            x = jnp.concatenate([both[0], both[1][::-1]], axis=-1)
        return x


def _lstm(x: jax.Array, w: jax.Array, u: jax.Array, b: jax.Array) -> jax.Array:
    """One direction of one layer: x [T, in] -> [T, H]."""

    def step(carry: tuple[jax.Array, jax.Array], gates: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        h, c = carry
        i, f, g, o = jnp.split(gates + h @ u, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros(u.shape[:1])
    inputs = x @ w
    return jax.lax.scan(step, (zero, zero), inputs + jnp.broadcast_to(b, inputs.shape))[1]
