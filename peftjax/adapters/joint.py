"""Several adapters with one name in a slot: a method's adapter and trained copies of parameters."""

from functools import partial
from typing import Any

import jax
from flax import nnx

from peftjax.adapters.adapter import MethodAdapter, Override
from peftjax.adapters.sites import Site, adapters_named
from peftjax.nn.slot import Base


class Joint(MethodAdapter):
    """The adapter of a method, with trained copies of parameters: of other layers of the stack, or of biases.

    Attributes:
        inner: The method's adapter, or another `Joint`.
        outer: The trained copies. The inner adapter computes with them.
    """

    def __init__(self, inner: MethodAdapter, outer: Override) -> None:
        self.inner, self.outer = inner, outer

    def apply(self, base: Base, *inputs: Any) -> jax.Array:
        return self.outer(base.layer, partial(self.inner, base.layer, base.compute), *inputs, **base.replaced)

    def merged(self, **parameters: jax.Array) -> dict[str, jax.Array]:
        saved = self.outer.merged(**parameters)
        return saved | self.inner.merged(**(parameters | saved))


def add_copies(site: Site, name: str, copies: Override) -> None:
    """Put trained copies into a slot. If the slot has an adapter of that name, it must not train the same parameters."""
    slot = site.module.adapters
    adapter: MethodAdapter = copies
    if name in slot.names():
        adapter = Joint(slot.adapter(name), copies)
        slot.remove(name)
    slot.add(name, adapter)


def parts(adapter: MethodAdapter) -> list[Any]:
    """Return the adapters that a `Joint` consists of, the method's first; otherwise the adapter itself."""
    return [*parts(adapter.inner), adapter.outer] if isinstance(adapter, Joint) else [adapter]


def adapter_parts(model: nnx.Module, name: str) -> list[tuple[Site, Any]]:
    """Return the parts of adapter `name`, each with its site."""
    return [(site, part) for site, adapter in adapters_named(model, name) for part in parts(adapter)]
