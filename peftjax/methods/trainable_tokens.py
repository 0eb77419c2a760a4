"""Trainable tokens: rows t_1 ... t_n of the embedding are trained copies, e(t_i) = d_i, and nothing else.

No paper; as peft has it. Where a head is tied to a targeted embedding, its columns t_i are the same copies, which the
file then holds under both names.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, WeightAdapter
from peftjax.adapters.method import Method
from peftjax.adapters.sites import Site, choose, place, sites, tied_kernel, token_tables
from peftjax.adapters.targeted import names_or_pattern
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.nn.embedding import Embedding
from peftjax.nn.linear import Linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainableTokens(Method):
    """Options of trainable tokens.

    token_indices: the tokens whose vectors are trained. targets: names of embeddings, or of a head that is not tied;
    none: the token embedding.
    """

    token_indices: tuple[int, ...] = ()
    targets: str | tuple[str, ...] = ()

    method: ClassVar[str] = "trainable_tokens"
    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    hf_fields: ClassVar = {"token_indices": ("token_indices", None), "targets": ("target_modules", None)}
    hf_training: ClassVar = {"init_weights": True}

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_indices", tuple(self.token_indices))
        object.__setattr__(self, "targets", names_or_pattern(self.targets))
        if not self.token_indices:
            raise ValueError("method.token_indices is empty: give the ids of the tokens to train")
        check_tokens(self.token_indices)

    def attach(self, model: Any, name: str, rngs: nnx.Rngs) -> None:
        del rngs
        layers = [site for site in sites(model) if isinstance(site.module, Embedding | Linear) and not site.stack]
        chosen = [site for site, _ in choose(layers, self.targets)] if self.targets else [token_embedding(model)]
        train_tokens(model, self.token_indices, chosen, name)


def check_tokens(indices: tuple[int, ...]) -> None:
    """A ValueError for a token that is named twice."""
    if twice := [token for token in indices if indices.count(token) > 1]:
        raise ValueError(f"method.token_indices has {twice[0]} more than once")


def token_embedding(model: Any) -> Site:
    """The embedding of a model's tokens."""
    found = token_tables(model)
    if len(found) != 1:
        raise ValueError(f"method.token_indices: this model has {len(found)} embeddings; name one in method.targets")
    return found[0]


def train_tokens(
    model: Any, indices: tuple[int, ...], chosen: list[Site], name: str, key: str = "", both: bool = True
) -> None:
    """Put trained copies of rows into embeddings and heads, and into a head tied to one of the embeddings.

    key: what stands before the tensor's own name in the file; both: the file has them under the tied head's name too.
    """
    embed = next((site for site in chosen if site.module is getattr(model, "embed", None)), None)
    borrows = model.head if embed is not None and getattr(model, "tied", False) else None
    for site in chosen:
        if site.module is not borrows:
            place(site, name, _adapter(site, model, indices, key))
    if borrows is not None and embed is not None:
        site = next(site for site in sites(model) if site.module is borrows)
        rows = embed.module.adapters.adapter(name)
        place(site, name, TokenColumns(_key(site, key) if both else "", rows.indices, rows.delta))


def _adapter(site: Site, model: Any, indices: tuple[int, ...], key: str) -> "TokenRows":
    layer = site.module
    embeds = isinstance(layer, Embedding)
    vocab = layer.in_features if embeds else layer.out_features
    if beyond := [token for token in indices if not 0 <= token < vocab]:
        raise ValueError(f"method.token_indices: {beyond[0]} is no token of {site.names[0]}, which has {vocab}")
    places = jnp.array(indices, jnp.int32)
    if embeds:
        rows = layer.embedding.get_value()[places]
    else:
        rows = (tied_kernel(model) if layer.kernel is None else layer.kernel.get_value())[:, places].T
    delta = PeftParam(rows.astype(jnp.float32), axes=(None, "embed"))
    kind = TokenRows if embeds else TokenColumns
    return kind(_key(site, key), PeftConstant(places, axes=(None,)), delta)


def _key(site: Site, key: str) -> str:
    return f"base_model.model.{site.names[0]}.{key}trainable_tokens_delta"


class TokenRows(WeightAdapter):
    """A table [V, D] whose rows `indices` [n] are `delta` [n, D]. key: of the tensor in the adapter file, "" for none."""

    kernel: ClassVar = "embedding"

    def __init__(self, key: str, indices: nnx.Variable, delta: nnx.Variable) -> None:
        self.key, self.indices, self.delta = key, indices, delta

    def changed(self, kernel: jax.Array) -> jax.Array:
        return kernel.at[self.indices.get_value()].set(self.delta.get_value())

    def __call__(self, owner: Any, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any) -> jax.Array:
        (tokens,) = inputs
        indices = self.indices.get_value().reshape((1,) * tokens.ndim + (-1,))
        is_row = tokens[..., None] == indices  # [B, T, n]
        own = owner.lookup(jnp.argmax(is_row, axis=-1), embedding=self.delta.get_value())
        return jnp.where(is_row.any(axis=-1, keepdims=True), own, compute(tokens, **parameters))

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        return {}

    def hf_shared(self) -> dict[str, HfLeaf]:
        return {self.key: HfLeaf("delta")} if self.key else {}


class TokenColumns(TokenRows):
    """The same of a head's kernel [D, V]: columns."""

    kernel: ClassVar = "kernel"
    __call__ = WeightAdapter.__call__

    def changed(self, kernel: jax.Array) -> jax.Array:
        return kernel.at[:, self.indices.get_value()].set(self.delta.get_value().T)
