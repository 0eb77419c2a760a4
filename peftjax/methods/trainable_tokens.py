"""Trainable tokens: e(t_i) = d_i for the tokens t_1 ... t_n, where the d_i, copies of their embeddings, are trained.

There is no paper; the method is peft's. If a head is tied to a targeted embedding, its columns t_i are the same copies,
and the file stores them under both names.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, WeightAdapter
from peftjax.adapters.method import Method
from peftjax.adapters.options import integers, names_or_pattern
from peftjax.adapters.selection import choose
from peftjax.adapters.sites import Site, insert, sites, tied_pair, token_tables
from peftjax.core.errors import UserError
from peftjax.core.paths import suggest
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.nn.embedding import Embedding
from peftjax.nn.linear import Linear
from peftjax.nn.slot import Base


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainableTokens(Method):
    """Options of trainable tokens.

    Attributes:
        token_indices (tuple of int, required): The ids of the tokens whose embeddings are trained.
        targets (str or tuple, default the token embedding): Names of embeddings, or of a head that is not tied.
    """

    token_indices: tuple[int, ...] = ()
    targets: str | tuple[str, ...] = ()

    method: ClassVar[str] = "trainable_tokens"
    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    hf_fields: ClassVar = {"token_indices": ("token_indices", None), "targets": ("target_modules", None)}
    hf_training: ClassVar = {"init_weights": True}

    def __post_init__(self) -> None:
        self._replace(token_indices=token_ids(self.token_indices), targets=names_or_pattern("targets", self.targets))
        if not self.token_indices:
            raise UserError("method.token_indices is empty: give the ids of the tokens to train")

    def attach(self, model: nnx.Module, name: str, rngs: nnx.Rngs) -> None:
        del rngs
        named = choose(_tables_and_heads(model), self.targets) if self.targets else []
        train_tokens(model, self.token_indices, [site for site, _ in named] or [token_embedding(model)], name)


def _tables_and_heads(model: nnx.Module) -> list[Site]:
    return [site for site in sites(model) if isinstance(site.module, Embedding | Linear) and not site.stack]


def token_ids(value: Any) -> tuple[int, ...]:
    """The ids of the option `token_indices`; a `UserError` if one is given twice."""
    indices = integers("token_indices", value)
    if twice := [token for token in indices if indices.count(token) > 1]:
        raise UserError(f"method.token_indices has {twice[0]} more than once")
    return indices


def token_embedding(model: nnx.Module) -> Site:
    """The site of the token embedding; a `UserError` if there is not exactly one."""
    found = token_tables(model)
    if len(found) != 1:
        raise UserError(f"method.token_indices: this model has {len(found)} embeddings; name one in method.targets")
    return found[0]


def tokens_by_site(
    model: nnx.Module, indices: tuple[int, ...] | tuple[tuple[str, tuple[int, ...]], ...]
) -> list[tuple[Site, tuple[int, ...], bool]]:
    """The layers whose tokens are trained: the token embedding, or the layers in a table {name: tokens}.

    Returns:
        For each layer its tokens, and whether a head that is tied to it follows it. As in peft, a tied head follows the
        embedding unless the table has other tokens for it.

    Raises:
        UserError: A name of the table matches neither an embedding nor a head.
    """
    table = [item for item in indices if isinstance(item, tuple)]
    if not table:
        return [(token_embedding(model), tuple(item for item in indices if not isinstance(item, tuple)), True)]
    layers = _tables_and_heads(model)
    found: dict[str, tuple[Site, tuple[int, ...]]] = {}
    for name, tokens in table:
        matching = [site for site in layers if site.names[0].endswith(name)]
        if not matching:
            names = [site.names[0] for site in layers]
            raise UserError(
                f"method.token_indices: {name!r} matches neither an embedding nor a head.{suggest(name, names)} Available: "
                f"{', '.join(names)}"
            )
        found |= {site.path: (site, tokens) for site in matching}
    pair = tied_pair(model)
    embed, head = [found.get(site.path) for site in pair] if pair else (None, None)
    if embed and head and embed[1] == head[1]:
        del found[head[0].path]
        head = None
    return [(site, tokens, head is None) for site, tokens in found.values()]


def train_tokens(
    model: nnx.Module,
    indices: tuple[int, ...],
    chosen: list[Site],
    name: str,
    *,
    of_lora: bool = False,
    tie: bool = True,
) -> None:
    """Put trained copies of rows into embeddings and heads, and into the head tied to a chosen embedding.

    Args:
        model: The model.
        indices: The tokens.
        chosen: The sites of the embeddings and heads.
        name: The adapter's name.
        of_lora: Whether a LoRA trains them; its file does not store the copies again under the name of the tied head.
        tie: Whether the head tied to a chosen embedding uses the same copies.
    """
    pair = tied_pair(model) if tie else None
    if pair is not None and all(site.path != pair[0].path for site in chosen):
        pair = None
    for site in chosen:
        if pair is None or site.path != pair[1].path:
            insert(site, name, _adapter(site, indices, of_lora))
    if pair is not None:
        embed, head = pair
        rows = embed.module.adapters.adapter(name)
        insert(head, name, TokenColumns("" if of_lora else _key(head, of_lora=False), rows.indices, rows.delta))


def _adapter(site: Site, indices: tuple[int, ...], of_lora: bool) -> "TokenRows":
    embeds = isinstance(site.module, Embedding)
    vocab = site.module.in_features if embeds else site.module.out_features
    if beyond := [token for token in indices if not 0 <= token < vocab]:
        raise UserError(
            f"method.token_indices: {beyond[0]} is not a token of {site.names[0]}; its ids are 0 to {vocab - 1}"
        )
    places = jnp.array(indices, jnp.int32)
    rows = site.kernel[places] if embeds else site.kernel[:, places].T
    delta = PeftParam(rows.astype(jnp.float32), axes=(None, "embed"))
    kind = TokenRows if embeds else TokenColumns
    return kind(_key(site, of_lora), PeftConstant(places, axes=(None,)), delta)


def _key(site: Site, of_lora: bool) -> str:
    return f"base_model.model.{site.names[0]}.{'token_adapter.' if of_lora else ''}trainable_tokens_delta"


class TokenRows(WeightAdapter):
    """A table [V, D] whose rows `indices` are replaced.

    Attributes:
        key: The tensor's key in the adapter file, "" if it is not stored.
        indices: The tokens, [n].
        delta: Their embeddings, [n, D].
    """

    kernel: ClassVar = "embedding"

    def __init__(self, key: str, indices: nnx.Variable, delta: nnx.Variable) -> None:
        self.key, self.indices, self.delta = key, indices, delta

    def changed(self, kernel: jax.Array) -> jax.Array:
        return kernel.at[self.indices.get_value()].set(self.delta.get_value())

    def apply(self, base: Base, x: jax.Array) -> jax.Array:
        indices = self.indices.get_value().reshape((1,) * x.ndim + (-1,))
        is_row = x[..., None] == indices  # [B, T, n]
        own = base.layer.lookup(jnp.argmax(is_row, axis=-1), embedding=self.delta.get_value())
        return jnp.where(is_row.any(axis=-1, keepdims=True), own, base(x))

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        del layer
        return {}

    def hf_shared(self) -> dict[str, HfLeaf]:
        return {self.key: HfLeaf("delta")} if self.key else {}


class TokenColumns(TokenRows):
    """A head's kernel [D, V] whose columns `indices` are replaced."""

    kernel: ClassVar = "kernel"
    apply = WeightAdapter.apply

    def changed(self, kernel: jax.Array) -> jax.Array:
        return kernel.at[:, self.indices.get_value()].set(self.delta.get_value().T)
