"""A batch whose rows use different adapters: the model under vmap over rows, each with its own adapter.

All rows share the base. Each row gathers its adapter from a stack, so which adapter a row uses is an array, and changing it
compiles nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.adapters.attach import attach_unchecked, detach
from peftjax.adapters.registry import active, attached, require, use
from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.models.base import Model, PromptState
from peftjax.models.decoder import read_prompts
from peftjax.nn.cache import Cache
from peftjax.nn.dropout import remove_dropout
from peftjax.nn.slot import active_view

T = TypeVar("T")


class Rows(nnx.Module):
    """A model in evaluation mode whose row b uses adapter number index[b] of a stack.

    It is called like the model; `generate` also accepts it.

    Attributes:
        config: The model's configuration.
        virtual: The number of virtual positions before the first token.
        index: int [B], a variable.
    """

    def __init__(self, views: Sequence[Model], index: jax.Array) -> None:
        self.config, self.virtual = views[0].config, views[0].virtual
        self.graph = variables.flat(views[0])[0]
        trees = [variables.flat(view)[1] for view in views]
        stacked = [path for path in trees[0] if ".adapters." in path]
        shared = [path for path in trees[0] if ".adapters." not in path]
        self.paths = (tuple(stacked), tuple(shared))
        stacks = [jnp.stack([tree[path].get_value() for tree in trees]) for path in stacked]
        self.stack = nnx.data([variables.PeftConstant(array) for array in stacks])  # each [A, ...]
        self.base = nnx.data([variables.PeftConstant(trees[0][path].get_value()) for path in shared])
        self.index = variables.PeftConstant(index)

    def __call__(self, tokens: jax.Array, *, cache: Cache | None = None, **inputs: jax.Array | None) -> Any:
        """Return what the model does; with `cache`, a pair of logits and the cache extended by T tokens."""
        if cache is not None:
            hidden, cache = self.hidden(tokens, cache=cache, **inputs)
            return self.logits(hidden), cache
        given = self._by_row(tokens, inputs)
        return self._over_rows(lambda model, tokens, given: model(tokens, **given), tokens[:, None], given)[:, 0]

    def hidden(
        self, tokens: jax.Array, *, cache: Cache | None = None, **inputs: jax.Array | None
    ) -> tuple[jax.Array, Cache | None]:
        """As `Decoder.hidden`, with a cache from `make_cache`."""
        hidden, cache = self._over_rows(
            lambda model, tokens, given, cache: model.hidden(tokens, cache=cache, **given),
            tokens[:, None],
            self._by_row(tokens, inputs),
            cache,
        )
        return hidden[:, 0], cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Apply the head: [B, T, D] -> [B, T, V]."""
        return self._over_rows(lambda model, hidden: model.logits(hidden), hidden[:, None])[:, 0]

    def read_prompts(self, tokens: jax.Array, mask: jax.Array, new: int) -> PromptState:
        """As `LanguageModel.read_prompts`."""
        return read_prompts(self, tokens, mask, new)

    def make_cache(self, batch: int, length: int) -> Cache:
        """As `Decoder.make_cache`; the arrays of the cache have a leading row axis.

        Raises:
            UserError: `batch` differs from the number of rows.
        """
        self._check_rows(batch)
        return self._over_rows(lambda model: model.make_cache(1, length))

    def _by_row(self, tokens: jax.Array, inputs: dict[str, jax.Array | None]) -> dict[str, jax.Array]:
        """The given inputs other than tokens, each [B, 1, T]."""
        self._check_rows(len(tokens))
        given = {name: value for name, value in inputs.items() if value is not None}
        return {name: jnp.broadcast_to(value, tokens.shape)[:, None] for name, value in given.items()}

    def _check_rows(self, batch: int) -> None:
        if batch != self.index.shape[0]:
            raise UserError(f"the batch has {batch} rows, but rows() was given adapters for {self.index.shape[0]}")

    def _over_rows(self, compute: Callable[..., T], *arguments: Any) -> T:
        """Run compute(the row's model, the row's slice of every argument) for all rows."""
        base = dict(zip(self.paths[1], (leaf.get_value() for leaf in self.base), strict=True))
        own = [jnp.take(leaf.get_value(), self.index.get_value(), axis=0) for leaf in self.stack]  # [B, ...]

        def row(own: list[jax.Array], arguments: Any) -> T:
            tree = dict(zip(self.paths[0], own, strict=True))
            return compute(variables.join(self.graph, base, tree), *arguments)

        return jax.vmap(row)(own, arguments)


def rows(model: nnx.Module, names: Sequence[str | None]) -> Rows:
    """Return the model for a batch whose row b uses adapter names[b], for inference: its parameters are copies.

    Args:
        model: A decoder or an encoder from `load_model`.
        names: For each row the name of an adapter, or None for the base alone. The adapters must have the same method
            and shapes.

    Raises:
        UserError: An adapter is not attached, the adapters differ in their shapes, a row has no adapter although the
            method always has an effect (a soft prompt takes positions), or the model is an encoder-decoder or an
            adopted network.

    Examples:
        >>> import jax.numpy as jnp
        >>> import peftjax
        >>> from flax import nnx
        >>> model = peftjax.load_model("embedded")
        >>> model = peftjax.attach(model, peftjax.Lora(rank=4), "one", rngs=nnx.Rngs(0))
        >>> model = peftjax.attach(model, peftjax.Lora(rank=4), "two", rngs=nnx.Rngs(1))
        >>> mixed = peftjax.rows(model, ["one", "two", None])  # an adapter for each row of a batch
        >>> mixed(jnp.ones((3, 4), int)).shape
        (3, 4, 1024)
    """
    if not isinstance(model, Model):
        raise UserError(
            f"rows: {type(model).__name__} is not a peftjax decoder or encoder; adopted networks are not supported"
        )
    if not model.mixes_adapters:
        raise UserError(
            "rows: a batch of several adapters is not supported for an encoder-decoder; use() one at a time"
        )
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise UserError(f"rows: names must be a list with one adapter for each row, got {names!r}")
    names = list(names)
    if wrong := [name for name in names if not isinstance(name, str | None)]:
        raise UserError(f"rows: the adapter of a row must be a name or None, got {wrong[0]!r}")
    named = list(dict.fromkeys(names))
    some = next((name for name in named if name is not None), None)
    if some is None:
        raise UserError(f"rows: {names} names no adapter; to run the base alone, call use(model, None)")
    before, idle = active(model), "rows_without"
    if None in named:
        require(model, some)
        method = attached(model)[some]
        if not method.neutral:
            raise UserError(f"rows: {method.method} always has an effect, so every row needs an adapter")
        attach_unchecked(model, method, idle, rngs=nnx.Rngs(0))
    try:
        views = [active_view(use(model, idle if name is None else name)) for name in named]
    finally:
        if None in named:
            detach(model, idle)
        use(model, before)
    for name, view in zip(named, views, strict=True):
        remove_dropout(view)
        if variables.flat(view)[0] != variables.flat(views[0])[0] or _shapes(view) != _shapes(views[0]):
            raise UserError(
                f"rows: the adapters {named[0]!r} and {name!r} differ in their shapes or layers; one batch needs adapters "
                "of the same method and options"
            )
    return Rows(views, jnp.array([named.index(name) for name in names], jnp.int32))


def _shapes(view: nnx.Module) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in variables.flat(view)[1].items()}
