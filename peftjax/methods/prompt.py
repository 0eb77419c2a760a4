"""Prompt tuning: [p_1 ... p_P; E(x)], where the P vectors before the embedded tokens are all that is trained.

Lester et al. 2021 (arXiv:2104.08691), section 2. P-tuning makes them by an encoder from smaller pieces, p = f(e): Liu et
al. 2021 (arXiv:2103.10385), section 3.2. Only f's output is kept; the encoder is thrown away after training.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, MethodAdapter
from peftjax.adapters.method import Method, positive
from peftjax.adapters.sites import Site, place, token_tables
from peftjax.core.variables import PeftParam
from peftjax.nn.dropout import Dropout


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftPrompt(Method):
    """What the methods that put virtual tokens before the text have in common. tokens: how many, P.

    In an encoder-decoder a soft prompt stands before the encoder's tokens alone.
    """

    tokens: int = 20

    hf_fields: ClassVar = {"tokens": ("num_virtual_tokens", 20)}
    # the sizes of the base, which peft writes beside the options, and where a classification head is
    hf_ignored: ClassVar = frozenset({"token_dim", "num_attention_heads", "num_layers", "modules_to_save"})

    def __post_init__(self) -> None:
        positive(tokens=self.tokens)
        if not isinstance(self.tokens, int):
            raise ValueError(f"method.tokens must be a whole number, it is {self.tokens!r}")

    @property
    def neutral(self) -> bool:
        return False

    def site(self, model: Any) -> Site:
        """The token embedding, where soft prompts sit."""
        limit = getattr(getattr(model, "config", None), "max_positions", math.inf)
        if self.tokens >= limit:
            raise ValueError(
                f"method.tokens={self.tokens} leaves no room for text: the model has {limit} positions; take fewer"
            )
        found = token_tables(model)
        if len(found) != 1:
            raise ValueError(
                f"method.name={self.method!r} needs one token embedding with a slot, and this model has {len(found)}"
            )
        return found[0]

    def to_hf(self, model: Any, name: str) -> dict[str, Any]:
        if not hasattr(model, "config"):
            raise ValueError(
                f"{self.method} has no adapter file for an adopted model: peft's says the sizes of its base"
            )
        base = model.config
        sizes = {"token_dim": base.embed, "num_attention_heads": base.heads, "num_layers": base.layers}
        return super().to_hf(model, name) | sizes


SUBMODULES = {"submodules": ("num_transformer_submodules", 1)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuning(SoftPrompt):
    """Options of prompt tuning.

    init: "random" (normal, standard deviation 1, as peft does), "vocabulary" (rows of the embedding drawn at random) or
    "text" (the embedded tokens of `text`, repeated or cut to the number of virtual tokens). text_ids: the tokens of
    `text`; the train command fills them in by the base's tokenizer, elsewhere `method.tokenized(tokenizer.encode)` does.
    submodules: 2 where there are P more vectors, of no use, as peft has them in the file of an encoder-decoder.
    """

    init: str = "random"
    text: str = ""
    text_ids: tuple[int, ...] = ()
    submodules: int = 1

    method: ClassVar[str] = "prompt"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    hf_fields: ClassVar = SoftPrompt.hf_fields | SUBMODULES
    hf_ignored: ClassVar = SoftPrompt.hf_ignored | {
        "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    }  # fmt: skip
    hf_training: ClassVar = {"prompt_tuning_init": "RANDOM"}

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(submodules=self.submodules)
        if self.init not in ("random", "vocabulary", "text"):
            raise ValueError(f"method.init must be 'random', 'vocabulary' or 'text', it is {self.init!r}")
        if (self.init == "text") != bool(self.text or self.text_ids):
            raise ValueError(f"method.text={self.text!r} and method.init={self.init!r}: init='text' goes with a text")

    def tokenized(self, encode: Callable[[str], list[int]]) -> Self:
        return dataclasses.replace(self, text_ids=tuple(encode(self.text))) if self.text else self

    def attach(self, model: Any, name: str, rngs: nnx.Rngs) -> None:
        site = self.site(model)
        place(site, name, Prompt(self._initial(site.module, rngs), self.tokens))

    def _initial(self, embedding: Any, rngs: nnx.Rngs) -> jax.Array:
        vocab, features = embedding.in_features, embedding.out_features
        count = self.tokens * self.submodules
        if self.init == "random":
            return jax.random.normal(rngs.params(), (count, features), jnp.float32)
        if self.init == "vocabulary":
            ids = jax.random.randint(rngs.params(), (count,), 0, vocab)
        elif self.text_ids:
            ids = jnp.resize(jnp.array(self.text_ids), (count,))
        else:
            raise ValueError("method.text has no tokens yet: call method.tokenized(tokenizer.encode) before attach")
        return embedding.embedding.get_value()[ids].astype(jnp.float32)


class Prompt(MethodAdapter):
    """Vectors before the embedded tokens. embeddings: [P or more, D], of which the first P are used."""

    def __init__(self, embeddings: jax.Array, tokens: int) -> None:
        self.virtual = tokens
        self.embeddings = PeftParam(embeddings, axes=(None, "embed"))

    def vectors(self) -> jax.Array:
        """All of them, [P or more, D]."""
        return self.embeddings.get_value()

    def prompt(self) -> jax.Array:
        """[P, D]"""
        return self.vectors()[: self.virtual]

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        return compute(*inputs, **parameters)

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        return {}

    def hf_shared(self) -> dict[str, HfLeaf]:
        return {"prompt_embeddings": HfLeaf("embeddings")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PTuning(SoftPrompt):
    """Options of P-tuning.

    encoder: "mlp" (three Linear layers with ReLU between), "lstm" (`layers` bidirectional LSTMs and two Linear layers
    with ReLU between), or "none": the vectors themselves are trained, which is how an adapter file is read, because it
    holds the encoder's output alone. hidden: the encoder's width; 0: that of the model. dropout: between LSTMs.
    submodules: as for `PromptTuning`.
    """

    encoder: str = "mlp"
    hidden: int = 0
    layers: int = 2
    dropout: float = 0.0
    submodules: int = 1

    method: ClassVar[str] = "p_tuning"
    peft_type: ClassVar[str] = "P_TUNING"
    hf_fields: ClassVar = (
        SoftPrompt.hf_fields
        | SUBMODULES
        | {
            "hidden": ("encoder_hidden_size", None),
            "layers": ("encoder_num_layers", 2),
            "dropout": ("encoder_dropout", 0.0),
        }
    )
    hf_training: ClassVar = {"encoder_reparameterization_type": "MLP"}

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(layers=self.layers, submodules=self.submodules)
        if self.encoder not in ("mlp", "lstm", "none"):
            raise ValueError(f"method.encoder must be 'mlp', 'lstm' or 'none', it is {self.encoder!r}")
        if self.hidden < 0:
            raise ValueError(f"method.hidden must be 0 (the model's width) or more, it is {self.hidden}")

    def attach(self, model: Any, name: str, rngs: nnx.Rngs) -> None:
        site = self.site(model)
        features = site.module.out_features
        pieces = jax.random.normal(rngs.params(), (self.tokens * self.submodules, features), jnp.float32)
        hidden = self.hidden or features
        if self.encoder == "none":
            adapter: Prompt = Prompt(pieces, self.tokens)
        elif self.encoder == "mlp":
            adapter = EncodedPrompt(pieces, self.tokens, None, (features, hidden, hidden, features), rngs)
        else:
            lstm = Lstm(features, hidden, self.layers, self.dropout, rngs)
            adapter = EncodedPrompt(pieces, self.tokens, lstm, (2 * hidden, 2 * hidden, features), rngs)
        place(site, name, adapter)

    def to_hf(self, model: Any, name: str) -> dict[str, Any]:
        config = super().to_hf(model, name)
        kind = "LSTM" if self.encoder == "lstm" else "MLP"
        return config | {
            "encoder_reparameterization_type": kind,
            "encoder_hidden_size": self.hidden or model.config.embed,
        }

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        return dataclasses.replace(super().from_hf(config), encoder="none")


class EncodedPrompt(Prompt):
    """A soft prompt that an encoder makes of `embeddings`: a stack of Linear layers, after LSTMs or not."""

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

    def exported(self) -> MethodAdapter:
        return Prompt(self.vectors(), self.virtual)


class Dense(nnx.Module):
    """x W + b, trained; both uniform in +-1/sqrt(in) at the start, as torch.nn.Linear has them. [..., in] -> [..., out]."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> None:
        self.kernel = PeftParam(uniform((inputs, outputs), inputs, rngs), axes=(None, None))
        self.bias = PeftParam(uniform((outputs,), inputs, rngs), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel.get_value()
        return y + jnp.broadcast_to(self.bias.get_value(), y.shape)


class Lstm(nnx.Module):
    """Bidirectional LSTMs one upon the other, [T, D] -> [T, 2H] (Hochreiter and Schmidhuber 1997, with a forget gate).

    i, f, o = sigmoid(.), g = tanh(.) of x W + h U + b; c <- f c + i g; h <- o tanh(c). Each layer: w [2, in, 4H], u
    [2, H, 4H], b [2 * 2 * 4H] (two biases, which add up, as torch.nn.LSTM has them; flat, for weight decay is not for
    biases); the first axis is the direction.
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


def uniform(shape: tuple[int, ...], fan_in: int, rngs: nnx.Rngs) -> jax.Array:
    """Uniform in +-1/sqrt(fan_in)."""
    return jax.random.uniform(rngs.params(), shape, jnp.float32, -(fan_in**-0.5), fan_in**-0.5)
