"""One batch whose rows use different adapters of one kind: the model under vmap over its rows, each with its own.

The base is the same for all rows; of the adapters each row gathers its own from a stack, so which row uses which is an
array, and changing it compiles nothing.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.adapters.attach import attach_unchecked, detach
from peftjax.adapters.registry import active, attached, use
from peftjax.adapters.view import active_view
from peftjax.core import variables


class Rows(nnx.Module):
    """A model in evaluation whose row b uses adapter number index[b] of a stack. Called as the model is; `generate`
    takes it too. index: int [B], a variable."""

    def __init__(self, views: Sequence[Any], index: jax.Array) -> None:
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

    def __call__(self, tokens: jax.Array, *, cache: Any = None, **inputs: jax.Array | None) -> Any:
        """What the model gives, its rows first; with `cache=`: (logits, the cache with T more tokens)."""
        if cache is not None:
            hidden, cache = self.hidden(tokens, cache=cache, **inputs)
            return self.logits(hidden), cache
        given = _by_row(tokens, inputs)
        return self._over_rows(lambda model, tokens, given: model(tokens, **given), tokens[:, None], given)[:, 0]

    def hidden(self, tokens: jax.Array, *, cache: Any = None, **inputs: jax.Array | None) -> tuple[jax.Array, Any]:
        """As a decoder's, with a cache of `make_cache`."""
        hidden, cache = self._over_rows(
            lambda model, tokens, given, cache: model.hidden(tokens, cache=cache, **given),
            tokens[:, None],
            _by_row(tokens, inputs),
            cache,
        )
        return hidden[:, 0], cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The head: [B, T, D] -> [B, T, V]."""
        return self._over_rows(lambda model, hidden: model.logits(hidden), hidden[:, None])[:, 0]

    def make_cache(self, batch: int, length: int) -> Any:
        """An empty cache; its arrays have the rows first."""
        if batch != self.index.shape[0]:
            raise ValueError(f"{batch} rows are asked for, and adapters are named for {self.index.shape[0]}")
        return self._over_rows(lambda model: model.make_cache(1, length))

    def _over_rows(self, compute: Any, *arguments: Any) -> Any:
        """compute(the row's model, the row's part of every argument), for all rows at once."""
        base = dict(zip(self.paths[1], (leaf.get_value() for leaf in self.base), strict=True))
        own = [jnp.take(leaf.get_value(), self.index.get_value(), axis=0) for leaf in self.stack]  # [B, ...]

        def row(own: list[jax.Array], arguments: Any) -> Any:
            tree = dict(zip(self.paths[0], own, strict=True))
            return compute(variables.join(self.graph, base, tree), *arguments)

        return jax.vmap(row)(own, arguments)


def rows(model: Any, names: Sequence[str | None]) -> Rows:
    """The model for a batch whose row b uses the adapters called names[b]; None: the base alone.

    Raises:
        ValueError: a name that is not attached, adapters that differ in their method's shapes, a row without an adapter
            beside adapters that no values make ineffective (a soft prompt takes positions), or an encoder-decoder.
    """
    if not hasattr(model, "hidden"):
        raise ValueError(f"rows: {type(model).__name__} is no decoder of peftjax; an adopted network cannot be used so")
    if hasattr(model, "decode"):
        raise ValueError(
            "rows: one batch with several adapters is not there for an encoder-decoder; use() one at a time"
        )
    named = list(dict.fromkeys(names))
    some = next((name for name in named if name is not None), None)
    if some is None:
        raise ValueError(f"rows: {list(names)} names no adapter; use(model, None) is the base alone")
    before, idle = active(model), "rows_without"
    if None in named:
        method = attached(use(model, some))[some]
        if not method.neutral:
            raise ValueError(f"rows: {method.method} always has an effect, so no row of the batch can be without it")
        attach_unchecked(model, method, idle, rngs=nnx.Rngs(0))
    try:
        views = [active_view(use(model, name or idle)) for name in named]
    finally:
        if None in named:
            detach(model, idle)
        use(model, before)
    for name, view in zip(named, views, strict=True):
        view.eval()
        if variables.flat(view)[0] != variables.flat(views[0])[0] or _shapes(view) != _shapes(views[0]):
            raise ValueError(
                f"rows: the adapters {named[0]!r} and {name!r} differ in their shapes or layers; one batch takes "
                "adapters of the same method and options"
            )
    return Rows(views, jnp.array([named.index(name) for name in names], jnp.int32))


def _by_row(tokens: jax.Array, inputs: dict[str, jax.Array | None]) -> dict[str, jax.Array]:
    """The inputs beside tokens that are given, each [B, 1, T]."""
    given = {name: value for name, value in inputs.items() if value is not None}
    return {name: jnp.broadcast_to(value, tokens.shape)[:, None] for name, value in given.items()}


def _shapes(view: Any) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in variables.flat(view)[1].items()}
